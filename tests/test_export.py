"""What a run is exported as: files, model card, and what cannot be exported.

Nothing here needs transformers; test_hf_export compares with it.
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import call_all, one_line, write_run
from tiny import DATA, MODEL, make_model, pairs

from spec_stream import checkpoints, export, peft, weights
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import generate
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint
from spec_stream.hf import config as hf_config
from spec_stream.models.config import StreamConfig, to_dict

TEXTS = [text for pair in pairs() for text in pair]
TOKENIZER = Tokenizer.train(TEXTS, 280)
LORA = StreamConfig(num_streams=2, num_stream_layers=1, lora_rank=2)
LOSSLESS = dataclasses.replace(LORA, mode="lossless", prune_rank=2)
PLAIN = dataclasses.replace(LORA, main_attends_streams=False)


def make_run(streams, tokenizer=TOKENIZER, **changes):
  """A run whose weights are random everywhere."""
  config = dataclasses.replace(
    MODEL, vocab_size=280, max_positions=64, streams=streams, **changes
  )
  settings = {"model": to_dict(config), "data": DATA, "train": {}}
  return checkpoints.Run(make_model(config), tokenizer, settings, 3)


def values(run):
  return weights.to_weights(run.model)


def same(a, b):
  assert a.keys() == b.keys()
  for path, x in a.items():
    assert x.dtype == b[path].dtype and np.array_equal(x, b[path]), path


@pytest.mark.slow
@pytest.mark.parametrize(
  "streams, shard_bytes",
  [
    (LORA, export.GB),
    (LOSSLESS, 9000),
    (LORA, 9000),
    (LOSSLESS, export.GB),
    (PLAIN, export.GB),
    (PLAIN, 9000),
  ],
  ids=str,
)
def test_a_merged_run_comes_back_bit_for_bit(tmp_path, streams, shard_bytes):
  run = make_run(streams)
  notes = export.merge(run, tmp_path / "out", shard_bytes=shard_bytes)
  assert bool(notes) == streams.attends
  files = list((tmp_path / "out").glob("model*.safetensors"))
  assert (len(files) > 1) == (shard_bytes < export.GB)
  back = checkpoints.load_checkpoint(tmp_path / "out")
  if streams.mode == "lossless":  # its adapters stay apart
    same(values(back), values(run))
  assert back.tokenizer.hash() == TOKENIZER.hash()
  prompts = [TOKENIZER.encode_prompt("red big"), TOKENIZER.encode_prompt("old")]
  before, after = (
    generate(r.model, prompts, StreamDraft(), max_new_tokens=12, seed=[1, 2])
    for r in (run, back)
  )
  assert before == after
  # Exported once more, nothing changes at all.
  export.merge(back, tmp_path / "again", shard_bytes=shard_bytes)
  for path in (tmp_path / "out").glob("*.safetensors"):
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_bfloat16_weights_are_exported_as_they_are(tmp_path):
  run = make_run(LOSSLESS, param_dtype="bfloat16", dtype="bfloat16")
  export.merge(run, tmp_path / "out")
  same(values(checkpoints.load_checkpoint(tmp_path / "out")), values(run))
  export.merge(run, tmp_path / "wide", dtype="float32")
  wide = values(checkpoints.load_checkpoint(tmp_path / "wide"))
  for path, x in values(run).items():
    assert wide[path].dtype == jnp.float32
    assert np.array_equal(wide[path], x.astype(jnp.float32))


def test_streams_alone_go_beside_the_base(tmp_path):
  run = make_run(LOSSLESS)
  base = dataclasses.replace(run.model.config, streams=hf_config.NO_STREAMS)
  shapes = checkpoint.base_shapes(run.model.config)
  plain = weights.to_model(base, {p: values(run)[p] for p in shapes})
  plain = dataclasses.replace(run, model=plain)
  export.merge(plain, tmp_path / "base")
  export.streams(run, tmp_path / "streams")
  files = {path.name for path in (tmp_path / "streams").iterdir()}
  assert files == {"streams.json", "streams.safetensors", "README.md"}
  for name in files:
    shutil.copy(tmp_path / "streams" / name, tmp_path / "base" / name)
  same(values(checkpoints.load_checkpoint(tmp_path / "base")), values(run))


@pytest.mark.slow
def test_what_cannot_be_exported(tmp_path):
  out, lora = tmp_path / "out", make_run(LORA)
  bare = make_run(StreamConfig(2, 1))
  frozen = make_run(PLAIN)
  frozen.config["train"]["trainable"] = "adapters"
  # Llama has no such norm; no family has it without others.
  odd = make_run(LORA, norm_offset=True, activation="relu", gated=True)
  for write, run, says in (
    (export.streams, lora, "only lossless mode leaves the base as it was"),
    (export.streams, bare, "only lossless mode"),
    (peft.write, bare, "has no LoRA adapters"),
    (peft.write, make_run(PLAIN), "trained its base as well"),
    (peft.write, frozen, "this run began with nothing"),
    (peft.write, lora, "PEFT would make another model .*eq. 1"),
    (peft.write, make_run(LOSSLESS), "act on streams alone"),
    (export.merge, odd, "no Hugging Face family has this model"),
  ):
    with pytest.raises(UserError, match=says) as error:
      write(run, out)
    assert "\n" not in str(error.value) and not out.exists()
  for settings, says in (
    ({"dtype": "float8"}, "--dtype=float8: use one of float32, bfloat16"),
    ({"shard_bytes": 0}, "--shard_gb must be above 0"),
  ):
    with pytest.raises(UserError, match=says):
      export.merge(lora, out, **settings)
  out.mkdir()
  with pytest.raises(UserError, match="exists: give a new directory"):
    export.merge(lora, out)


def test_a_whole_file_goes_before_others_beside_it(tmp_path):
  """As in transformers: adapters may lie there, or a second copy."""
  run = make_run(LOSSLESS)
  export.merge(run, tmp_path / "out")
  for name in ("adapter_model", "pytorch_model"):
    shutil.copy(
      tmp_path / "out" / "streams.safetensors",
      tmp_path / "out" / f"{name}.safetensors",
    )
  same(values(checkpoints.load_checkpoint(tmp_path / "out")), values(run))


def test_a_run_has_the_tokenizer_that_was_written_last(tmp_path):
  """That of an abandoned run in the same place must not stay."""
  run = make_run(LOSSLESS)
  tokenizer = checkpoints.tokenizer_directory(tmp_path)
  tokenizer.mkdir()
  (tokenizer / "tokenizer.json").write_text("{}")
  checkpoints.write_tokenizer(tmp_path, run.tokenizer)
  found = checkpoints.read_tokenizer(tmp_path, 280)
  assert found.hash() == TOKENIZER.hash()


def test_half_an_export_leaves_nothing(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(export, "_write_streams", fail)
  with pytest.raises(OSError):
    export.merge(make_run(LORA), tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_the_card_tells_what_was_measured_and_no_path(tmp_path):
  run = make_run(LOSSLESS)
  run.config["train"] = {"init_from": "/somewhere/secret/vicuna", "steps": 3}
  run.config["data"] = DATA | {"manual_dir": "/somewhere/secret/data"}
  (tmp_path / "run").mkdir()
  about = {"step": 3, "dataset": "restaurants", "date": "2026-01-02"}
  quality = dict(about, rouge1=12.345, rougeLsum=9.0, prompts=7, cut=1)
  quality["split"] = "test"
  (tmp_path / "run" / "quality.json").write_text(json.dumps(quality))
  row = dict(
    about, method="streams", tree_nodes=4, tokens_per_call=2.345, prompts=9,
    speedup=1.77, speedup_low=1.7, speedup_high=1.8, run_id="a", batch=1,
  )  # fmt: skip
  lines = row, dict(row, step=2, tokens_per_call=9.99, run_id="b")
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / "run" / "results.jsonl").write_text(text)
  export.merge(run, tmp_path / "out", workdir=tmp_path / "run")
  card = (tmp_path / "out" / "README.md").read_text()
  assert card.startswith("---\ntags:") and "base_model: vicuna\n---" in card
  for words in ("ROUGE-1 12.35", "7 test prompts", "2.35", "1.77"):
    assert words in card, words
  assert "| streams.num_streams | 2 |" in card and "<sep>" in card
  assert "secret" not in card and "9.99" not in card  # of another step
  export.merge(run, tmp_path / "unknown")
  card = (tmp_path / "unknown" / "README.md").read_text()
  assert "Neither speed nor quality was measured" in card
  quality["step"] = 2
  (tmp_path / "run" / "quality.json").write_text(json.dumps(quality))
  export.merge(run, tmp_path / "later", workdir=tmp_path / "run")
  card = (tmp_path / "later" / "README.md").read_text()
  assert "at step 2 only" in card and "12.35" not in card


def test_launcher(tmp_path):
  model = dataclasses.replace(
    MODEL, vocab_size=280, max_positions=64, streams=LOSSLESS
  )
  write_run(tmp_path / "run", model, TOKENIZER, data=DATA, train={})
  run = "--workdir=run"
  calls = {
    "good": ([run, "--out=out"], ""),
    "streams": ([run, "--out=added", "--what=streams"], ""),
    "--out=out exists": ([run, "--out=out"], ""),
    "--what=all: use one of": ([run, "--out=a", "--what=all"], ""),
    "go with --what=merged": (
      [run, "--out=a", "--what=streams", "--dtype=float32"],
      "",
    ),
    "no checkpoint of step 9": ([run, "--out=a", "--step=9"], ""),
    "no such directory": (["--workdir=nowhere", "--out=a"], ""),
    "act on streams alone": ([run, "--out=a", "--what=adapters"], ""),
    "--out is needed": ([run], ""),
  }
  for says, done in call_all("export", calls, tmp_path).items():
    if says in ("good", "streams"):
      assert done.code == 0 and "MB" in done.out, done
    else:
      one_line(done, says)
  assert not (tmp_path / "a").exists()
  found = checkpoints.load_checkpoint(tmp_path / "out")
  same(values(found), values(checkpoints.load_run(tmp_path / "run")))
  # What was exported decodes from the shell, as the run does.
  ask = ["--prompt=red big", "--json", "--max_new_tokens=8"]
  calls = {"run": ([run, *ask], ""), "out": (["--checkpoint=out", *ask], "")}
  a, b = call_all("generate", calls, tmp_path).values()
  assert a.code == b.code == 0 and a.out == b.out and a.out, (a, b)
