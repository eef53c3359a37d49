"""Writing a directory for others: whole or not at all, weights one by one."""

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np

from spec_stream.errors import UserError

DTYPES = {
  "float32": "F32",
  "bfloat16": "BF16",
  "float16": "F16",
}  # names in a safetensors file


def check(out):
  """Raises: UserError if there is something at `out`."""
  if os.path.lexists(out):
    raise UserError(f"--out={out} exists: give a new directory")


@contextlib.contextmanager
def whole(out) -> Iterator[pathlib.Path]:
  """A directory to write into, which becomes `out` if nothing is raised."""
  check(out)
  out = pathlib.Path(out).absolute()
  part = out.with_name(f"{out.name}.part-{os.getpid()}")
  try:
    part.mkdir(parents=True)
    yield part
    part.rename(out)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def write_json(path: pathlib.Path, values: dict):
  write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str):
  path.write_text(text, encoding="utf-8")


def write_tensors(
  path: pathlib.Path,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  values: Iterable[np.ndarray],
):
  """A safetensors file: 8 bytes of length, a JSON header, then all numbers.

  The library wants all tensors at once; here the next is made when the last is
  on disk. shapes: by name; values: in that order, cast to their dtypes.
  """
  header, at = {"__metadata__": {"format": "pt"}}, 0
  for name, x in shapes.items():
    end = at + math.prod(x.shape) * np.dtype(x.dtype).itemsize
    kind = DTYPES[str(x.dtype)]
    offsets = [at, end]
    header[name] = dict(dtype=kind, shape=list(x.shape), data_offsets=offsets)
    at = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # numbers begin where they are aligned
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, x), value in zip(shapes.items(), values, strict=True):
      if value.shape != x.shape:
        raise ValueError(f"{name} is {value.shape}, not {x.shape}")
      value = np.ascontiguousarray(value.astype(x.dtype, copy=False))
      file.write(value.reshape(-1).view(np.uint8).data)
