"""Hugging Face checkpoint directories: config and weights in.

    config.json                       which model: see `families`
    model.safetensors                 the weights, or shards of them with
    model.safetensors.index.json      tensor -> shard
    streams.json, streams.safetensors what `export` adds: streams and adapters

Weights are read one after the other, cast, and put on their device at once: the
host holds one weight beside what is placed, never a shard.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from spec_stream import sharding, weights
from spec_stream.errors import UserError
from spec_stream.hf import layout
from spec_stream.hf.families import BY_TYPE
from spec_stream.hf.keys import Keys
from spec_stream.models import config as model_config
from spec_stream.models import quant
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.models.transformer import Transformer
from spec_stream.weights import Weights

INDEX = "model.safetensors.index.json"
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # old files: no weights
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LISTED = 8  # names that an error lists
NO_STREAMS = StreamConfig(num_streams=0, num_stream_layers=1)


def is_checkpoint(directory) -> bool:
  """Whether this is a Hugging Face directory, and not a run's workdir."""
  path = pathlib.Path(directory) / "config.json"
  try:
    return "model_type" in json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, TypeError):
    return False


# -- config ------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict:
  """An object of a JSON file. Raises: UserError."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  except ValueError as e:
    raise UserError(f"{path} is not JSON: {e}") from e
  if not isinstance(values, dict):
    raise UserError(f"{path} must hold a JSON object")
  return values


def read_config(
  directory,
  *,
  streams: StreamConfig | None = None,
  dtype: str = "",
  param_dtype: str = "",
  max_positions: int = 0,
  quantize: str = "",
) -> ModelConfig:
  """The model that a checkpoint describes.

  Args:
    directory: with a config.json.
    streams: of the model to be; None: those that come with the checkpoint, or
      none.
    dtype, param_dtype: of computation and weights; "": the checkpoint's own.
    max_positions: fewer or more than the checkpoint says; 0: as many.
    quantize: as in ModelConfig.

  Raises:
    UserError: no such directory, not JSON, a model or a key of it that is not
      implemented.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"{directory}: no such directory; give a checkpoint's")
  path = directory / "config.json"
  if not path.is_file():
    raise UserError(f"{directory} holds no config.json: it is no checkpoint")
  values = read_json(path)
  keys = Keys(values, str(path))
  model_type = keys.get("model_type", kind=str)
  if model_type not in BY_TYPE:
    raise UserError(
      f"{path}: model_type '{model_type}' is not implemented; use one of "
      f"{', '.join(BY_TYPE)}"
    )
  try:
    fields = BY_TYPE[model_type].read(keys, model_type)
  except UserError:
    raise
  except (ArithmeticError, ValueError, TypeError) as e:  # 0 heads, a "4.0"
    raise UserError(f"{path} describes no model: {e}") from e
  keys.only("is_causal", True)
  keys.close()
  own = values.get("dtype") or values.get("torch_dtype") or "float32"
  if max_positions:
    if fields.get("positions") == "learned":
      raise UserError(
        f"{path}: this model has a table of {fields['max_positions']} "
        "positions, which model.max_positions cannot change: use 0"
      )
    fields["max_positions"] = max_positions
  if streams is None:
    streams = _own_streams(directory) or NO_STREAMS
  return ModelConfig(
    **fields,
    # The range of float16 is too small to compute in.
    dtype=dtype or ("float32" if own == "float16" else own),
    param_dtype=param_dtype or own,
    quantize=quantize,
    streams=streams,
  )


def configure(settings: dict, vocab_size: int) -> tuple[ModelConfig, str]:
  """config.model of a config file -> (the model, its checkpoint or "").

  With a checkpoint, the shape and the vocabulary are the checkpoint's; of the
  settings, streams, and where they are not left open (0 or "") max_positions,
  dtype, param_dtype and quantize count. Without one, `vocab_size` is the
  model's.
  """
  settings = dict(settings)
  directory = settings.pop("checkpoint")
  names = ("max_positions", "dtype", "param_dtype", "quantize")
  chosen = {name: settings.pop(name) for name in names}
  chosen = {name: value for name, value in chosen.items() if value}
  if not directory:
    values = {**settings, **chosen, "vocab_size": vocab_size}
    return model_config.from_dict(values), ""
  streams = StreamConfig(**settings["streams"])
  return read_config(directory, streams=streams, **chosen), directory


def _own_streams(directory: pathlib.Path) -> StreamConfig | None:
  path = directory / "streams.json"
  if not path.is_file():
    return None
  try:
    return StreamConfig(**read_json(path)["streams"])
  except (KeyError, TypeError) as e:
    raise UserError(f"{path} does not describe streams: {e}") from e


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
  added = weights.paths(config, *weights.ADAPTERS)
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
  if _own_streams(directory) != config.streams:
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


def describe(config: ModelConfig, prefer: str = "") -> tuple[str, dict]:
  """-> (model_type, config.json) of a family that can hold this model.

  prefer: the model_type to take if several can.

  Raises: UserError if none can: its config.json would mean another model.
  """
  if config.quantize:
    raise UserError(
      f"a base in {config.quantize} (model.quantize) has no Hugging Face form "
      "here: export a run of the unquantised base"
    )
  plain = dataclasses.replace(
    config, streams=NO_STREAMS, dtype="float32", param_dtype="float32"
  )
  near = collections.Counter()
  for model_type in sorted(BY_TYPE, key=lambda x: x != prefer):
    family = BY_TYPE[model_type]
    try:
      values = family.write(plain, model_type)
      again = ModelConfig(
        **family.read(Keys(values, "config.json"), model_type),
        streams=NO_STREAMS,
      )
    except UserError:
      continue
    differing = _differing(plain, again)
    if not differing:
      values["model_type"] = model_type
      values["architectures"] = [family.ARCHITECTURES[model_type]]
      return model_type, values
    near[model_type] = -len(differing)
    if near[model_type] == max(near.values()):
      fields = differing
  raise UserError(
    "no Hugging Face family has this model: the nearest, "
    f"{near.most_common(1)[0][0]}, differs in "
    + ", ".join(f"model.{name}={getattr(plain, name)}" for name in fields)
  )


def _differing(a: ModelConfig, b: ModelConfig) -> list[str]:
  a, b = model_config.to_dict(a), model_config.to_dict(b)
  return [name for name in a if a[name] != b[name]]
