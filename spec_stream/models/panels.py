"""Products on a CPU in float32, of kernels that lie in panels.

XLA's library for CPUs packs a kernel anew in each call, so that four rows take
1.4 times as long as one although they read no more. Here it is packed once,
when the model is made ready: a panel is WIDTH outputs, of each input in turn
the weights of all of them. `panels.cc` multiplies such kernels. It is compiled
for this machine by its C++ compiler, the first time that a decoding asks for
it, and kept in the user's cache folder. The compiler is $CXX or, if that is not
set, the first of c++, g++ and clang++; where there is none (CXX= makes it so),
XLA's products stay. experiments/step_cost has the times of both.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib


def _features() -> str:
  """What this processor can do, where the system says so."""
  try:
    with open("/proc/cpuinfo") as file:
      lines = file.read().splitlines()
  except OSError:
    return platform.processor()
  found = (line for line in lines if line.startswith(("flags", "Features")))
  return next(found, platform.processor())


WIDTH = 32  # outputs of a panel

DTYPES = (jnp.float32, jnp.int8)  # of kernels

TARGET = "spec_stream_panels"
_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_FLAGS = (
  "-O3",
  # For GCC on a PowerPC or an ARM, and clang there, -march is another thing.
  "-march=native"
  if platform.machine().lower() in ("x86_64", "amd64")
  else "-mcpu=native",
  # No -ffast-math: a library linked with it changes how all others round.
  "-ffp-contract=off",
  *("-std=c++17", "-shared", "-fPIC", "-w"),
  # It may be loaded by an interpreter that comes with older libraries.
  *(["-static-libstdc++", "-static-libgcc"] * (platform.system() == "Linux")),
)


@jax.jit
def pack(kernel: jax.Array) -> jax.Array:
  """[O, I] -> panels [P, I, WIDTH], P = O / WIDTH, rounded up; the last one is
  filled up with zeros."""
  panels = -(-len(kernel) // WIDTH)
  kernel = jnp.pad(kernel, ((0, panels * WIDTH - len(kernel)), (0, 0)))
  return kernel.reshape(panels, WIDTH, -1).swapaxes(1, 2)


@jax.jit
def in_8_bits(panels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Panels of float32 -> of int8, and how much 1 is in each output, float32
  [P WIDTH]: the largest weight of an output is 127 or -127."""
  one = jnp.abs(panels).max(1, keepdims=True) / 127
  rounded = jnp.round(panels / jnp.where(one > 0, one, 1))
  return rounded.astype(jnp.int8), one.reshape(-1)


def take(panels: jax.Array, outputs: jax.Array) -> jax.Array:
  """The weights [..., I] of outputs [...], as they were given to `pack`.

  Each comes from a cache line of its own, so this is for few outputs.
  """
  return panels[outputs // WIDTH, :, outputs % WIDTH]


def matmul(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
  """x [R, I] times panels [P, I, WIDTH] of O outputs -> [R, O].

  x and the result are float32, panels of one of DTYPES. On a CPU, where it
  needs `is_ready`, a row of the result does not depend, to the bit, on how many
  others there are. Neither differentiated nor split over devices.

  Raises: TypeError of another dtype.
  """
  if x.dtype != jnp.float32 or panels.dtype not in DTYPES:
    raise TypeError(
      f"{x.dtype} rows, {panels.dtype} panels: rows are to be float32, panels "
      "float32 or int8"
    )
  y = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
  here = jax.ffi.ffi_call(TARGET, y, vmap_method="sequential")
  elsewhere = functools.partial(by_xla, outputs=outputs)
  return jax.lax.platform_dependent(x, panels, cpu=here, default=elsewhere)


def by_xla(x: jax.Array, panels: jax.Array, outputs: int) -> jax.Array:
  """As `matmul`, of a model that was moved to another platform: slower."""
  kernel = panels.astype(x.dtype).swapaxes(0, 1).reshape(x.shape[1], -1)
  return x @ kernel[:, :outputs]


@functools.cache
def is_ready() -> bool:
  """Whether this process can use `matmul`, which this compiles and loads.

  A compiler that cannot is warned of, once.
  """
  compiler = find_compiler()
  if not compiler:
    return False
  try:
    function = _load(compiler, _folder())
    jax.ffi.register_ffi_target(
      TARGET, jax.ffi.pycapsule(function), platform="cpu"
    )
  except (
    subprocess.SubprocessError,
    OSError,
    AttributeError,  # the library lacks the function
    RuntimeError,  # of XLA: it is of another version of the interface
  ) as error:
    warnings.warn(
      f"decoding on this CPU uses XLA's products, which are slower: "
      f"{_SOURCE.name} was not made by {shlex.join(compiler)}: {_why(error)}",
      stacklevel=2,
    )
    return False
  return True


def find_compiler() -> list[str]:
  """The command that begins a compilation; [] if there is none."""
  if "CXX" in os.environ:
    command = shlex.split(os.environ["CXX"])
    return command if command and shutil.which(command[0]) else []
  names = ("c++", "g++", "clang++")
  return next(([path] for path in map(shutil.which, names) if path), [])


def compile_for(compiler: Sequence[str], folder: pathlib.Path) -> pathlib.Path:
  """panels.cc as a library in `folder`, compiled or found there.

  Raises: OSError, subprocess.SubprocessError.
  """
  key = hashlib.sha256()
  headers = jax.ffi.include_dir()
  about = (*compiler, *_FLAGS, headers, jaxlib.__version__)
  # A home may be shared by unlike machines, and `native` is this one.
  for part in (_SOURCE.read_text(), *about, platform.platform(), _features()):
    key.update(part.encode() + b"\0")
  library = folder / f"panels-{key.hexdigest()[:16]}.so"
  if library.exists():
    return library
  folder.mkdir(parents=True, exist_ok=True)
  # Of several processes each writes its own, and all of them the same.
  with tempfile.TemporaryDirectory(dir=folder) as own:
    made = pathlib.Path(own, library.name)
    subprocess.run(
      [*compiler, *_FLAGS, f"-I{headers}", str(_SOURCE), "-o", str(made)],
      check=True,
      capture_output=True,
      encoding="utf-8",
      errors="replace",
      timeout=120,
    )
    made.replace(library)
  return library


def _load(compiler: Sequence[str], folder: pathlib.Path | None):
  load = lambda folder: ctypes.CDLL(str(compile_for(compiler, folder)))
  if folder is not None:
    try:
      return load(folder).SpecStreamPanels
    except OSError:  # it cannot be written, or what lies there be loaded
      pass
  with tempfile.TemporaryDirectory() as own:  # for this process alone
    return load(pathlib.Path(own)).SpecStreamPanels


def _folder() -> pathlib.Path | None:
  """The user's cache folder; None if there is no home."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path = pathlib.Path(cache, "spec_stream", "libraries")
  return path if path.is_absolute() else None


def _why(error: Exception) -> str:
  if not isinstance(error, subprocess.CalledProcessError):
    return str(error)
  said = error.stderr.strip().splitlines()
  errors = [line for line in said if "error" in line]
  return (errors or said or [f"exit status {error.returncode}"])[0]
