"""Runs the commands of a sweep on this machine, one run or several at a time.

A run has a lock that its command inherits. So two sweeps in one directory share
the work, and a command that outlived its killed sweep is waited for, never
started a second time beside itself.
"""

import dataclasses
import datetime
import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from common import ROOT
from spec_stream import sweep
from spec_stream.errors import UserError
from spec_stream.metrics import time_left

_POLL = 0.2  # seconds


@dataclasses.dataclass
class _Active:
  """A run whose command is under way."""

  task: sweep.Task
  lock: int  # file descriptor
  slot: int
  command: tuple[str, ...] = ()
  process: subprocess.Popen | None = None
  since: float = 0.0
  tries: int = 0
  told: int = 0  # signals sent to it


class Local:
  """Runs the tasks of a sweep; `state` tells how far each has come.

  Args:
    tasks: in an order in which each comes after what it needs.
    workdir: of the sweep.
    processes: runs at a time.
    gpus: ids of GPUs: each run sees one of them, and `processes` is ignored.
    retries: times that a command which broke is run again. One that ended with
      a line `error: ...` is not: it would say the same.
  """

  def __init__(self, tasks, workdir, processes=1, gpus=(), retries=1):
    self.tasks, self.workdir = tasks, pathlib.Path(workdir)
    self.gpus, self.retries = list(gpus), retries
    self.slots = range(len(self.gpus) or processes)
    self.left = {t.name: sweep.missing(t, workdir) for t in tasks}
    # waiting, running, done, failed, skipped (needs a failed one) or stopped.
    self.state = {n: "waiting" if c else "done" for n, c in self.left.items()}
    self.total = sum(map(len, self.left.values()))  # commands
    self.ended, self.spent = 0, 0.0  # commands, seconds
    self.active: list[_Active] = []
    self.signals: list[int] = []  # that came
    self.told = set()
    self.env = dict(os.environ)
    if len(self.slots) > 1 and not self.gpus:  # they share one, if there is any
      share = f"{0.9 / len(self.slots):.3f}"
      self.env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", share)

  @property
  def stopped(self) -> int:
    """The signal that stopped it, or 0."""
    return self.signals[0] if self.signals else 0

  def run(self):
    """Until all is done, has failed, or a signal stops it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    note = lambda number, frame: self.signals.append(number)
    before = {n: signal.signal(n, note) for n in numbers}
    try:
      while True:
        self.active = [one for one in self.active if self._goes_on(one)]
        for one in self.active:
          self._tell(one)
        if not self.stopped:
          self._start()
        waits = "waiting" in self.state.values() and not self.stopped
        if not (self.active or waits):
          return
        time.sleep(_POLL)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
      for one in self.active:  # after a bug of this file alone
        one.process.terminate()

  def _tell(self, one: _Active):
    """Of a signal that came, so that a command saves what it can; a second one
    kills it."""
    while one.told < len(self.signals):
      one.process.send_signal(signal.SIGKILL if one.told else signal.SIGINT)
      one.told += 1

  def _start(self):
    """Starts what is ready, as long as there is a free slot."""
    for task in self.tasks:
      taken = {one.slot for one in self.active}
      free = [slot for slot in self.slots if slot not in taken]
      if self.state[task.name] != "waiting" or not free:
        continue
      # Those that are not of these tasks are done: see `sweep.check_needs`.
      needs = {self.state.get(name, "done") for name in task.needs}
      if needs & {"failed", "skipped"}:
        self.state[task.name] = "skipped"
        self._say(task.name, f"skipped: it needs {', '.join(task.needs)}")
      elif needs <= {"done"}:
        lock = self._lock(task)
        if lock is None:
          continue
        # Another sweep may have done some of it before this one had the lock.
        try:
          self.left[task.name] = sweep.missing(task, self.workdir)
        except UserError as e:
          self.state[task.name] = "failed"
          self._say(task.name, f"error: {e}")
          os.close(lock)
          continue
        self.state[task.name] = "running"
        one = _Active(task, lock, free[0])
        if self._next(one):
          self.active.append(one)

  def _lock(self, task) -> int | None:
    folder = self.workdir / task.name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "sweep.lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(lock)
      if task.name not in self.told:
        self.told.add(task.name)
        self._say(task.name, "is being run by another process: waiting for it")
      return None
    return lock

  def _next(self, one: _Active) -> bool:
    """Starts the next command of a run, or ends it; -> whether it goes on."""
    if not self.left[one.task.name]:
      self.state[one.task.name] = "done"
      os.close(one.lock)
      return False
    one.command, one.tries = self.left[one.task.name][0], 0
    self._launch(one)
    return True

  def _launch(self, one: _Active):
    command = sweep.fill(one.command, self.workdir)
    env = dict(self.env)
    if self.gpus:
      env["CUDA_VISIBLE_DEVICES"] = self.gpus[one.slot]
    one.tries, one.since, one.told = one.tries + 1, time.monotonic(), 0
    with open(self._log(one.task), "a", encoding="utf-8") as log:
      print(f"$ {shlex.join(command)}", file=log, flush=True)
      one.process = subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        pass_fds=[one.lock],  # held until the last of the two has ended
        start_new_session=True,  # Ctrl-C comes to it from here, once
      )

  def _log(self, task):
    return self.workdir / task.name / "log.txt"

  def _goes_on(self, one: _Active) -> bool:
    """Looks at a command; -> whether its run still has one under way."""
    code = one.process.poll()
    if code is None:
      return True
    name, seconds = one.task.name, time.monotonic() - one.since
    what = pathlib.Path(one.command[0]).stem
    if code == 0:
      about = {"seconds": round(seconds, 1), "tries": one.tries}
      about["date"] = datetime.datetime.now().isoformat(timespec="seconds")
      sweep.record(one.task, one.command, self.workdir, **about)
      self.left[name].remove(one.command)
      self.ended, self.spent = self.ended + 1, self.spent + seconds
      rest = sum(map(len, self.left.values()))
      each = self.spent / self.ended / len(self.slots)
      self._say(
        name,
        f"{what} done in {time_left(seconds)}; {rest} of {self.total} "
        f"command(s) to go, about {time_left(each * rest)}",
      )
      if not self.stopped:
        return self._next(one)
    last = self._last_line(one.task)
    if code and not self.stopped:
      mistake = last.startswith(("error: ", "BUG: "))
      if not mistake and one.tries <= self.retries:
        self._say(name, f"{what} broke ({_ending(code)}): once more")
        self._launch(one)
        return True
      self._say(name, f"{what} failed ({_ending(code)}): {last}")
      self._say(name, f"all that it said is in {self._log(one.task)}")
    if self.stopped:
      self.state[name] = "stopped" if self.left[name] else "done"
    else:
      self.state[name] = "failed"
    os.close(one.lock)
    return False

  def _last_line(self, task) -> str:
    with open(self._log(task), encoding="utf-8", errors="replace") as file:
      lines = [line.strip() for line in file if line.strip()]
    return lines[-1][-300:]

  def _say(self, name, words):
    print(f"{name}: {words}", flush=True)


def _ending(code: int) -> str:
  if code < 0:
    return f"signal {-code}"
  return f"exit code {code}"
