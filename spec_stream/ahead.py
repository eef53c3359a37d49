"""Programs of the library compiled for devices that need not be here.

Weights and batches are shapes without values, so a 7B model needs no memory
here; what a program needs is what its compiler says of it.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spec_stream import (
  UserError,
  decode,
  roofline,
  sampling,
  sharding,
  weights,
)
from spec_stream.drafters.base import Drafter, Params
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import merge_lora
from spec_stream.train import config as train_config
from spec_stream.train import losses
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig
from spec_stream.train.losses import LossConfig
from spec_stream.train.step import make_step

TARGET_HELP = (
  "what to compile for: cpu, or tpu:TOPOLOGY (such as tpu:v5p:2x2x1), which "
  "needs `pip install libtpu` but no TPU"
)


# For libtpu: there is no TPU to ask, nor one that two processes may not hold;
# the kind and the host are what it would else look for, and complain.
_NO_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def make_mesh(target: str, sizes: tuple[int, int, int] | None = None) -> Mesh:
  """A mesh of the target's devices, with the axes of the library.

  sizes: of data, fsdp and tensor, one of which may be -1; None: one device.

  Raises: UserError if there is no compiler for the target, or the sizes are not
    those of its devices.
  """
  if target == "cpu":
    devices = jax.devices("cpu")
  elif target.startswith("tpu:"):
    for name, value in _NO_TPU.items():
      os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for devices that are not here cannot be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)
    name = target.removeprefix("tpu:")
    # JAX wants one device a chip; by default a v4 has one for each core.
    cores = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
      topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name, **cores
      )
    except Exception as e:  # libtpu raises what it likes
      reason = " ".join(str(e).split())[:200]
      raise UserError(f"no compiler for --target={target}: {reason}") from e
    devices = topology.devices
  else:
    raise UserError(f"--target={target}: use cpu or tpu:TOPOLOGY")
  if sizes is None:
    devices, sizes = devices[:1], (1, 1, 1)
  return sharding.make_mesh(*sizes, devices=devices)


def abstract_batch(mesh: Mesh, rows: int, seq_len: int, stream_positions: int):
  """As of `data.pipeline`: B rows of T tokens, U of them with streams."""
  place = sharding.batch_sharding(mesh)
  array = lambda size, dtype: jax.ShapeDtypeStruct(
    (rows, size), dtype, sharding=place
  )
  ids = ("tokens", "segment_ids", "positions")
  return {name: array(seq_len, jnp.int32) for name in ids} | {
    "loss_mask": array(seq_len, jnp.bool_),
    "stream_at": array(stream_positions, jnp.int32),
    "stream_mask": array(stream_positions, jnp.bool_),
  }


def kept(model: ModelConfig, config: LossConfig, batch) -> int:
  """Bytes that the forward pass keeps for the backward pass, beside weights.

  What the program asks for, before any compiler: all weights trained.
  """

  def backward(values, batch):
    loss = lambda x: losses.loss(weights.to_model(model, x), batch, config)
    return jax.vjp(loss, values, has_aux=True)[
      1
    ]  # its leaves are what it keeps

  shapes = weights.shapes(model)
  return num_bytes(jax.eval_shape(backward, shapes, batch)) - num_bytes(shapes)


def train_step(
  model: ModelConfig,
  train: TrainConfig,
  mesh: Mesh,
  *,
  rows: int,
  seq_len: int,
  stream_positions: int,
):
  """-> (compiled step, abstract state and batch, as `fit` has them, FLOPs)."""
  model = train_config.resolve(model, train)
  train_config.check_segment(train.segment, seq_len, stream_positions)
  found = []

  def init():
    state, shardings = states.init(model, train, mesh)
    found.append(shardings)
    return state

  state = jax.eval_shape(init)
  state = jax.tree.map(_placed, state, found[0])
  batch = abstract_batch(mesh, rows, seq_len, stream_positions)
  step = make_step(model, train, mesh, found[0])
  compiled = step.lower(state, batch).compile()
  return compiled, state, batch, roofline.flops(step, state, batch)


def decoding(
  model: ModelConfig,
  drafter: Drafter,
  mesh: Mesh,
  *,
  slots: int,
  prompt: int,
  batch: int = 1,
):
  """-> (compiled prefill and loop, abstract weights by path, abstract state,
  FLOPs of one step).

  As in `decode.Decoder` with all slots, but for kernels that lie as they are
  trained (see `transformer.lay_out`): adapters of shared mode are folded in,
  weights lie by the rules of `sharding`, and the state where prefill leaves it.
  Prompts of `prompt` tokens; what is left of the cache's slots is for new ones.
  """
  drafter = drafter.resolve(model)
  graphs = []

  def folded(values):
    target = merge_lora(weights.to_model(model, values))
    decode.suit(target, list(mesh.devices.flat))
    params = Params(target)
    graphs.append(decode.Graph.split(params)[0])
    return nnx.state(params)

  here = lambda tree: jax.tree.map(
    lambda x: _placed(x, NamedSharding(mesh, P())), tree
  )
  named = _by_rule(jax.eval_shape(folded, weights.shapes(model)), mesh)
  graph, values = graphs[0], jax.tree.leaves(named)  # in one order
  num_new = slots - prompt - drafter.longest
  if min(prompt, num_new) < 1:
    raise UserError(f"a cache of {slots} slots has no room for new tokens")
  numbers = np.zeros(batch, np.int32)
  args = np.zeros((batch, prompt), np.int32), numbers, numbers, numbers[:1]
  args = here((*args, None, jax.eval_shape(lambda: sampling.make(batch))))
  prefill = lambda values, *args: decode._prefill(
    graph, values, drafter, slots, num_new, *args
  )
  first = decode._prefill.lower(graph, values, drafter, slots, num_new, *args)
  first = first.compile()
  state = jax.tree.map(
    _placed, jax.eval_shape(prefill, values, *args), first.output_shardings
  )
  loop = decode._loop.lower(graph, values, drafter, state)
  by_path = {
    _path(path): variable.get_value()
    for path, variable in nnx.to_flat_state(named)
  }
  step = lambda values, state: decode._step(graph, values, drafter, state)
  flops = roofline.flops(step, values, state)
  return first, loop.compile(), by_path, state, flops


def _path(keys) -> str:
  """A weight's path, below the target in `Params`."""
  return "/".join(map(str, keys[1:]))


def _by_rule(values, mesh: Mesh):
  """Abstract weights of `Params`, placed by the rules of `sharding`."""
  flat = nnx.to_flat_state(values)
  shapes = {_path(path): variable.get_value() for path, variable in flat}
  place = sharding.weight_shardings(mesh, shapes)
  put = lambda path, x: x.replace(_placed(x.get_value(), place[_path(path)]))
  return nnx.map_state(put, values)


def _placed(x, place) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def num_bytes(tree) -> int:
  """Of all arrays of a tree, from their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory(compiled) -> dict[str, int]:
  """Bytes of a program: what XLA's buffer assignment says of one device.

  arguments, outputs: held by the caller; aliased: outputs that take the place
  of donated arguments; temporaries: held during the call; total: of all.
  """
  stats = compiled.memory_analysis()
  parts = {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "aliased": stats.alias_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
  }
  kept = parts["outputs"] - parts["aliased"]
  return parts | {"total": parts["arguments"] + kept + parts["temporaries"]}
