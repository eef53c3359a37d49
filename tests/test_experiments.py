"""What the experiments' own scripts do beyond calling the launchers."""

import dataclasses
import gzip
import importlib.util
import json
import pathlib

import pytest
import tiny

from spec_stream import checkpoints, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import Generation
from spec_stream.models.config import to_dict

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def own_outputs():
  path = ROOT / "experiments" / "e2e_nlg" / "own_outputs.py"
  spec = importlib.util.spec_from_file_location("own_outputs", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


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
