"""The library's own kernels for a CPU: C++, compiled where they run.

Those of `panels`, `four_bits` and `tree_attention_cpu`, as one library, made
for this machine by its C++ compiler the first time that a decoding asks for it,
and kept in the user's cache folder. The compiler is $CXX or, if that is not
set, the first of c++, g++ and clang++; where there is none (CXX= makes it so),
XLA's products and attention stay. experiments/step_cost has the times of both.
"""

import contextlib
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
import time
import warnings
from collections.abc import Sequence

import jax
import jaxlib

# Names for jax.ffi, and of the library's functions.
TARGETS = {
  "spec_stream_panels": "SpecStreamPanels",
  "spec_stream_four_bits": "SpecStreamFourBits",
  "spec_stream_attention": "SpecStreamAttention",
}
_HERE = pathlib.Path(__file__).parent
_SOURCES = sorted(_HERE.glob("*.cc"))
_FLAGS = (
  "-O3",
  # For GCC on a PowerPC or an ARM, and clang there, -march is another thing.
  "-march=native"
  if platform.machine().lower() in ("x86_64", "amd64")
  else "-mcpu=native",
  # No -ffast-math: a library linked with it changes how all others round.
  "-ffp-contract=off",
  *("-std=c++17", "-fPIC", "-w"),
)
_LINK = (
  "-shared",
  # It may be loaded by an interpreter that comes with older libraries.
  *(["-static-libstdc++", "-static-libgcc"] * (platform.system() == "Linux")),
)


def _features() -> str:
  """What this processor can do, where the system says so."""
  try:
    with open("/proc/cpuinfo") as file:
      lines = file.read().splitlines()
  except OSError:
    return platform.processor()
  found = (line for line in lines if line.startswith(("flags", "Features")))
  return next(found, platform.processor())


@functools.cache
def is_ready() -> bool:
  """Whether this process has the kernels, which this compiles and loads.

  A compiler that cannot is warned of, once.
  """
  compiler = find_compiler()
  if not compiler:
    return False
  try:
    library = _load(compiler, _folder())
    for target, name in TARGETS.items():
      function = jax.ffi.pycapsule(getattr(library, name))
      jax.ffi.register_ffi_target(target, function, platform="cpu")
  except (
    subprocess.SubprocessError,
    OSError,
    AttributeError,  # the library lacks the function
    RuntimeError,  # of XLA: it is of another version of the interface
  ) as error:
    warnings.warn(
      "decoding on this CPU uses XLA's products and attention, which are "
      f"slower: {shlex.join(compiler)} did not make the kernels: {_why(error)}",
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
  """The sources as a library in `folder`, compiled or found there.

  Raises: OSError, subprocess.SubprocessError.
  """
  key = hashlib.sha256()
  headers = jax.ffi.include_dir()
  about = (*compiler, *_FLAGS, *_LINK, headers, jaxlib.__version__)
  # A home may be shared by unlike machines, and `native` is this one.
  read = [path.read_text() for path in (*_SOURCES, *sorted(_HERE.glob("*.h")))]
  for part in (*read, *about, platform.platform(), _features()):
    key.update(part.encode() + b"\0")
  library = folder / f"kernels-{key.hexdigest()[:16]}.so"
  if library.exists():
    return library
  folder.mkdir(parents=True, exist_ok=True)
  # Of several processes each writes its own, and all of them the same.
  with tempfile.TemporaryDirectory(dir=folder) as own:
    made = pathlib.Path(own, library.name)
    objects = [made.with_name(f"{source.stem}.o") for source in _SOURCES]
    compile_one = (*compiler, *_FLAGS, f"-I{headers}", "-c")
    _run(*([*compile_one, s, "-o", o] for s, o in zip(_SOURCES, objects)))
    _run([*compiler, *_FLAGS, *_LINK, *objects, "-o", made])
    made.replace(library)
  return library


def _run(*commands):
  """Side by side, within 120 s; the compilers that still run are killed if one
  fails, or this is interrupted (what they have begun themselves is not)."""
  deadline = time.monotonic() + 120
  with contextlib.ExitStack() as stack:
    running = []
    for command in commands:
      process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
      )
      running.append(stack.enter_context(process))
      stack.callback(process.kill)  # before it is waited for
    for process in running:
      left = max(deadline - time.monotonic(), 0)
      _, said = process.communicate(timeout=left)
      if process.returncode:
        raise subprocess.CalledProcessError(
          process.returncode, process.args, stderr=said
        )


def _load(compiler: Sequence[str], folder: pathlib.Path | None):
  load = lambda folder: ctypes.CDLL(str(compile_for(compiler, folder)))
  if folder is not None:
    try:
      return load(folder)
    except OSError:  # it cannot be written, or what lies there be loaded
      pass
  with tempfile.TemporaryDirectory() as own:  # for this process alone
    return load(pathlib.Path(own))


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
