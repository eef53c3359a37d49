"""config.json of a Hugging Face directory: to the model it describes, and back.

`streams.json`, which `export` puts beside it, describes the streams.
"""

import collections
import dataclasses
import pathlib

from spec_stream import json_text
from spec_stream.errors import UserError
from spec_stream.hf.families import BY_TYPE
from spec_stream.hf.keys import Keys
from spec_stream.models import config as model_config
from spec_stream.models.config import (
  DrafterConfig,
  ModelConfig,
  StreamConfig,
)

NO_STREAMS = StreamConfig(num_streams=0, num_stream_layers=1)


def is_checkpoint(directory) -> bool:
  """Whether this is a Hugging Face directory, and not a run's workdir."""
  path = pathlib.Path(directory) / "config.json"
  try:
    return "model_type" in json_text.parse(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, TypeError):
    return False


def read_json(path: pathlib.Path) -> dict:
  """An object of a JSON file. Raises: UserError."""
  try:
    values = json_text.parse(path.read_text(encoding="utf-8"))
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
    streams = own_streams(directory) or NO_STREAMS
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
  model = read_config(directory, streams=streams, **chosen)
  drafter = model_config.drafter_from_dict(settings.get("drafter", {}))
  return dataclasses.replace(model, drafter=drafter), directory


def own_streams(directory: pathlib.Path) -> StreamConfig | None:
  """Of the streams that came with a checkpoint; None if none did."""
  path = directory / "streams.json"
  if not path.is_file():
    return None
  try:
    values = read_json(path)["streams"]
    return model_config.make(StreamConfig, values, f"{path}: streams")
  except (KeyError, TypeError, AttributeError) as e:
    raise UserError(f"{path} does not describe streams: {e}") from e


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
    config,
    streams=NO_STREAMS,
    drafter=DrafterConfig(),
    dtype="float32",
    param_dtype="float32",
    known_tokens=0,
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
