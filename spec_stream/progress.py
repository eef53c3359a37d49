"""A progress line with the time left, on standard error."""

import sys
import time

from spec_stream.metrics import time_left


class Progress:
  """Says how far work has come: call it with (pieces done, pieces in all).

  On a terminal the line is rewritten in place; elsewhere a line is printed at
  most every `every` seconds, so that a log stays short.
  """

  def __init__(self, what: str, every: float = 10.0, file=None):
    self.what, self.every = what, every
    self.file = file or sys.stderr
    self.live = self.file.isatty()
    self.start = self.last = time.monotonic()
    self.before = 0  # done when the clock started: not part of the rate

  def __call__(self, done: int, total: int):
    now = time.monotonic()
    if not self.before and done < total:
      self.before, self.start = done, now
      return
    if now - self.last < (0.2 if self.live else self.every) and done < total:
      return
    self.last = now
    rate = (now - self.start) / max(done - self.before, 1)
    line = (
      f"{self.what} {done}/{total}  {time_left(rate * (total - done))} left"
    )
    if self.live:
      # Erase to the end of the line: the one before may have been longer.
      end = "\n" if done >= total else ""
      print(f"\r{line}\x1b[K", end=end, file=self.file, flush=True)
    elif done < total:
      print(line, file=self.file, flush=True)
