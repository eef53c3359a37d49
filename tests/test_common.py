"""Launchers end a user's mistake in one line, and a bug in its traceback."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
LAUNCHER = f'''"""Does a thing.

  launch/thing.py --name=x
"""
import os, signal, sys
sys.path.insert(0, {str(LAUNCH)!r})
import common
from absl import flags, logging
from ml_collections.config_flags import config_flags

config_flags.DEFINE_config_file("config", None, "A file of configs/.")
flags.DEFINE_string("name", None, "What to do.")
flags.DEFINE_integer("count", 3, "How often.")
flags.mark_flag_as_required("name")


def main(argv):
  name = flags.FLAGS.name
  if name == "user":
    raise common.UserError("batch 3 does not divide 8;\\nuse 2, 4 or 8")
  if name == "full":
    raise OSError(28, "No space left on device", "runs/a/metrics.jsonl")
  if name == "bug":
    raise ValueError("shapes (3,) and (4,)")
  if name == "stop":
    # Whatever runs in the background may have it switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
  if name == "compile":
    import jax
    jax.jit(lambda x: x * 3 + 1)(2.0)
  if name == "code":
    return 7
  config = flags.FLAGS.config
  logging.info("what a library tells")
  print("ran", name, flags.FLAGS.count, config and config.train.steps)


if __name__ == "__main__":
  common.run(main)
'''
CONFIG = """
from ml_collections import ConfigDict


def get_config():
  return ConfigDict({"train": {"steps": 3, "rate": 0.1}, "seed": 0})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("launch")
  (path / "thing.py").write_text(LAUNCHER)
  (path / "config.py").write_text(CONFIG)
  return path


def call(folder, *args, **environ):
  given = {**os.environ, "PYTHONWARNINGS": "ignore", **environ}
  return subprocess.run(
    [sys.executable, "thing.py", *args],
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=60,
    env={k: v for k, v in given.items() if v is not None},
  )


def test_programs_are_kept_for_the_next_call(folder, tmp_path):
  some = {
    "XDG_CACHE_HOME": str(tmp_path),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  place = tmp_path / "spec_stream" / "programs"
  off = call(folder, "--name=compile", **some, JAX_COMPILATION_CACHE_DIR="")
  assert off.returncode == 0 and not place.exists()
  some["JAX_COMPILATION_CACHE_DIR"] = None  # not in the environment
  done = call(folder, "--name=compile", **some)
  assert done.returncode == 0, done.stderr
  assert list(place.iterdir())
  some["XDG_CACHE_HOME"] = str(folder / "thing.py")  # no folder can be there
  done = call(folder, "--name=compile", **some)
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
  ("args", "line"),
  [
    (["--name=user"], "batch 3 does not divide 8; use 2, 4 or 8"),
    (["--name=full"], "runs/a/metrics.jsonl: No space left on device"),
    ([], "--name is needed: What to do."),
    (["--nmae=x"], "--nmae is not a flag of thing.py; did you mean --name?"),
    (["--name=x", "--count=two"], "--count=two: must be an integer"),
    (["--name=x", "y"], "unexpected argument 'y': flags begin with --"),
    (
      ["--name=x", "--config=config.py", "--config.train.stepz=3"],
      "--config.train.stepz: config.train has no key 'stepz'; "
      "did you mean 'steps'? its keys are: rate, steps",
    ),
    (
      ["--name=x", "--config", "config.py", "--config.tarin.steps=3"],
      "--config.tarin.steps: config has no key 'tarin'; "
      "did you mean 'train'? its keys are: seed, train",
    ),
    (
      ["--name=x", "--config=config.py", "--config.seed.x=3"],
      "--config.seed.x: config.seed is a value, no group",
    ),
    (
      ["--name=x", "--config=config.py", "--config.train.rate=fast"],
      "--config.train.rate=fast: must be a number",
    ),
    (
      ["--name=x", "--config.train.steps=3"],
      "--config.train.steps needs --config=FILE before it",
    ),
  ],
)
def test_a_mistake_is_one_line(folder, args, line):
  result = call(folder, *args)
  assert result.returncode == 1
  assert result.stderr == f"error: {line}\n"
  assert result.stdout == ""


def test_a_missing_config_names_those_there_are(folder):
  result = call(folder, "--name=x", "--config=nowhere.py")
  assert result.returncode == 1
  start = "error: --config=nowhere.py: no such file; configs are: "
  assert result.stderr.startswith(start) and result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback(folder):
  result = call(folder, "--name=bug")
  assert result.returncode == 1
  assert "Traceback" in result.stderr and "shapes (3,)" in result.stderr


def test_ctrl_c_is_one_line(folder):
  result = call(folder, "--name=stop")
  assert result.returncode == 128 + signal.SIGINT
  assert result.stderr == "stopped by Ctrl-C\n"


def test_good_flags_reach_main(folder):
  args = ("--name=x", "--config=config.py", "--config.train.steps=9")
  result = call(folder, *args)
  assert (result.stdout, result.stderr) == ("ran x 3 9\n", "")
  assert "what a library tells" in call(folder, *args, "--verbosity=0").stderr
  assert call(folder, "--name=code").returncode == 7


def test_help_shows_the_docstring_the_flags_and_the_keys(folder):
  result = call(folder, "--config=config.py", "--help")
  assert result.returncode == 0 and result.stderr == ""
  assert result.stdout.startswith("Does a thing.\n\n  launch/thing.py --name=x")
  assert "--count\n      How often. (default 3)" in result.stdout
  assert "--config.train.steps=3" in result.stdout
  assert "--verbosity" not in result.stdout  # of a library
