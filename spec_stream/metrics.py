"""Training curves on disk, and the progress line.

`metrics.jsonl` holds one JSON object a log step. It is what a report reads and
what survives a kill: every line is flushed, a line torn by `kill -9` is
dropped, and resuming from step s removes the lines beyond s, so the curve goes
on as if nothing had happened.
"""

import json
import math
import os
import time

from spec_stream import json_text
from spec_stream.errors import UserError


def read_jsonl(path):
  """-> list of the objects in a JSON Lines file.

  A last line without its newline that is no JSON was torn by a kill, and is
  left out. Any other line that is no JSON object is an error with its number.
  NaN and infinities, which JSON does not have, are read as None.
  """
  with open(path, encoding="utf-8", errors="replace") as file:
    lines = file.read().split("\n")
  records = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      record = json_text.parse(line, parse_constant=lambda _: None)
    except ValueError as error:
      if number == len(lines):
        break
      raise UserError(
        f"{path}, line {number}: not JSON ({error}); mend or remove it"
      ) from error
    if not isinstance(record, dict):
      raise UserError(f"{path}, line {number}: not a JSON object: {line:.40}")
    records.append(record)
  return records


def write_jsonl(path, records):
  """Replaces the file at once: a reader sees the old or the new, never half."""
  temporary = f"{path}.{os.getpid()}.tmp"
  with open(temporary, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def append_jsonl(path, records):
  """Adds lines to a file, after taking away a torn last one."""
  if os.path.exists(path):
    with open(path, "rb") as file:
      if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
      torn = file.read(1) not in (b"", b"\n")
    if torn:
      write_jsonl(path, read_jsonl(path))
  with open(path, "a", encoding="utf-8") as file:
    file.writelines(json.dumps(record) + "\n" for record in records)


def time_left(seconds):
  """62 -> "1:02", 3723 -> "1:02:03"."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
  )


def progress_line(record, num_steps):
  """One line for a person, from one line of metrics.jsonl."""
  parts = [f"step {record['step']}/{num_steps}"]
  if record.get("loss") is not None:
    parts.append(f"loss {record['loss']:.2f}")
  accept = []
  while record.get(f"accept_{len(accept) + 1}") is not None:
    accept.append(f"{record[f'accept_{len(accept) + 1}']:.2f}")
  if accept:
    parts.append("accept " + " ".join(accept))
  if record.get("tokens_per_second"):
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
  if record.get("mfu"):
    parts.append(f"MFU {record['mfu']:.0%}")
  if record.get("memory_gb"):
    parts.append(f"{record['memory_gb']:.1f} GB")
  parts.append(f"{time_left(record['eta_seconds'])} left")
  return "  ".join(parts)


class MetricWriter:
  """Writes one log step to metrics.jsonl, TensorBoard and standard output.

    with MetricWriter(workdir, num_steps=800, start_step=120) as writer:
      writer.write(130, {"loss": loss, "accept_1": accept})

  Adds `step`, `seconds` (of training, those before a resume included) and
  `eta_seconds`. With active=False (all but the first process) it does nothing.
  """

  def __init__(self, workdir, num_steps, *, start_step=0, active=True):
    self.active = active
    if not active:
      return
    from tensorboardX import SummaryWriter

    os.makedirs(workdir, exist_ok=True)
    self.path = os.path.join(workdir, "metrics.jsonl")
    self.num_steps = num_steps
    before = self._resume(start_step)
    self._start = time.monotonic() - before
    self._mark = (start_step, time.monotonic())  # where the rate is taken from
    self._first = True
    self._board = SummaryWriter(
      os.path.join(workdir, "tensorboard"),
      purge_step=start_step + 1 if start_step else None,
      flush_secs=10,
    )

  def _resume(self, start_step):
    """Drops lines beyond start_step; -> seconds of training in the others."""
    if not os.path.exists(self.path):
      return 0.0
    records = read_jsonl(self.path)
    kept = [r for r in records if r.get("step", 0) <= start_step]
    write_jsonl(self.path, kept)
    return max((r.get("seconds", 0.0) for r in kept), default=0.0)

  def write(self, step, metrics):
    """Logs {name: scalar} at a step (count of finished ones); -> the record."""
    if not self.active:
      return {}
    now = time.monotonic()
    since_step, since = self._mark
    rate = (now - since) / max(step - since_step, 1)
    if self._first:  # from here on the rate is free of the compilation
      self._mark, self._first = (step, now), False
    record = {
      "step": int(step),
      **{name: float(value) for name, value in metrics.items()},
      "seconds": round(now - self._start, 3),
      "eta_seconds": round(max(self.num_steps - step, 0) * rate, 1),
    }
    # JSON has no word for infinity or not-a-number; null is a gap in the curve.
    record = {k: v if math.isfinite(v) else None for k, v in record.items()}
    append_jsonl(self.path, [record])
    for name, value in record.items():
      if value is not None and name != "step":
        self._board.add_scalar(name, value, step)
    print(progress_line(record, self.num_steps), flush=True)
    return record

  def close(self):
    if self.active:
      self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()
