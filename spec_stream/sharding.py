"""The mesh, and where each weight lies on it.

Axes: `data`, rows of the batch; `fsdp`, rows of the batch, and every weight is
split over it at rest; `tensor`, heads, hidden units and vocabulary. All of one
size is one device. XLA inserts the communication (`jax.jit` with shardings).
"""

import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spec_stream.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Each weight's path matches exactly one rule. Shapes: see `models`; K, the
# key/value heads, F and V are split over `tensor`, the width D over `fsdp`. The
# embedding is split by rows alone: a lookup in split columns would spread D
# over fsdp in all that follows, against the batch, which lies there.
_BLOCK = r"(blocks/\d+|drafter/block)"
RULES = (
  (r"embed/table", P(("fsdp", "tensor"), None)),
  (r"positions/table", P()),
  (r"head/kernel", P("fsdp", "tensor")),
  (r"head/bias", P("tensor")),
  (rf"({_BLOCK}/(attention/)?)?\w+_norm/(scale|bias)", P()),
  (rf"{_BLOCK}/attention/qkv/kernel", P("fsdp", "tensor", None, None)),
  # Of quantised kernels, [tiles, *out]: see `models.quant`.
  (rf"{_BLOCK}/attention/qkv/kernel_scale", P(None, "tensor", None, None)),
  (rf"{_BLOCK}/ffw/gate_up/kernel_scale", P(None, None, "tensor")),
  (rf"{_BLOCK}/(attention/out|ffw/down)/kernel_scale", P(None, "fsdp")),
  (rf"{_BLOCK}/attention/qkv/bias", P("tensor", None, None)),
  (rf"{_BLOCK}/(attention/out|ffw/down)/bias", P()),
  (rf"{_BLOCK}/ffw/gate_up/bias", P(None, "tensor")),
  (rf"{_BLOCK}/attention/qkv/lora_a", P("fsdp", None)),
  (rf"{_BLOCK}/attention/qkv/lora_b", P(None, "tensor", None, None)),
  (rf"{_BLOCK}/attention/out/kernel", P("tensor", None, None, "fsdp")),
  (rf"{_BLOCK}/attention/out/lora_a", P("tensor", None, None, None)),
  (rf"{_BLOCK}/ffw/gate_up/kernel", P("fsdp", None, "tensor")),
  (rf"{_BLOCK}/ffw/gate_up/lora_a", P("fsdp", None)),
  (rf"{_BLOCK}/ffw/gate_up/lora_b", P(None, None, "tensor")),
  (rf"{_BLOCK}/ffw/down/kernel", P("tensor", "fsdp")),
  (rf"{_BLOCK}/ffw/down/lora_a", P("tensor", None)),
  (rf"{_BLOCK}/(attention/out|ffw/down)/lora_b", P(None, "fsdp")),
  (r"streams/(embed|map_a|map_b|correct_a|correct_b)", P()),
  (r"pruner/[ab]", P()),
  # Of drafters: matrices [in, out], of several heads [heads, in, out].
  (r"drafter/\w+_bias", P()),
  (r"drafter/\w+_kernel", P("fsdp", "tensor")),
  (r"drafter/\w+_kernels", P(None, "fsdp", "tensor")),
)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None
) -> Mesh:
  """The mesh of the devices, by default all; one axis may be -1, "what is
  left".

  Raises: UserError if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  filled = sizes(data, fsdp, tensor, len(devices))
  # In the order of the slice, so that neighbours of an axis are neighbours
  # where they can be: an axis of 8 fits no side of a 4x4.
  placed = mesh_utils.create_device_mesh(
    filled, devices, allow_split_physical_axes=True
  )
  # Auto: XLA places what is between. The default, Explicit, asks the model to.
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(data: int, fsdp: int, tensor: int, devices: int):
  """-> (data, fsdp, tensor) of a mesh of so many devices; see `make_mesh`."""
  sizes = dict(zip(AXES, (data, fsdp, tensor)))
  asked = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
  if list(sizes.values()).count(-1) > 1 or any(
    size < 1 and size != -1 for size in sizes.values()
  ):
    raise UserError(f"{asked}: use sizes of 1 or more, and -1 at most once")
  rest = devices // max(-int(np.prod(list(sizes.values()))), 1)
  filled = tuple(rest if size == -1 else size for size in sizes.values())
  if np.prod(filled) != devices:
    raise UserError(
      f"{asked} does not fit {devices} device(s): the sizes must multiply to "
      f"{devices}"
    )
  return filled


def spec(path: str) -> P:
  """The rule of one weight."""
  found = [rule for pattern, rule in RULES if re.fullmatch(pattern, path)]
  if len(found) != 1:
    raise ValueError(f"{len(found)} sharding rules match {path}, not one")
  return found[0]


def weight_shardings(mesh: Mesh, shapes: dict) -> dict[str, NamedSharding]:
  """Sharding of each weight, given {path: array or ShapeDtypeStruct}.

  Raises: UserError if an axis does not divide the dimension it splits.
  """
  shardings = {}
  for path, leaf in shapes.items():
    rule = spec(path)
    for dimension, axes in zip(leaf.shape, rule):
      for axis in axes if isinstance(axes, tuple) else (axes,):
        size = mesh.shape[axis] if axis else 1
        if dimension % size:
          raise UserError(_uneven(path, axis, dimension, size))
        dimension //= size
    shardings[path] = NamedSharding(mesh, rule)
  return shardings


def _uneven(path: str, axis: str, dimension: int, size: int) -> str:
  name = f"model.width={dimension}"
  if path.startswith("drafter/") and axis == "tensor":
    name = f"{path}, {dimension} wide"
  elif path == "embed/table" or (path.startswith("head/") and axis == "tensor"):
    name = f"the vocabulary ({dimension} rows of it)"
  elif axis == "tensor" and "/attention/" in path:
    name = f"model.num_kv_heads={dimension}"
  elif axis == "tensor":
    name = f"model.ffw_dim={dimension}"
  return f"mesh.{axis}={size} must divide {name}, which it splits"


def tree_shardings(mesh: Mesh, tree, by_path: dict[str, NamedSharding]):
  """Shardings of a tree that mirrors the weights, as an optimizer's state.

  A leaf below a key that is a weight's path lies as that weight does; any other
  (a count) is on every device.
  """

  def place(keys, leaf):
    names = [getattr(key, "key", None) for key in keys]
    found = [by_path[name] for name in names if name in by_path]
    return found[-1] if found else NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over data and fsdp."""
  return NamedSharding(mesh, P(("data", "fsdp")))


def check_batch(mesh: Mesh, rows: int, accumulate: int = 1):
  """Raises UserError unless each device gets as many rows, each microbatch."""
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % (parts * accumulate):
    raise UserError(
      f"data.batch_size={rows} must be a multiple of {parts * accumulate}: "
      f"mesh.data * mesh.fsdp = {parts}, train.accumulate = {accumulate}"
    )
