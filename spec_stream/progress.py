"""A progress line with the time left, on standard error."""

import sys
import time

from spec_stream.metrics import time_left


class Progress:
  """Says how far a known number of equal pieces of work has come.

    progress = Progress(len(batches), "benchmark")
    for batch in batches:
      ...
      progress.step()

  On a terminal the line is rewritten in place; elsewhere a line is printed at
  most every `every` seconds, so that a log stays short.
  """

  def __init__(self, total: int, what: str, every: float = 10.0, file=None):
    self.total, self.what, self.every = total, what, every
    self.file = file or sys.stderr
    self.live = self.file.isatty()
    self.done = 0
    self.start = self.last = time.monotonic()

  def step(self, count: int = 1):
    self.done += count
    now = time.monotonic()
    if now - self.last < (0.2 if self.live else self.every):
      if self.done < self.total:
        return
    self.last = now
    left = (now - self.start) / self.done * (self.total - self.done)
    line = f"{self.what} {self.done}/{self.total}  {time_left(left)} left"
    if self.live:
      # Erase to the end of the line: the one before may have been longer.
      end = "\n" if self.done >= self.total else ""
      print(f"\r{line}\x1b[K", end=end, file=self.file, flush=True)
    elif self.done < self.total:
      print(line, file=self.file, flush=True)
