"""Products of few rows on a CPU, at the speed of its memory.

XLA's library for CPUs packs a kernel anew in each call, so that four rows take
1.4 times as long as one although they read no more. `few_rows.cc` does not. It
is compiled for this machine by its C++ compiler ($CXX, or the first of c++, g++
and clang++), once, and kept in the user's cache folder; where there is none,
XLA's product stays. experiments/step_cost has the times of both.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings

import jax
import jax.numpy as jnp

MOST = 24  # rows; XLA is faster with 32: experiments/step_cost

TARGET = "spec_stream_few_rows"
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
# No -ffast-math: a library linked with it changes how the whole process rounds.
_FLAGS = (
  *("-O3", "-march=native", "-ffp-contract=fast"),
  *("-std=c++17", "-shared", "-fPIC", "-w"),
)


def serves(x: jax.Array, kernel: jax.Array) -> bool:
  """Whether `matmul` is to multiply x [R, I] with kernel [O, I]; compiles it,
  the first time."""
  return (
    x.shape[0] <= MOST and x.dtype == kernel.dtype == jnp.float32 and is_ready()
  )


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [R, I] times kernel [O, I] -> [R, O], float32, on a CPU alone.

  A row of the result does not depend, to the bit, on how many others there are.
  """
  y = jax.ShapeDtypeStruct((x.shape[0], kernel.shape[0]), jnp.float32)
  return jax.ffi.ffi_call(TARGET, y)(x, kernel)


@functools.cache
def is_ready() -> bool:
  """Whether this process can use `matmul`, which this compiles and loads."""
  compiler = find_compiler()
  if compiler is None:
    return False
  try:
    library = ctypes.CDLL(str(compile_for(compiler, _folder())))
  except subprocess.CalledProcessError as error:
    said = (error.stderr or "").strip().splitlines()
    _warn(f"{compiler}: {said[0] if said else f'exit {error.returncode}'}")
    return False
  except (OSError, subprocess.TimeoutExpired) as error:
    _warn(f"{compiler}: {error}")
    return False
  jax.ffi.register_ffi_target(
    TARGET, jax.ffi.pycapsule(library.SpecStreamFewRows), platform="cpu"
  )
  return True


def _warn(why: str):
  warnings.warn(
    f"{_SOURCE.name} did not compile, so decoding on this CPU uses XLA's"
    f" products, which are slower: {why}",
    stacklevel=3,
  )


def find_compiler() -> str | None:
  names = (os.environ.get("CXX"), "c++", "g++", "clang++")
  return next(
    filter(None, (shutil.which(name) for name in names if name)), None
  )


def _folder() -> pathlib.Path:
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return pathlib.Path(cache, "spec_stream", "libraries")


def compile_for(compiler: str, folder: pathlib.Path) -> pathlib.Path:
  """Compiles few_rows.cc into `folder`, or finds it there; raises OSError and
  subprocess's errors."""
  # A home may be shared by unlike machines, and `native` is this one.
  key = hashlib.sha256()
  headers = jax.ffi.include_dir()
  about = (compiler, headers, jax.__version__, *_FLAGS, platform.machine())
  for part in (_SOURCE.read_text(), *about, _features()):
    key.update(part.encode() + b"\0")
  library = folder / f"few_rows-{key.hexdigest()[:16]}.so"
  if library.exists():
    return library
  folder.mkdir(parents=True, exist_ok=True)
  # Of several processes each writes its own, and all of them the same.
  with tempfile.TemporaryDirectory(dir=folder) as own:
    made = pathlib.Path(own, library.name)
    command = [compiler, *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", str(made)]
    subprocess.run(
      command, check=True, capture_output=True, text=True, timeout=120
    )
    made.replace(library)
  return library


def _features() -> str:
  """What this processor can do, where the system says so."""
  try:
    with open("/proc/cpuinfo") as file:
      lines = file.read().splitlines()
  except OSError:
    return platform.processor()
  found = (line for line in lines if line.startswith(("flags", "Features")))
  return next(found, platform.processor())
