"""A config's sweep(): read, checked before anything is run, and its table."""

import importlib.util
import inspect
import pathlib

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from common import UserError
from spec_stream import sweep, text_table


def read(flag: str, benchmark=()) -> list[sweep.Task]:
  """The tasks of the sweep of the config that a flag names.

  benchmark: arguments for all benchmarks.

  Raises: UserError where the file has no sweep(), or a run's settings are
    wrong: all of them are looked at here, and not when their turn comes.
  """
  flag = flags.FLAGS[flag]
  name = config_flags.get_config_filename(flag)
  path, _, argument = name.partition(":")
  module = _load(path)
  if not hasattr(module, "sweep"):
    raise UserError(
      f"--config={path} has no sweep(): it is for launch/train.py; those with "
      "one lie in configs/ablations"
    )
  given = (argument,) if inspect.signature(module.sweep).parameters else ()
  given = given if argument else ()
  runs = list(module.sweep(*given))
  overrides = config_flags.get_override_values(flag)
  found = sweep.tasks(runs, name, overrides, benchmark)
  for run in runs:
    _check(flag.value, run)
  return found


def words(flag: str) -> list[str]:
  """The config flag and its overrides, as arguments of a command."""
  flag = flags.FLAGS[flag]
  overrides = config_flags.get_override_values(flag)
  return [
    f"--config={config_flags.get_config_filename(flag)}",
    *(f"--config.{key}={value}" for key, value in overrides.items()),
  ]


def _load(path: str):
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _check(config: ConfigDict, run: sweep.Run):
  """Raises: UserError unless the config of the run could be trained."""
  from spec_stream.train import start

  config = ConfigDict(config.copy_and_resolve_references())
  for key, value in run.train.items():
    at, _, last = f".{key}".rpartition(".")
    group = config
    for name in filter(None, at.split(".")):
      group = group.get(name) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or last not in group:
      raise UserError(f"sweep(): run {run.name!r} sets {key!r}, no config key")
    try:
      group[last] = value
    except (TypeError, ValueError) as e:
      raise UserError(f"sweep(): run {run.name!r}, {key}={value}: {e}") from e
  try:
    start.configure(config.to_dict())
  except UserError as e:
    raise UserError(f"sweep(): run {run.name!r}: {e}") from e


def render(found, workdir, state: dict[str, str]) -> str:
  """How each run ended, and a row for each benchmarked method."""
  rows = sweep.rows(found, workdir)
  ends = {}
  for name, end in state.items():
    ends.setdefault(end, []).append(name)
  lines = [f"{end}: {', '.join(names)}" for end, names in ends.items()]
  if not rows:
    return "\n".join(lines)
  settings = {}
  for key in rows[0]["set"]:
    short = key.rpartition(".")[2]
    # Two keys may end alike.
    short = key if sum(k.endswith(short) for k in rows[0]["set"]) > 1 else short
    settings[short] = [str(row["set"][key]) for row in rows]
  columns = {"run": [row["run"] for row in rows], **settings}
  for name, cell in text_table.COLUMNS.items():
    cells = [cell(row) for row in rows]
    if any(cells) and name not in columns:
      columns[name] = cells
  return "\n".join([*lines, "", text_table.table(columns, text_table.LEFT)])
