"""Exported runs in transformers and PEFT: the logits are ours."""

import dataclasses

import hf_models
import numpy as np
import pytest
from hf_models import CASES, VOCAB
from random_models import in_short
from test_hf_parity import STREAMS, close, logits, with_random_streams
from tiny import make_model

from spec_stream import checkpoints, export, weights
from spec_stream import peft as peft_format
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.hf import checkpoint
from spec_stream.hf import config as hf_config
from spec_stream.models.config import ModelConfig, StreamConfig, to_dict

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 60))
SHARED = StreamConfig(
  num_streams=2,
  num_stream_layers=2,
  lora_rank=4,
  lora_alpha=6.0,
  main_attends_streams=False,
)


def as_run(model, source):
  settings = {"model": to_dict(model.config)}
  settings["train"] = {"init_from": str(source), "trainable": "adapters"}
  return checkpoints.Run(model, None, settings, 1)


def with_random_adapters(path, config):
  """The checkpoint with adapters that do something: fresh ones do nothing."""
  values = weights.to_weights(checkpoint.load(path, config))
  rng = np.random.default_rng(1)
  for name in sorted(weights.adapters(config)):
    values[name] = rng.normal(0, 0.2, values[name].shape).astype(np.float32)
  return weights.to_model(config, values)


def torch_model(path):
  found = transformers.AutoModelForCausalLM.from_pretrained(path)
  return found.float().eval()


def weights_of(path):
  run = checkpoints.load_checkpoint(path, tokenizer=False)
  return weights.to_weights(run.model)


@pytest.fixture(scope="module", params=in_short(CASES, ("llama", "gemma2")))
def source(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("hf") / "checkpoint"
  return path, hf_models.make(request.param, path), request.param


def test_an_exported_checkpoint_is_the_same_model(source, tmp_path):
  """Every family, with streams in lossless mode, in shards."""
  path, theirs, name = source
  model = with_random_streams(path)
  run = as_run(model, path)
  export.merge(run, tmp_path / "out", shard_bytes=30_000)
  again = torch_model(tmp_path / "out")
  assert again.config.model_type == CASES[name][0]
  want = hf_models.logits(theirs, TOKENS)
  assert np.array_equal(hf_models.logits(again, TOKENS), want)
  back, before = weights_of(tmp_path / "out"), weights.to_weights(model)
  assert back.keys() == before.keys()
  assert all(np.array_equal(back[p], x) for p, x in before.items())
  config = hf_config.read_config(tmp_path / "out")
  assert config == model.config


PROJECTIONS = ("qwen2", "phi", "phi3")  # laid out otherwise


@pytest.mark.parametrize(
  "name",
  ["opt", *(pytest.param(n, marks=pytest.mark.slow) for n in PROJECTIONS)],
)
def test_adapters_are_folded_in_or_written_for_peft(name, tmp_path):
  """Shared mode, main stream = base + LoRA, each layout of projections."""
  path = tmp_path / "base"
  theirs = hf_models.make(name, path)
  config = hf_config.read_config(path, streams=SHARED)
  run = as_run(with_random_adapters(path, config), path)
  want = logits(run.model, TOKENS)
  base = hf_models.logits(theirs, TOKENS)
  assert not close(base, want, 1e-2)  # the adapters do something
  export.merge(run, tmp_path / "merged")
  found = hf_models.logits(torch_model(tmp_path / "merged"), TOKENS)
  assert close(found, want)
  peft = pytest.importorskip("peft")
  peft_format.write(run, tmp_path / "adapters")
  tuned = peft.PeftModel.from_pretrained(
    torch_model(path), tmp_path / "adapters"
  )
  assert close(hf_models.logits(tuned.eval(), TOKENS), want)


@pytest.mark.slow
def test_next_token_adapters_are_a_plain_lora(tmp_path):
  """A run without streams, trained as the baseline of shared mode."""
  peft = pytest.importorskip("peft")
  path = tmp_path / "base"
  theirs = hf_models.make("llama", path)
  streams = dataclasses.replace(
    SHARED, num_streams=0, main_attends_streams=True, lora_layers="all"
  )
  config = hf_config.read_config(path, streams=streams)
  run = as_run(with_random_adapters(path, config), path)
  peft_format.write(run, tmp_path / "out")
  tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
  assert close(hf_models.logits(tuned, TOKENS), logits(run.model, TOKENS))
  export.merge(run, tmp_path / "merged")
  assert not (tmp_path / "merged" / "streams.json").exists()


def test_a_model_from_scratch_and_its_tokenizer(tmp_path):
  """No checkpoint was ever there: it becomes a Llama."""
  config = dataclasses.replace(
    ModelConfig(),
    vocab_size=280, width=32, num_layers=3, head_dim=8, ffw_dim=48,
    max_positions=128, streams=dataclasses.replace(STREAMS, lora_rank=2),
  )  # fmt: skip
  tokenizer = Tokenizer.train(["some words, 12 of them"] * 9, 280)
  run = checkpoints.Run(make_model(config), tokenizer, {"model": {}}, 1)
  export.merge(run, tmp_path / "out")
  theirs = torch_model(tmp_path / "out")
  assert theirs.config.model_type == "llama"
  assert theirs.config.eos_token_id == tokenizer.eos_id
  tokens = TOKENS + 100
  assert close(logits(run.model, tokens), hf_models.logits(theirs, tokens))
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  for text in ("some words", "naïve 🦊\n12"):
    ids = tokenizer.encode(text)
    assert words.encode(text, add_special_tokens=False) == ids
    assert words.decode(ids) == text
  assert (words.bos_token_id, words.eos_token_id) == (1, 3)


def test_a_checkpoints_own_tokenizer_goes_with_it(tmp_path):
  """Its files are copied as they are; transformers reads the same ids."""
  import tokenizers as tk

  path = tmp_path / "base"
  hf_models.make("llama", path, vocab_size=320)
  core = tk.Tokenizer(tk.models.BPE())
  core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tk.decoders.ByteLevel()
  trainer = tk.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<unk>", "<s>", "</s>"],
    initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  core.train_from_iterator(["some words, twelve of them"] * 9, trainer)
  core.save(str(path / "tokenizer.json"))
  names = '{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
  (path / "tokenizer_config.json").write_text(names)
  run = checkpoints.load_checkpoint(path)
  run.config["train"] = {"init_from": str(path)}
  export.merge(run, tmp_path / "out")
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
  back = checkpoints.load_checkpoint(tmp_path / "out")
  assert back.tokenizer.hash() == run.tokenizer.hash()
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  text = "some words"
  ids = back.tokenizer.encode(text)
  assert words.encode(text, add_special_tokens=False) == ids
