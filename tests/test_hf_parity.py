"""Checkpoints of each family give what transformers makes of them.

Logits at every position, 64 greedy tokens on 8 prompts, plain and with streams
attached in lossless mode; and what is exported gives them again.
"""

import dataclasses
import json

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, VOCAB

from spec_stream import weights
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.hf import checkpoint
from spec_stream.hf import config as hf_config
from spec_stream.models.config import StreamConfig
from spec_stream.models.transformer import causal_mask, forward
from spec_stream.tree import TreeSpec

pytest.importorskip("torch")
pytest.importorskip("transformers")

STREAMS = StreamConfig(
  num_streams=3,
  num_stream_layers=2,
  mode="lossless",
  lora_rank=4,
  prune_rank=0,
)
COUNT = 64
SHORT = ("llama",)
TREES = TreeSpec("best_first", 9), TreeSpec("cartesian", width=2)


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
  """-> (directory, torch model); one family in shards."""
  path = tmp_path_factory.mktemp("hf") / "checkpoint"
  shard = "40KB" if request.param == "qwen3" else "5GB"
  model = hf_models.make(request.param, path, shard=shard)
  if request.param == "qwen3":
    assert len(list(path.glob("*.safetensors"))) > 1
  return path, model


@jax.jit
def _logits(model, tokens):
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  mask = causal_mask(jnp.ones_like(tokens))
  return model.logits(forward(model, tokens, order, mask).main)


def logits(model, tokens):
  return np.asarray(_logits(model, jnp.asarray(tokens, jnp.int32)))


def close(ours, theirs, limit=1e-4):
  """Largest difference at each position, relative to its largest logit."""
  error = np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)
  return error.max() < limit


def prompts(count=8):
  rng = np.random.default_rng(3)
  return [
    rng.integers(3, VOCAB, rng.integers(2, 40)).tolist() for _ in range(count)
  ]


def with_random_streams(path):
  """The checkpoint with streams whose weights are random, not fresh: fresh
  adapters do nothing."""
  config = hf_config.read_config(path, streams=STREAMS)
  values = weights.to_weights(checkpoint.load(path, config))
  rng = np.random.default_rng(0)
  for name in sorted(weights.adapters(config)):
    noise = rng.normal(0, 0.2, values[name].shape)
    values[name] = jnp.asarray(noise, values[name].dtype)
  return weights.to_model(config, values)


def test_logits_are_those_of_transformers(made):
  path, torch_model = made
  model = checkpoint.load(path)
  tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 80))
  assert close(logits(model, tokens), hf_models.logits(torch_model, tokens))


# Minutes of compiling: the families whose layers differ most, and then all.
@pytest.mark.parametrize(
  "made",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in SHORT))
    for name in CASES
  ],
  indirect=True,
)
def test_tokens_are_those_of_transformers(made):
  path, torch_model = made
  model = checkpoint.load(path)
  texts = prompts()
  if model.config.rope_scaling.kind == "longrope":
    # transformers turns by other angles once a request grows long, and keeps
    # keys that were turned by the old ones: begin beyond that point.
    texts = [(text * 30)[:30] for text in texts]
  want = [hf_models.greedy(torch_model, text, COUNT) for text in texts]
  plain = generate(model, texts, NoDraft(), max_new_tokens=COUNT)
  assert [x.token_ids for x in plain] == want
  streams = with_random_streams(path)
  for tree in TREES[: 2 if model.config.sliding_layers else 1]:
    fast = generate(streams, texts, StreamDraft(tree), max_new_tokens=COUNT)
    assert [x.token_ids for x in fast] == want
  assert sum(sum(x.accepts[1:]) for x in fast) > 0


def test_short_factors_serve_models_of_few_positions(tmp_path):
  torch_model = hf_models.make("phi3", tmp_path)
  few = hf_config.read_config(tmp_path, max_positions=24)
  tokens = np.random.default_rng(0).integers(3, VOCAB, (2, 24))
  want = hf_models.logits(torch_model, tokens)
  assert close(logits(checkpoint.load(tmp_path, few), tokens), want)
  assert not close(logits(checkpoint.load(tmp_path), tokens), want)


@pytest.mark.parametrize("name", CASES)
def test_keys_of_version_4_mean_the_same(name, tmp_path):
  """Our own config.json has the older keys: both ways give one model."""
  model_type, _ = CASES[name]
  torch_model = hf_models.make(name, tmp_path)
  config = hf_config.read_config(tmp_path)
  found, values = hf_config.describe(config, prefer=model_type)
  assert found == model_type and "rope_parameters" not in values
  values |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert hf_config.read_config(tmp_path) == config
  from transformers import AutoModelForCausalLM

  again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 40))
  before = hf_models.logits(torch_model, tokens)
  assert np.array_equal(hf_models.logits(again, tokens), before)


def test_bfloat16_weights_stay_as_they_are(tmp_path):
  import torch

  model = hf_models.make("llama", tmp_path)
  model.to(torch.bfloat16).save_pretrained(tmp_path)
  config = hf_config.read_config(tmp_path)
  assert config.dtype == config.param_dtype == "bfloat16"
  ours = weights.to_weights(checkpoint.load(tmp_path, config))
  table = model.get_input_embeddings().weight.detach().float().numpy()
  assert ours["embed/table"].dtype == jnp.bfloat16
  assert np.array_equal(np.asarray(ours["embed/table"], np.float32), table)
  wide = hf_config.read_config(tmp_path, dtype="float32", param_dtype="float32")
  tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 40))
  model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
  want = hf_models.logits(model, tokens)
  assert close(logits(checkpoint.load(tmp_path, wide), tokens), want)


def test_streams_do_not_change_the_shape_of_the_base(tmp_path):
  hf_models.make("gemma2", tmp_path)
  config = hf_config.read_config(tmp_path, streams=STREAMS)
  plain = dataclasses.replace(config, streams=hf_config.NO_STREAMS)
  assert checkpoint.base_shapes(config) == checkpoint.base_shapes(plain)
