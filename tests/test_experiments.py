"""What the experiments' own scripts do beyond calling the launchers."""

import csv
import dataclasses
import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from scripts import ROOT, script

from spec_stream import checkpoints, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import Generation
from spec_stream.models.config import to_dict
from spec_stream.models.transformer import ALL, causal_mask, forward


@pytest.fixture
def own_outputs():
  return script("e2e_nlg", "own_outputs.py")


@pytest.fixture
def run(tmp_path, monkeypatch):
  """A run on three files of E2E-NLG's form, without its weights' file."""
  files = tmp_path / "e2e"
  files.mkdir()
  for name, food in (
    ("trainset", "Thai"),
    ("devset", "Greek"),
    ("testset_w_refs", "Fijian"),
  ):
    lines = [f'"name[{c}], food[{food}]",{c} has {food} food.' for c in "ABC"]
    text = "\n".join(["mr,ref", *lines, lines[0], ""])  # A has two references
    (files / f"{name}.csv").write_text(text)
  data = dataclasses.asdict(
    DataConfig(
      **tiny.DATA,
      dataset="e2e_nlg",
      data_dir=str(tmp_path / "data"),
      manual_dir=str(files),
    )
  )
  tokenizer = Tokenizer.train(["name[A], food[Thai]"] * 9, 280)
  model = dataclasses.replace(tiny.SMALL, vocab_size=tokenizer.vocab_size)
  checkpoints.write_config(
    tmp_path / "run", {"model": to_dict(model), "data": data}
  )
  tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
  monkeypatch.setattr(
    checkpoints,
    "load_weights",
    lambda workdir, config, *_: (weights.init(config, 0), 1),
  )
  return tmp_path / "run"


def test_own_outputs_replace_the_references(
  own_outputs, run, tmp_path, monkeypatch, capsys
):
  encode = Tokenizer.load(str(run / "tokenizer.json")).encode_prompt
  eos = Tokenizer.load(str(run / "tokenizer.json")).eos_ids

  def decode_all(model, prompts, drafter, **settings):
    """Says the prompt again; that of B does not come to its end."""
    assert drafter.name == "none" and settings["end_token"] == eos
    ends = [[] if p == encode("name[B], food[Thai]") else eos for p in prompts]
    return [Generation([*p, *end], [], 1, []) for p, end in zip(prompts, ends)]

  monkeypatch.setattr(own_outputs.evaluate, "decode_all", decode_all)
  out = tmp_path / "made" / "outputs"
  arguments = ["own_outputs.py", str(run), str(out)]
  assert own_outputs.main(arguments) == 0
  assert f"2 outputs of {run}" in capsys.readouterr().out
  with gzip.open(out / "train.jsonl.gz", "rt") as file:
    found = [json.loads(line) for line in file]
  assert [pair["mr"] for pair in found] == [
    f"name[{c}], food[Thai]" for c in "AC"
  ]
  assert [pair["ref"] for pair in found] == [pair["mr"] for pair in found]
  for name in ("devset.csv", "testset_w_refs.csv"):
    old = tmp_path / "e2e" / name
    assert (out / name).read_bytes() == old.read_bytes()
  before = (out / "train.jsonl.gz").read_bytes()
  assert own_outputs.main(arguments) == 0
  assert "nothing to do" in capsys.readouterr().out
  assert (out / "train.jsonl.gz").read_bytes() == before


def test_own_outputs_of_no_run_is_one_line(own_outputs, tmp_path, capsys):
  out = tmp_path / "outputs"
  assert own_outputs.main(["x", str(tmp_path / "none"), str(out)]) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
  assert not out.exists()


# -- report.py ----------------------------------------------------------------


def result(run_id, nodes, value, **fields):
  """A row of results.jsonl."""
  row = {"method": "streams", "run_id": run_id, "command": f"nodes {nodes}"}
  row |= {"tree": "best_first", "tree_nodes": nodes, "kept_nodes": 0}
  row |= {"tokens_per_call": value, "tokens_per_call_low": value - 0.1}
  return row | {"tokens_per_call_high": value + 0.1, "identical": 1.0} | fields


@pytest.fixture
def sweep(tmp_path):
  """Results of two runs; the first was measured twice at 4 nodes."""
  rows = {
    "a": [
      result("1", 4, 9.0),
      result("2", 4, 2.0, num_streams=1),
      result("2", 4, 1.0, num_streams=1, method="none"),
      result("2", 4, 1.0, num_streams=1, method="none (A against A)"),
      result("3", 8, 2.5, num_streams=1, accept_by_depth=[0.5]),
    ],
    "b": [result("4", 4, 3.0, num_streams=2, kept_nodes=2)],
  }
  for name, lines in rows.items():
    (tmp_path / "runs" / name).mkdir(parents=True)
    path = tmp_path / "runs" / name / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
  return tmp_path / "runs"


def call_report(*args):
  command = [sys.executable, ROOT / "experiments" / "report.py", *args]
  done = subprocess.run(command, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def test_report_writes_tables_and_plots(sweep, tmp_path):
  pytest.importorskip("matplotlib")
  out = tmp_path / "out"
  code, table, err = call_report(
    f"--results={sweep}", f"--out={out}", "--x=num_streams", "--lines=pruning"
  )
  assert code == 1 and not out.exists()  # speedup, which no row has
  assert err.startswith("error: 'speedup' is no number of the results: ")
  code, table, err = call_report(
    f"--results={sweep}",
    f"--out={out}",
    "--x=num_streams",
    "--y=tokens_per_call",
    "--lines=pruning",
  )
  assert (code, err) == (0, "")
  assert (out / "results.md").read_text() == table
  lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
  assert (
    lines[0]
    == (
      "run pruning method tree_nodes kept_nodes num_streams tokens_per_call "
      "identical"
    ).split()
  )
  cell = "2.00 [1.90, 2.10]"
  assert lines[2] == [
    "a",
    "not pruned",
    "streams",
    "4",
    "0",
    "1",
    cell,
    "100 %",
  ]
  assert [line[:3] for line in lines[3:]] == [
    ["a", "not pruned", "none"],
    ["a", "not pruned", "streams"],
    ["b", "pruned", "streams"],
  ]
  with open(out / "results.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["tokens_per_call"] for row in rows] == [
    "2.0",
    "1.0",
    "2.5",
    "3.0",
  ]
  assert rows[2]["accept_by_depth"] == "[0.5]"
  image = (out / "tokens_per_call_by_num_streams.png").read_bytes()
  assert image.startswith(b"\x89PNG") and len(image) > 5000


def test_lines_of_a_plot(sweep):
  report = script("report.py")
  rows = report.load([str(sweep)])
  assert report.lines_of(
    rows, "num_streams", "tokens_per_call", ["pruning", "tree"]
  ) == {
    "not pruned": [(1, 2.0, 1.9, 2.1), (1, 2.5, 2.4, 2.6)],
    "pruned": [(2, 3.0, 2.9, 3.1)],
  }
  few = report.select(rows, ["tree_nodes=8"])
  assert report.lines_of(few, "tree_nodes", "identical", ["method"]) == {
    "": [(8, 1.0, 1.0, 1.0)]
  }


def test_report_of_nothing_is_one_line(sweep, tmp_path):
  for args, words in {
    (f"--results={tmp_path / 'no'}",): "no results.jsonl is there",
    (f"--results={sweep}", "--where=tree_nodes=5"): "tree_nodes is 4, 8",
    (f"--results={sweep}", "--where=tree=x"): "tree is best_first",
  }.items():
    code, out, err = call_report(f"--out={tmp_path / 'out'}", *args)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and words in err
  assert not (tmp_path / "out").exists()


# -- similarity ---------------------------------------------------------------


@pytest.fixture
def similarity():
  return script("similarity", "similarity.py")


@pytest.mark.slow
def test_cosines_are_those_of_each_sequence_by_itself(similarity):
  streams = dataclasses.replace(
    tiny.MODEL.streams, num_streams=2, num_stream_layers=2
  )
  config = dataclasses.replace(tiny.MODEL, streams=streams)
  model = weights.to_model(config, weights.init(config, 0))
  rng = np.random.default_rng(0)
  draw = lambda size: rng.integers(0, config.vocab_size, size).tolist()
  prompts, outputs = [], []
  for length in (3, 9, 5, 1, 7, 2, 6, 4, 8):  # more than one pass of rows
    prompts.append(draw(length))
    outputs.append(draw(10 - length % 4))
  found = similarity.cosines(model, prompts, outputs)
  expected = {}
  for prompt, output in zip(prompts, outputs):
    row = np.array([prompt + output])
    out = forward(
      model,
      row,
      np.arange(row.shape[1])[None],
      causal_mask(np.ones_like(row)),
      streams=ALL,
      taps=(config.num_layers - 2, config.num_layers - 1),
    )
    for t in range(len(prompt) - 1, row.shape[1]):
      for j in (1, 2):
        if t + j < row.shape[1]:
          future = np.asarray(out.taps[0, t + j])
          for kind, now in enumerate(
            (out.stream_taps[0, t, j - 1], out.taps[0, t])
          ):
            for layer in (0, 1):
              a, b = np.asarray(now[layer]), future[layer]
              cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
              expected.setdefault((kind, j - 1, layer), []).append(cosine)
  assert found.shape == (2, 2, 2)
  for at, values in expected.items():
    np.testing.assert_allclose(found[at], np.mean(values), rtol=1e-4, atol=1e-5)
  # The last layer's streams are what the head reads, before the norm.
  last = model.final_norm(out.stream_taps[..., -1, :])
  np.testing.assert_allclose(last, out.streams, rtol=1e-5, atol=1e-5)


def test_similarity_says_what_it_needs(similarity, tmp_path):
  with pytest.raises(similarity.UserError, match="too short"):
    config = tiny.SMALL
    model = weights.to_model(config, weights.init(config, 0))
    similarity.cosines(model, [[1, 2]], [[]])
  pytest.importorskip("matplotlib")
  found = np.linspace(0, 0.99, 12).reshape(2, 3, 2)
  lines = similarity.render(found, 5).splitlines()
  assert lines[0] == "| layer | stream 1 | stream 2 | stream 3 |"
  assert lines[2] == "| 5 | 0.00 / 0.54 | 0.18 / 0.72 | 0.36 / 0.90 |"
  similarity.plot(found, 5, tmp_path / "c.png")
  assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
