"""Tiny random checkpoints, made by transformers on the spot, one per family."""

import pathlib

import numpy as np

VOCAB = 97
BASE = dict(
  vocab_size=VOCAB,
  hidden_size=32,
  num_hidden_layers=4,
  num_attention_heads=4,
  max_position_embeddings=256,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
_GROUPED = dict(intermediate_size=48, num_key_value_heads=2)
_LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=500.0,
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
)
_LONG = dict(
  rope_type="longrope",
  rope_theta=100.0,
  short_factor=[1.0, 1.1, 1.2, 1.5],
  long_factor=[1.0, 1.5, 2.0, 3.0],
  original_max_position_embeddings=24,
)
_GEMMA = dict(
  **_GROUPED, head_dim=16, sliding_window=9, query_pre_attn_scalar=12
)
# What each family has of its own is on, where it is an option.
CASES = {
  "llama": ("llama", _GROUPED),
  "llama, biases, llama3": (
    "llama",
    dict(
      **_GROUPED, attention_bias=True, mlp_bias=True, rope_parameters=_LLAMA3
    ),
  ),
  "mistral": ("mistral", dict(**_GROUPED, sliding_window=11)),
  "qwen2": (
    "qwen2",
    dict(
      **_GROUPED,
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=10,
      max_window_layers=2,
    ),
  ),
  "qwen3": (
    "qwen3",
    dict(
      **_GROUPED,
      head_dim=16,
      rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=1e4),
    ),
  ),
  "phi": ("phi", _GROUPED),
  "phi3": (
    "phi3",
    dict(
      **_GROUPED,
      rope_parameters=_LONG,
      original_max_position_embeddings=24,
      sliding_window=20,
    ),
  ),
  "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
  "gemma2": ("gemma2", _GEMMA),
  "gemma3": (
    "gemma3_text",
    dict(
      **_GEMMA,
      layer_types=["sliding_attention", "full_attention"] * 2,
      rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e4),
        "sliding_attention": dict(rope_type="default", rope_theta=100.0),
      },
    ),
  ),
}


def make(name: str, directory: pathlib.Path, shard="5GB", **changes):
  """Writes a checkpoint; -> the torch model in it, weights far from trivial."""
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  model_type, own = CASES[name]
  config = AutoConfig.for_model(model_type, **{**BASE, **own, **changes})
  torch.manual_seed(len(name))
  model = AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for weight in model.parameters():
      weight.add_(torch.randn_like(weight) * 0.15)
  model.generation_config.eos_token_id = None  # 64 tokens, whatever they are
  model.save_pretrained(directory, max_shard_size=shard)
  return model


def logits(model, tokens) -> np.ndarray:
  """[B, T] -> [B, T, V] of a torch model."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def greedy(model, prompt, count: int) -> list[int]:
  """Greedy continuation of one prompt by transformers' own generate."""
  import torch

  ids = torch.tensor([list(prompt)])
  with torch.no_grad():
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=count,
      min_new_tokens=count,
      do_sample=False,
      pad_token_id=0,
    )
  return out[0, ids.shape[1] :].tolist()
