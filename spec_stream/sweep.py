"""Runs of a sweep: their commands, what of them is done, what is left to do.

A config's `sweep()` yields `Run`s. A run is a directory below the sweep's, and
a list of commands in it: one training, then benchmarks and evaluations. Each
command that has ended well is a line of `<run>/sweep.jsonl`, so that a sweep
which was killed goes on where it was, and a run whose settings changed is done
again; one that started from it must be removed first.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spec_stream import metrics, results
from spec_stream.errors import UserError

RECORD, RESULTS = "sweep.jsonl", "results.jsonl"
_NAME = r"[A-Za-z0-9][\w.=-]*"


@dataclasses.dataclass(frozen=True)
class Run:
  """One point of a sweep.

  name: its directory below the sweep's.
  train: keys of the config with their values here, such as
    {"model.streams.num_streams": 3}.
  benchmark, evaluate: flags of launch/benchmark.py and launch/evaluate.py
    without --workdir, one mapping for each time that it is called.

  In each value that is a text, {NAME} stands for the directory of the run NAME,
  which is then done before this one.
  """

  name: str
  train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  benchmark: Sequence[Mapping[str, Any]] = ()
  evaluate: Sequence[Mapping[str, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """A run's commands and what comes before it.

  commands: argv of each, from "launch/..." on, where {NAME} still stands for a
    directory. Only so can they be compared with those of a record, when the
    sweep has been moved.
  needs: names of the runs that come before.
  """

  name: str
  commands: tuple[tuple[str, ...], ...]
  needs: tuple[str, ...]


def tasks(
  runs: Iterable[Run],
  config: str,
  overrides: Mapping[str, Any] | None = None,
  benchmark: Sequence[str] = (),
) -> list[Task]:
  """The runs as commands, in an order in which each comes after its needs.

  Args:
    runs: of the config's sweep().
    config: what --config of launch/train.py is given.
    overrides: keys and values for all trainings; a run's own come after them.
    benchmark: arguments for all benchmarks, after a run's own.

  Raises: UserError for names that are no names of directories or come twice,
    and for runs that need one that does not exist, or one another.
  """
  runs = list(runs)
  names = [run.name for run in runs]
  for name in names:
    if not (isinstance(name, str) and re.fullmatch(_NAME, name)):
      raise UserError(
        f"sweep(): {name!r} names no run: use letters, digits and _.=-"
      )
    if names.count(name) > 1:
      raise UserError(f"sweep(): two runs are named {name!r}")
  found = []
  for run in runs:
    commands = [
      _command("train", f"--config={config}", *_config(overrides or {})),
      *(_command("benchmark", *_flags(f), *benchmark) for f in run.benchmark),
      *(_command("evaluate", *_flags(flags)) for flags in run.evaluate),
    ]
    commands[0] += tuple(_config(run.train))
    commands = tuple((*c, f"--workdir={{{run.name}}}") for c in commands)
    said = [name for c in commands for text in c for name in _named(text)]
    needs = tuple(dict.fromkeys(n for n in said if n != run.name))
    for name in needs:
      if name not in names:
        raise UserError(
          f"sweep(): run {run.name!r} needs {{{name}}}, and no run is named "
          f"so; runs are: {', '.join(names)}"
        )
    found.append(Task(run.name, commands, needs))
  return _ordered(found)


def _command(launcher: str, *arguments: str) -> tuple[str, ...]:
  return (f"launch/{launcher}.py", *arguments)


def _flags(values: Mapping[str, Any]) -> list[str]:
  return [f"--{name}={_text(value)}" for name, value in values.items()]


def _config(values: Mapping[str, Any]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in values.items()]


def _text(value) -> str:
  """A flag's value; lists are separated by commas."""
  if isinstance(value, (list, tuple)):
    return ",".join(map(str, value))
  return str(value)


def _named(text: str) -> list[str]:
  return re.findall(rf"\{{({_NAME})\}}", text)


def _ordered(found: list[Task]) -> list[Task]:
  """As they were given, but for a run that stands before what it needs."""
  order, left = [], list(found)
  while left:
    have = {task.name for task in order}
    task = next((t for t in left if have.issuperset(t.needs)), None)
    if task is None:
      raise UserError(
        "sweep(): these runs need one another: "
        + ", ".join(task.name for task in left)
      )
    left.remove(task)
    order.append(task)
  return order


def select(
  found: list[Task], names: Sequence[str], needs: bool = True
) -> list[Task]:
  """The tasks of these names, and with `needs` what they need.

  Raises: UserError for a name that there is not.
  """
  known = {task.name: task for task in found}
  wanted, todo = set(), list(names)
  while todo:
    name = todo.pop()
    if name not in known:
      raise UserError(
        f"--runs: {name!r} is no run of the sweep: {', '.join(known)}"
      )
    if name not in wanted:
      wanted.add(name)
      todo += known[name].needs if needs else ()
  return [task for task in found if task.name in wanted]


def fill(command: Sequence[str], workdir) -> list[str]:
  """The command with directories for {NAME}s."""
  root = pathlib.Path(workdir)
  return [
    re.sub(rf"\{{({_NAME})\}}", lambda m: str(root / m[1]), text)
    for text in command
  ]


# -- what is done ------------------------------------------------------------


def _records(name: str, workdir) -> dict[tuple[str, ...], dict]:
  """{command: its newest record}; those older than the last training are left
  out, for they are of other weights."""
  path = pathlib.Path(workdir) / name / RECORD
  done = {}
  for record in metrics.read_jsonl(path) if path.exists() else ():
    command = record.get("command")
    if not (isinstance(command, list) and all(map(_is_text, command))):
      raise UserError(f"{path}: a line without its 'command': remove it")
    if command[:1] == ["launch/train.py"]:
      done = {}
    done[tuple(command)] = record
  return done


def _is_text(value) -> bool:
  return isinstance(value, str)


def missing(task: Task, workdir) -> list[tuple[str, ...]]:
  """The commands of the task that are still to be run, in order.

  Raises: UserError if a run that it started from was trained again since.
  """
  done = _records(task.name, workdir)
  if task.commands[0] not in done:
    return list(task.commands)
  for name, date in done[task.commands[0]].get("needs", {}).items():
    if date != _trained(name, workdir):
      folder = pathlib.Path(workdir) / task.name
      raise UserError(
        f"{name} was trained again since {task.name} started from it: remove "
        f"{folder} to repeat it, or give another --workdir"
      )
  return [command for command in task.commands if command not in done]


def check_needs(found: Sequence[Task], every: Sequence[Task], workdir):
  """Raises: UserError if tasks need one of `every` that is neither among them
  nor done."""
  chosen = {task.name for task in found}
  for task in every:
    users = [t.name for t in found if task.name in t.needs]
    if users and task.name not in chosen and missing(task, workdir):
      raise UserError(
        f"{users[0]} needs {task.name}, which is not done in {workdir}: run it "
        "first, or leave --noneeds out"
      )


def _trained(name: str, workdir) -> str | None:
  """When the training of a run ended, by its record."""
  for command, found in _records(name, workdir).items():
    if command[:1] == ("launch/train.py",):
      return found.get("date")
  return None


def record(task: Task, command: Sequence[str], workdir, **about):
  """Writes that a command has ended well; of a benchmark also which rows of
  results.jsonl are its own."""
  folder = pathlib.Path(workdir) / task.name
  if command[0] == "launch/train.py":
    about["needs"] = {name: _trained(name, workdir) for name in task.needs}
  if command[0] == "launch/benchmark.py":
    about["run_id"] = metrics.read_jsonl(folder / RESULTS)[-1].get("run_id")
  metrics.append_jsonl(folder / RECORD, [{"command": list(command), **about}])


# -- the table at the end ----------------------------------------------------


def rows(found: Sequence[Task], workdir) -> list[dict]:
  """Results of all benchmarks that are done, with `run` and `set`.

  set: {key of the config or flag: value} of the settings in which the commands
  of the sweep differ. Plain decoding's repetition is left out.
  """
  settings = {}
  for task in found:
    train = dict(_split(task.commands[0]))
    for command in task.commands:
      if command[0] == "launch/benchmark.py":
        settings[task, command] = {**train, **dict(_split(command))}
  names = dict.fromkeys(name for values in settings.values() for name in values)
  varied = [
    name
    for name in names
    if len({values.get(name) for values in settings.values()}) > 1
    and name != "workdir"
  ]
  table = []
  for (task, command), values in settings.items():
    done = _records(task.name, workdir).get(command)
    if done is None:
      continue
    own = {key: values.get(key, "") for key in varied}
    for row in metrics.read_jsonl(pathlib.Path(workdir) / task.name / RESULTS):
      if row.get("run_id") == done.get("run_id"):
        if not results.is_noise(row):
          table.append({"run": task.name, "set": own, **row})
  return table


def _split(command: Sequence[str]):
  for argument in command[1:]:
    name, _, value = argument.removeprefix("--").partition("=")
    yield name.removeprefix("config."), value
