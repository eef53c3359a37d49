"""A model's weights as a flat dict: path -> array.

    blocks/0/attention/qkv/kernel   [D, K, G+2, H]
    streams/embed                   [J, D]

Training, sharding rules and checkpoints know weights by these paths; `to_model`
puts them back into a module inside or outside `jax.jit`.
"""

import functools

import jax
from flax import nnx

from spec_stream.models.config import ModelConfig
from spec_stream.models.lora import LoRAParam
from spec_stream.models.prune import PruneParam
from spec_stream.models.streams import StreamParam
from spec_stream.models.transformer import Transformer

Weights = dict[str, jax.Array]

# What adapter training trains; every other weight is the base model's.
ADAPTERS = (LoRAParam, StreamParam, PruneParam)


def _join(path) -> str:
  return "/".join(map(str, path))


def to_weights(model: Transformer) -> Weights:
  """The weights of a model, by path."""
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {_join(path): variable[...] for path, variable in state}


def init(config: ModelConfig, seed: int) -> Weights:
  """Fresh weights; to be traced by `jax.jit` or `jax.eval_shape`."""
  return to_weights(Transformer(config, rngs=nnx.Rngs(seed)))


@functools.cache
def _template(config: ModelConfig):
  """The model's structure and its variables without values."""
  model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
  graph, state = nnx.split(model)
  return graph, tuple(nnx.to_flat_state(state))


def shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each weight; computes nothing."""
  return {_join(path): v.get_value() for path, v in _template(config)[1]}


def paths(config: ModelConfig, *kinds) -> frozenset[str]:
  """Paths of the weights of these parameter types."""
  state = _template(config)[1]
  return frozenset(_join(path) for path, v in state if isinstance(v, kinds))


def to_model(config: ModelConfig, weights: Weights) -> Transformer:
  """The model that holds exactly these weights."""
  graph, state = _template(config)
  named = [(path, _join(path), v) for path, v in state]
  if {name for _, name, _ in named} != set(weights):
    raise ValueError("these are not the weights of a model of this config")
  filled = [(path, v.replace(weights[name])) for path, name, v in named]
  return nnx.merge(graph, nnx.from_flat_state(filled))
