"""Hugging Face checkpoint directories: their weights in.

    config.json                       which model: see `config`
    model.safetensors                 the weights, or shards of them with
    model.safetensors.index.json      tensor -> shard
    streams.json, streams.safetensors what `export` adds: streams and adapters

Weights are read one after the other, cast, and put on their device at once: the
host holds one weight beside what is placed, never a shard.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from spec_stream import sharding, weights
from spec_stream.errors import UserError
from spec_stream.hf import layout
from spec_stream.hf.config import own_streams, read_config, read_json
from spec_stream.hf.families import BY_TYPE
from spec_stream.models import quant
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer
from spec_stream.weights import Weights

INDEX = "model.safetensors.index.json"
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # old files: no weights
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LISTED = 8  # names that an error lists


# -- tensors -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Where the tensors of a checkpoint lie, by name."""

  files: dict[str, pathlib.Path]
  shapes: dict[str, tuple[int, ...]]

  def read(self, name: str) -> np.ndarray:
    with _opened(self.files[name]) as file:
      return file.get_tensor(name)


@contextlib.contextmanager
def _opened(path: pathlib.Path):
  import safetensors

  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      yield file
  except safetensors.SafetensorError as e:
    raise UserError(
      f"{path} cannot be read ({e}): it is damaged or was cut short; copy it "
      "again"
    ) from e
  except OSError as e:
    raise UserError(f"{path}: {e}") from e


def find_tensors(directory) -> Tensors:
  """All tensors of the weight files. Raises: UserError."""
  directory = pathlib.Path(directory)
  files, shapes = {}, {}
  for path in _weight_files(directory):
    with _opened(path) as file:
      for name in file.keys():
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
          raise UserError(
            f"{path}: {name} is {part.get_dtype()}, not one of "
            f"{', '.join(_DTYPES)}: quantised checkpoints are not read"
          )
        # Files of the bare model lack the prefix.
        known = name.startswith(("model.", "lm_head."))
        files[name if known else f"model.{name}"] = path
        shapes[name if known else f"model.{name}"] = tuple(part.get_shape())
  return Tensors(files, shapes)


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
  index = directory / INDEX
  if index.is_file():
    try:
      names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as e:
      raise UserError(f"{index} has no weight_map of tensors to files") from e
    for name in names:
      if not (directory / str(name)).is_file():
        raise UserError(
          f"{index} names {name}, which is not in {directory}: the checkpoint "
          "is incomplete"
        )
    return [directory / name for name in names]
  if (directory / "model.safetensors").is_file():  # whatever is beside it
    return [directory / "model.safetensors"]
  found = [
    path
    for path in sorted(directory.glob("*.safetensors"))
    if path.name != "streams.safetensors"
  ]
  if not found:
    other = sorted(path.name for path in directory.glob("*.bin"))
    hint = f" (it has {other[0]}: convert it to safetensors)" if other else ""
    raise UserError(f"{directory} holds no *.safetensors weights{hint}")
  return found


# -- weights -----------------------------------------------------------------


def table_of(directory) -> dict[str, layout.Layout]:
  """The table of a checkpoint's family."""
  model_type = read_json(pathlib.Path(directory) / "config.json")["model_type"]
  return BY_TYPE[model_type].TABLE


def entry(table, path: str) -> tuple[layout.Layout, str]:
  """-> (layout, layer) of a weight's path; KeyError if no row names it."""
  found = re.fullmatch(r"blocks/(\d+)/(.*)", path)
  if found:
    return table["blocks/{}/" + found[2]], found[1]
  return table[path], ""


def read_weights(
  directory, config: ModelConfig, mesh: Mesh | None = None
) -> Weights:
  """The base weights of `config`, by path, on the mesh or the first device.

  Raises:
    UserError: no weights, damaged ones, tensors missing or unexpected (listed),
      or of another shape than config.json says.
  """
  wanted = base_shapes(config)
  table, tensors = table_of(directory), find_tensors(directory)
  parts = {}
  for path in wanted:
    try:
      parts[path], layer = entry(table, path)
    except KeyError as e:
      raise UserError(f"{directory}: this family has no weight {path}") from e
    parts[path] = dataclasses.replace(
      parts[path], tensors=tuple(parts[path].names(layer))
    )
  _check_names(directory, config, parts, tensors)
  place = _places(wanted, mesh)
  found = {}
  for path, x in wanted.items():
    shapes = layout.shapes(parts[path], config, path, x.shape)
    for name, shape in zip(parts[path].tensors, shapes, strict=True):
      if tensors.shapes[name] != shape:
        raise UserError(
          f"{tensors.files[name]}: {name} is {_by(tensors.shapes[name])}, but "
          f"config.json makes it {_by(shape)}"
        )
    values = [tensors.read(name) for name in parts[path].tensors]
    values = layout.pack(parts[path], config, path, x.shape, x.dtype, values)
    found |= quantised({path: jax.device_put(values, place[path])}, config)
  return found


def base_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of all weights but the streams' and the adapters', before any is
  quantised."""
  config = dataclasses.replace(config, quantize="")
  added = weights.adapters(config)
  every = weights.shapes(config)
  return {path: x for path, x in every.items() if path not in added}


def quantised(values: Weights, config: ModelConfig) -> Weights:
  """The weights with kernels in config.quantize, those that are not yet."""
  out = {}
  for path, x in values.items():
    if (
      not config.quantize
      or not quant.is_quantised(path)
      or x.dtype == config.quantize
    ):
      out[path] = x
      continue
    inputs = 3 if path.endswith("attention/out/kernel") else 1
    make = jax.jit(quant.quantise, static_argnums=(1, 2))
    out[path], out[f"{path}_scale"] = make(x, inputs, config.quantize)
  return out


def _by(shape) -> str:
  return " x ".join(map(str, shape)) or "a scalar"


def _places(shapes, mesh: Mesh | None):
  if mesh is None:
    return dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
  return sharding.weight_shardings(mesh, shapes)


def _check_names(directory, config, parts, tensors: Tensors):
  wanted = {name for part in parts.values() for name in part.tensors}
  there = {name for name in tensors.files if not _BUFFERS.fullmatch(name)}
  if config.tie_embeddings:  # some files hold the tied copy as well
    there.discard("lm_head.weight")
  for words, names in (
    ("lacks", wanted - there),
    ("has, beyond its config.json,", there - wanted),
  ):
    if names:
      shown = sorted(names)[:_LISTED]
      rest = f" and {len(names) - _LISTED} more" * (len(names) > _LISTED)
      raise UserError(
        f"{directory} {words} {len(names)} tensor(s): {', '.join(shown)}{rest}"
      )


def load(
  directory, config: ModelConfig | None = None, mesh: Mesh | None = None
) -> Transformer:
  """The model of a checkpoint, with the streams that came with it.

  config: of `read_config`; its streams are fresh where the checkpoint has none
  configured alike.

  Raises: UserError.
  """
  config = config or read_config(directory)
  found = read_weights(directory, config, mesh)
  found |= read_added(directory, config, mesh)
  rest = {p: x for p, x in weights.shapes(config).items() if p not in found}
  if rest:
    place = _places(rest, mesh)
    fresh = jax.jit(lambda: weights.init(config, 0))()
    found |= {path: jax.device_put(fresh[path], place[path]) for path in rest}
  return weights.to_model(config, found)


def read_added(
  directory, config: ModelConfig, mesh: Mesh | None = None
) -> Weights:
  """Streams and adapters that came with a checkpoint, by path; none if there
  are none, or if they are configured otherwise. Raises: UserError."""
  directory = pathlib.Path(directory)
  if own_streams(directory) != config.streams:
    return {}
  names = weights.paths(config, *weights.ADAPTERS)
  shapes = {p: x for p, x in weights.shapes(config).items() if p in names}
  place = _places(shapes, mesh)
  return {
    path: jax.device_put(x, place[path])
    for path, x in _read_streams(directory, shapes)
  }


def _read_streams(directory, shapes) -> Iterator[tuple[str, np.ndarray]]:
  """Streams and adapters as `export` wrote them, under their own paths."""
  path = directory / "streams.safetensors"
  if not path.is_file():
    raise UserError(f"{directory} has a streams.json but no {path.name}")
  with _opened(path) as file:
    names = set(file.keys())
    if names != set(shapes):
      odd = ", ".join(sorted(names ^ set(shapes))[:_LISTED])
      raise UserError(f"{path} and streams.json disagree about: {odd}")
    for name in sorted(names):
      value = file.get_tensor(name)
      if value.shape != shapes[name].shape:
        raise UserError(
          f"{path}: {name} is {_by(value.shape)}, but streams.json makes it "
          f"{_by(shapes[name].shape)}"
        )
      yield name, value.astype(shapes[name].dtype)
