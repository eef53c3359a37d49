"""A model's weights as a flat dict: path -> array.

    blocks/0/attention/qkv/kernel   [D, K, G+2, H]
    streams/embed                   [J, D]

Training, sharding rules and checkpoints know weights by these paths; `to_model`
puts them back into a module inside or outside `jax.jit`.
"""

import functools

import jax
from flax import nnx

from spec_stream.drafters import registry
from spec_stream.models.config import ModelConfig
from spec_stream.models.lora import LoRAParam
from spec_stream.models.prune import PruneParam
from spec_stream.models.streams import StreamParam
from spec_stream.models.transformer import Transformer

Weights = dict[str, jax.Array]

ADAPTERS = (LoRAParam, StreamParam, PruneParam)

_DRAFTER = "drafter/"


def _join(path) -> str:
  return "/".join(map(str, path))


def to_weights(model: Transformer) -> Weights:
  """The weights of a model, by path."""
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {_join(path): variable[...] for path, variable in state}


def build(config: ModelConfig, seed: int) -> Transformer:
  """A fresh model, with the weights of the config's drafter if it has one."""
  model = Transformer(config, rngs=nnx.Rngs(seed))
  model.drafter = nnx.data(registry.make_module(config, nnx.Rngs(seed + 1)))
  return model


def init(config: ModelConfig, seed: int) -> Weights:
  """Fresh weights; to be traced by `jax.jit` or `jax.eval_shape`."""
  return to_weights(build(config, seed))


@functools.cache
def _template(config: ModelConfig):
  """The model's structure and its variables without values."""
  model = nnx.eval_shape(lambda: build(config, 0))
  graph, state = nnx.split(model)
  return graph, tuple(nnx.to_flat_state(state))


def shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of each weight; computes nothing."""
  return {_join(path): v.get_value() for path, v in _template(config)[1]}


def paths(config: ModelConfig, *kinds) -> frozenset[str]:
  """Paths of the weights of these parameter types."""
  state = _template(config)[1]
  return frozenset(_join(path) for path, v in state if isinstance(v, kinds))


def of_drafter(config: ModelConfig) -> frozenset[str]:
  """Paths of the weights of the drafter beside the target."""
  return frozenset(path for path in shapes(config) if path.startswith(_DRAFTER))


def adapters(config: ModelConfig) -> frozenset[str]:
  """Paths of what adapter training trains; all others are the base model's."""
  return paths(config, *ADAPTERS) | of_drafter(config)


def to_model(config: ModelConfig, weights: Weights) -> Transformer:
  """The model that holds exactly these weights."""
  graph, state = _template(config)
  named = [(path, _join(path), v) for path, v in state]
  if {name for _, name, _ in named} != set(weights):
    raise ValueError("these are not the weights of a model of this config")
  filled = [(path, v.replace(weights[name])) for path, name, v in named]
  return nnx.merge(graph, nnx.from_flat_state(filled))
