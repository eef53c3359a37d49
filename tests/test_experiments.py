"""What the experiments' own scripts do beyond calling the launchers."""

import csv
import dataclasses
import gzip
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from spec_stream import UserError, checkpoints, decode, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import Generation
from spec_stream.models import attention
from spec_stream.models.config import to_dict
from spec_stream.models.transformer import ALL, causal_mask, forward

ROOT = pathlib.Path(__file__).parent.parent


def script(*path):
  path = ROOT.joinpath("experiments", *path)
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


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


# -- step_cost ----------------------------------------------------------------


def test_steps_are_measured_against_their_limits(tmp_path, capsys):
  steps = script("step_cost", "steps.py")
  args = "--shape=tiny --lengths=20 --new=8 --prompts=2 --nodes=4 --kept=0,2"
  out = tmp_path / "rows.jsonl"
  assert steps.main([*args.split(), f"--out={out}"]) == 0
  table = capsys.readouterr().out
  assert table.splitlines()[0].split()[:3] == ["method", "nodes", "kept"]
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(r["method"], r["tree_nodes"], r["kept_nodes"]) for r in rows] == [
    ("none", 1, 0),
    ("none (A against A)", 1, 0),
    ("streams", 4, 0),
    ("streams", 4, 2),
  ]
  plain, again, whole, pruned = (r["step_bytes"] for r in rows)
  assert plain == again < whole < pruned  # by the streams, by the pruner
  plain, _, whole, pruned = (r["step_flops"] for r in rows)
  assert plain < pruned < whole
  assert all(0 < r["read_share"] and r["identical"] == 1 for r in rows)


@pytest.mark.slow
def test_what_is_for_a_gpu_runs_in_small(tmp_path):
  command = [ROOT / "experiments" / "gpu" / "run.sh", tmp_path / "o", "--tiny"]
  environ = {**os.environ, "PYTHON": sys.executable}
  done = subprocess.run(
    command, capture_output=True, text=True, env=environ, timeout=600
  )
  assert done.returncode == 0, done.stdout + done.stderr
  read = lambda name: [
    json.loads(line) for line in (tmp_path / "o" / name).open()
  ]
  names = ["device", "steps-tiny", "train", "benchmark"]
  assert [x["stage"] for x in read("stages.jsonl")] == names
  assert all(x["exit_code"] == 0 for x in read("stages.jsonl"))
  assert all(x["identical"] in (1, None) for x in read("results.jsonl"))
  assert [x["tree_nodes"] for x in read("steps.jsonl")] == [1, 1, 4, 8]
  wrong = subprocess.run(command[:1], capture_output=True, text=True)
  assert wrong.returncode == 2 and wrong.stderr.startswith("usage: ")
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 1 and "is not empty" in again.stderr


def test_each_slice_is_compiled_for_once(tmp_path):
  """With a compiler that notes what it was asked for, and fails once."""
  fake = tmp_path / "python"
  fake.write_text(f"""#!/usr/bin/env bash
echo "$*" >> {tmp_path}/asked
for word in "$@"; do
  case $word in
    *v6e_2x2-llama2_70b-J7-train*) [ -e {tmp_path}/well ] || exit 1 ;;&
    --out=*) echo '{{}}' > "${{word#--out=}}" ;;
  esac
done
""")
  fake.chmod(0o755)
  asked = tmp_path / "asked"

  def call(*args):
    asked.write_text("")
    command = [ROOT / "experiments" / "slices" / "run.sh", *args]
    environ = {**os.environ, "PYTHON": str(fake)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    return done, asked.read_text().splitlines()

  out = tmp_path / "rows"
  _, few = call(out, "v5e_4x4-llama3_8b-J3")
  assert len(few) == 2 and all("--streams=3 " in line for line in few)
  assert "--config.mesh.fsdp=2 --config.mesh.tensor=8" in few[0]
  assert "--config.mesh.fsdp=16 --config.data.batch_size=16" in few[1]
  done, rest = call(out)
  assert len(rest) == 94 and done.returncode == 1
  assert "v6e_2x2-llama2_70b-J7-train.log" in done.stderr
  (tmp_path / "well").touch()
  done, again = call(out)
  assert len(again) == 1 and done.returncode == 0
  assert len(list(out.glob("*.jsonl"))) == 96
  assert call()[0].returncode == 2


def test_rows_of_slices_become_two_tables(tmp_path, capsys):
  tables = script("slices", "table.py")
  about = {"topology": "v5e:4x4", "shape": "llama3_8b"}
  plain = about | {
    "program": "decode 1 x 2048, 1 nodes",
    "num_streams": 0,
    "fits": True,
    "memory": {"arguments": 1.5e9, "temporaries": 2.5e8, "total": 1.75e9},
    "flops": 2e9,
    "bytes": 9e8,
    "collectives": {"all-reduce": [3, 2e6], "all-gather": [1, 5e5]},
    "roofline_ms": 1.25,
    "bound": "memory",
  }
  fast = plain | {
    "program": "decode 1 x 2048, 16 nodes",
    "num_streams": 3,
    "flops": 3.6e10,
    "bytes": 9.9e8,
    "bound": "FLOPs",
  }
  large = about | {
    "program": "train 4 x 1024",
    "num_streams": 1,
    "fits": False,
    "used": "33.9G",
  }
  unread = about | {
    "program": "train 4 x 1024",
    "num_streams": 7,
    "fits": True,
    "memory": plain["memory"],
    "flops": 5e12,
  }
  alone = unread | {
    "num_streams": 3,
    "bytes": 2e9,
    "collectives": {},
    "roofline_ms": 250.4,
    "bound": "links",
  }
  for i, row in enumerate((fast, plain, large, unread, alone)):
    (tmp_path / f"{i}.jsonl").write_text(json.dumps(row) + "\n")
  assert tables.main([str(tmp_path)]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line for line in lines if line.startswith("| ")][1:] == [
    "| v5e 4x4, Llama-3.1-8B | 0 | 1.50 + 0.25 | 2 | 0.9 | 4, 2.5 MB | "
    "1.25, memory |",
    "|  | 3 | 1.50 + 0.25 | 36, 18.00 | 0.99, 1.10 | 4, 2.5 MB | "
    "1.25, arithmetic |",
    "| slice, shape | J | held + temporaries, GB | GFLOP | bytes, GB | "
    "collectives | roofline, ms |",
    "| v5e 4x4, Llama-3.1-8B | 1 | does not fit: 33.9G |  |  |  |  |",
    "|  | 3 | 1.50 + 0.25 | 5,000 | 2 | 0, 0.0 MB | 250, links |",
    "|  | 7 | 1.50 + 0.25 | 5,000 | unread | unread | "
    "at least 25.4, arithmetic |",
  ]
  assert tables.main(["nowhere"]) == 2
  other = json.dumps(plain | {"topology": "v4:2x2x1"})
  (tmp_path / "9.jsonl").write_text(other)
  with pytest.raises(SystemExit, match="9.jsonl: v4:2x2x1, llama3_8b is no"):
    tables.main([str(tmp_path)])


def test_steps_at_each_length_of_a_large_cache(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "experiments" / "step_cost")
  lengths = script("step_cost", "lengths.py")
  calls, step_ms = [], lengths.step_ms

  def timed(decoder, prompt, slots, new, room):
    assert (new, room) == (6, 100)
    ms, read = step_ms(decoder, prompt, slots, new, room)
    assert ms > 0
    nodes = decoder.drafter.tree.num_nodes if decoder.drafter.longest > 1 else 1
    calls.append((nodes, slots, len(prompt)))
    return float(len(calls)), read

  monkeypatch.setattr(decode, "SMALLEST", 32)
  small = dataclasses.replace(lengths.SHAPES["tiny"], max_positions=128)
  monkeypatch.setitem(lengths.SHAPES, "tiny", small)
  monkeypatch.setattr(lengths, "step_ms", timed)
  args = "--shape=tiny --slots=0,176 --lengths=9,100 --nodes=4 --new=6"
  out = tmp_path / "rows.jsonl"
  args += " --room=100 --rounds=1"
  assert lengths.main([*args.split(), f"--out={out}"]) == 0
  assert calls == 2 * list(itertools.product((1, 4), (0, 176), (9, 100)))
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(r["method"], r["slots"], r["length"]) for r in rows] == [
    (method, slots, length)
    for method in ("plain", "4 nodes")
    for slots in (0, 176)
    for length in (9, 100)
  ]
  assert [r["step_ms"] for r in rows] == list(range(9, 17))
  assert [r["read"] for r in rows] == 2 * [32, 176, 176, 176]
  assert [r["to_longest"] for r in rows[:3]] == [9 / 10, 1, 11 / 12]
  assert len(capsys.readouterr().out.splitlines()) == 9
  for wrong, words in (
    ("--slots=100", "took a cache of 160, then"),
    ("--rounds=0", "--rounds must be"),
    ("--kernel", "is for a TPU or a GPU"),
  ):
    with pytest.raises(UserError, match=words):
      lengths.main([*args.split(), wrong])


def test_ways_of_reading_a_cache_are_compiled(monkeypatch, capsys):
  monkeypatch.syspath_prepend(ROOT / "experiments" / "step_cost")
  monkeypatch.setattr(attention, "KERNEL_ON", ())
  ways = script("step_cost", "ways.py")
  args = "--target=cpu --shape=tiny --slots=256 --nodes=1"
  assert ways.main(args.split()) == 0
  head, *rows = (x.split() for x in capsys.readouterr().out.splitlines())
  assert head[:4] == ["nodes", "way", "MB", "copies"]
  assert [row[:2] for row in rows] == [["1", "dense"]]
  jax.clear_caches()


def test_products_are_timed_each_way(monkeypatch, capsys):
  products = script("step_cost", "products.py")
  monkeypatch.setattr(products, "SIZES", ((4, 6),))
  monkeypatch.setattr(products, "HELD", 300)  # three kernels
  calls = []
  monkeypatch.setattr(
    products,
    "microseconds",
    lambda way, kernels, rows: calls.append((rows, kernels)) or 7.0,
  )
  assert products.main(["--rows=1,3"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[4:] for line in lines[1:]] == [
    ["in", "first", "7", "7"],
    ["out", "first", "7", "7"],
    ["x", "W^T", "7", "7"],
  ]
  shapes = [[k.shape for k in kernels] for _, kernels in calls]
  assert shapes == 2 * [3 * [(4, 6)]] + 4 * [3 * [(6, 4)]]
