"""metrics.jsonl survives kills and resumes; the progress line reads well."""

import json
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_stream import metrics
from spec_stream.errors import UserError
from spec_stream.metrics import MetricWriter, append_jsonl, read_jsonl

RECORDS = [{"step": i, "loss": 1 / i, "note": "é 日本"} for i in range(1, 6)]


def write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


@given(st.data())
def test_a_file_cut_anywhere_gives_the_records_before_the_cut(
  tmp_path_factory, data
):
  whole = "".join(
    json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS
  ).encode()
  cut = data.draw(st.integers(0, len(whole)))
  path = write(tmp_path_factory.mktemp("cut") / "m.jsonl", whole[:cut])
  read = read_jsonl(path)
  assert read == RECORDS[: len(read)]
  complete = whole[:cut].count(b"\n")
  assert complete <= len(read) <= complete + 1

  append_jsonl(path, [{"step": 99}])  # after the torn line was taken away
  assert read_jsonl(path) == [*read, {"step": 99}]
  assert path.read_bytes().endswith(b'}\n{"step": 99}\n') or not read


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"a": 1}\n{"a": \n{"a": 3}\n', "line 2: not JSON"),
    ('{"a": 1}\n{"a": 2\n', "line 2: not JSON"),  # complete, so not torn
    ('{"a": 1}\n[2]\n', "line 2: not a JSON object"),
    ('{"a": 1}\n\n7', "line 3: not a JSON object"),
  ],
)
def test_a_corrupt_line_is_named(tmp_path, text, message):
  path = write(tmp_path / "m.jsonl", text)
  with pytest.raises(UserError, match=message) as error:
    read_jsonl(path)
  assert str(path) in str(error.value)


def test_not_a_number_is_a_gap(tmp_path):
  path = write(tmp_path / "m.jsonl", '{"a": NaN, "b": -Infinity, "c": 1}\n')
  assert read_jsonl(path) == [{"a": None, "b": None, "c": 1}]


class Clock:
  """Time that a test moves by hand."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


def test_writer_records_time_and_estimate(tmp_path, monkeypatch, capsys):
  clock = Clock(monkeypatch)
  with MetricWriter(tmp_path, num_steps=800) as writer:
    clock.now += 50  # the first steps hold the compilation
    writer.write(10, {"loss": 9.0})
    clock.now += 11  # 110 steps at 10 a second
    record = writer.write(
      120,
      {
        "loss": 2.3149,
        "accept_1": 0.62,
        "accept_2": 0.409,
        "accept_3": 0.3,
        "tokens_per_second": 31200.4,
      },
    )
  assert record["step"] == 120 and record["seconds"] == 61
  assert record["eta_seconds"] == 68.0
  assert read_jsonl(tmp_path / "metrics.jsonl")[-1] == record
  assert capsys.readouterr().out.splitlines()[-1] == (
    "step 120/800  loss 2.31  accept 0.62 0.41 0.30  31,200 tokens/s  1:08 left"
  )


def test_resume_drops_later_lines_and_goes_on(tmp_path, monkeypatch):
  clock = Clock(monkeypatch)
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(tmp_path, num_steps=100) as writer:
    for step in (10, 20, 30, 40):
      clock.now += 5
      writer.write(step, {"loss": 100 - step})
  before = path.read_text().splitlines()
  with path.open("a") as file:
    file.write('{"step": 50, "lo')  # kill -9 in the middle of a write
  clock.now += 1000  # the time between the two runs does not count
  with MetricWriter(tmp_path, num_steps=100, start_step=20) as writer:
    assert path.read_text().splitlines() == before[:2]
    clock.now += 5
    writer.write(30, {"loss": 70})
  # The same line as before the kill, its seconds and estimate included.
  assert path.read_text().splitlines() == before[:3]
  assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_starts_again_drops_all(tmp_path):
  with MetricWriter(tmp_path, num_steps=2) as writer:
    writer.write(1, {"loss": 1.0})
  MetricWriter(tmp_path, num_steps=2).close()
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_corrupt_curve_stops_the_resume(tmp_path):
  write(tmp_path / "metrics.jsonl", 'garbage\n{"step": 1}\n')
  with pytest.raises(UserError, match="line 1"):
    MetricWriter(tmp_path, num_steps=2, start_step=1)


def test_infinite_loss_is_null_in_the_file(tmp_path, capsys):
  with MetricWriter(tmp_path, num_steps=2) as writer:
    writer.write(1, {"loss": float("nan"), "loss_main": float("inf")})
  line = (tmp_path / "metrics.jsonl").read_text()
  assert '"loss": null' in line and '"loss_main": null' in line
  assert re.match(r"step 1/2  \d+:\d\d left", capsys.readouterr().out)


def test_other_processes_write_nothing(tmp_path, capsys):
  with MetricWriter(tmp_path / "run", num_steps=2, active=False) as writer:
    writer.write(1, {"loss": 1.0})
  assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_tensorboard_has_the_scalars(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  with MetricWriter(tmp_path, num_steps=20) as writer:
    writer.write(10, {"loss": 2.5, "accept_1": 0.5})
    writer.write(20, {"loss": 1.5, "accept_1": 0.75})
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, seen = path.read_bytes(), {}
  while data:  # a record: length, checksum of it, event, checksum of that
    (size,) = struct.unpack("<Q", data[:8])
    event = Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    for value in event.summary.value:
      seen[value.tag, event.step] = value.simple_value
  assert seen["loss", 10] == 2.5 and seen["loss", 20] == 1.5
  assert seen["accept_1", 20] == 0.75


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0:00"), (61.6, "1:02"), (3599.6, "1:00:00"), (3723, "1:02:03")],
)
def test_time_left(seconds, text):
  assert metrics.time_left(seconds) == text
