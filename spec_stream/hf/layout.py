"""How tensors of a Hugging Face checkpoint become weights here, and back.

A family's table says for each weight which tensors make it up:

    "blocks/{}/attention/qkv/kernel": heads(
        "model.layers.{}.self_attn.{}.weight", "q_proj k_proj v_proj")

There a linear map is [out, in], here [*in, *out], and projections of the same
input stand side by side in one kernel (`models.lora.Linear`). Both ways only
move numbers, so that export and import give the same bits.

Letters: N query heads, K key/value heads, G = N/K, H head size, D width.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from spec_stream.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Layout:
  """tensors: names, with {} for the layer; kind: same, linear or heads."""

  tensors: tuple[str, ...]
  kind: str

  def names(self, layer: str) -> list[str]:
    return [name.replace("{}", layer) for name in self.tensors]


def same(tensor: str) -> Layout:
  """The same array."""
  return Layout((tensor,), "same")


def linear(tensor: str, parts: str = "") -> Layout:
  """One or more [out, in] with the same in, their outputs side by side."""
  return Layout(_names(tensor, parts), "linear")


def heads(tensor: str, parts: str = "") -> Layout:
  """Queries, keys and values, or one tensor with all three below each other."""
  return Layout(_names(tensor, parts), "heads")


def _names(tensor: str, parts: str) -> tuple[str, ...]:
  if not parts:
    return (tensor,)
  before, after = tensor.rsplit("{}", 1)
  return tuple(before + part + after for part in parts.split())


def shapes(
  layout: Layout, config: ModelConfig, path: str, shape: Sequence[int]
) -> list[tuple[int, ...]]:
  """Shapes of the tensors that make up the weight `path` of `shape`."""
  if layout.kind == "same":
    return [tuple(shape)]
  inputs = () if path.endswith("bias") else (_inputs(config, path, shape),)
  outputs = math.prod(shape) // math.prod(inputs)
  if layout.kind == "heads" and len(layout.tensors) == 3:
    query = config.num_heads * config.head_dim
    key = config.num_kv_heads * config.head_dim
    return [(rows, *inputs) for rows in (query, key, key)]
  count = len(layout.tensors)
  return [(outputs // count, *inputs)] * count


def _inputs(config: ModelConfig, path: str, shape: Sequence[int]) -> int:
  if path.endswith("attention/out/kernel"):
    return config.num_heads * config.head_dim
  return shape[0]


def pack(
  layout: Layout,
  config: ModelConfig,
  path: str,
  shape: Sequence[int],
  dtype,
  tensors: Sequence[np.ndarray],
) -> np.ndarray:
  """Tensors -> the weight, cast to dtype. One copy of the weight is made."""
  out = np.empty(shape, dtype)
  if layout.kind == "same":
    out[...] = tensors[0]
    return out
  rows = 1 if path.endswith("bias") else _inputs(config, path, shape)
  flat = out.reshape(rows, -1)  # [in, out], a view
  if layout.kind == "heads":
    views = _head_views(flat, config)
    if len(tensors) == 1:
      tensors = np.split(tensors[0], _bounds(config))
    for view, x in zip(views, tensors, strict=True):
      view[...] = x.reshape(*view.shape[1:], rows).transpose(3, 0, 1, 2)
    return out
  at = 0
  for x in tensors:
    flat[:, at : at + x.shape[0]] = x.reshape(x.shape[0], rows).T
    at += x.shape[0]
  return out


def unpack(
  layout: Layout, config: ModelConfig, path: str, weight: np.ndarray
) -> list[np.ndarray]:
  """The inverse of `pack`, in the weight's own dtype."""
  if layout.kind == "same":
    return [weight]
  found = shapes(layout, config, path, weight.shape)
  rows = 1 if path.endswith("bias") else found[0][1]
  flat = weight.reshape(rows, -1)
  if layout.kind == "heads":
    parts = [
      view.transpose(1, 2, 3, 0).reshape(-1, rows)
      for view in _head_views(flat, config)
    ]
    if len(layout.tensors) == 1:
      parts = [np.concatenate(parts)]
  else:
    bounds = np.cumsum([shape[0] for shape in found])[:-1]
    parts = [part.T for part in np.split(flat, bounds, 1)]
  return [
    np.ascontiguousarray(part).reshape(shape)
    for part, shape in zip(parts, found, strict=True)
  ]


def _head_views(flat: np.ndarray, config: ModelConfig):
  """Views [in, K, G or 1, H] of queries, keys and values in [in, out]."""
  groups = config.groups
  x = flat.reshape(len(flat), config.num_kv_heads, groups + 2, config.head_dim)
  return x[:, :, :groups], x[:, :, groups : groups + 1], x[:, :, groups + 1 :]


def _bounds(config: ModelConfig) -> tuple[int, int]:
  query = config.num_heads * config.head_dim
  return query, query + config.num_kv_heads * config.head_dim
