"""MFU, memory and traces, with a device whose peak is known."""

import dataclasses
import json
import types

import jax
import tiny

from spec_stream import metrics, sharding, weights
from spec_stream.train import fit, meter
from spec_stream.train import state as states

TRAIN = tiny.TRAIN


def test_peaks_are_found_by_the_kind_of_a_device():
  device = lambda kind: types.SimpleNamespace(device_kind=kind)
  assert meter.peak(device("TPU v5 lite")) == 197e12
  assert meter.peak(device("TPU v5p")) == 459e12
  assert meter.peak(device("NVIDIA H100 80GB HBM3")) == 989e12
  assert meter.peak(device("cpu")) is None


def test_what_is_read():
  device = types.SimpleNamespace(
    device_kind="TPU v5 lite", memory_stats=lambda: {"peak_bytes_in_use": 3e9}
  )
  mesh = types.SimpleNamespace(local_devices=[device], size=4)
  found = meter.Meter(mesh, flops=197 * 10**12).read(8, 1000, 4.0)
  assert found == {"tokens_per_second": 250.0, "mfu": 0.5, "memory_gb": 3.0}
  assert set(meter.Meter(mesh, None).read(8, 1000, 4.0)) == {
    "tokens_per_second",
    "memory_gb",
  }
  line = metrics.progress_line({"step": 1, "eta_seconds": 9, **found}, 2)
  assert line == "step 1/2  250 tokens/s  MFU 50%  3.0 GB  0:09 left"


def test_a_training_says_what_it_uses_and_can_be_traced(
  tmp_path, monkeypatch, capsys
):
  tiny.use_small_data(monkeypatch)
  monkeypatch.setitem(meter.PEAKS, jax.devices()[0].device_kind, 1e9)
  monkeypatch.setattr(meter, "PROFILED", (2, 4))
  assert tiny.train(str(tmp_path), profile=True) == 0
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  used = [json.loads(line)["mfu"] for line in lines]
  assert len(used) == TRAIN.steps and all(x > 0 for x in used)
  assert "a trace of 2 steps is in" in capsys.readouterr().out
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_recomputation_is_no_progress(monkeypatch):
  """The same FLOPs whatever is computed twice: six for each weight and token,
  and those of streams and attention."""
  mesh = sharding.make_mesh()
  monkeypatch.setitem(meter.PEAKS, jax.devices()[0].device_kind, 1e9)
  batch = tiny.make_batch()

  def flops(train):
    state, shardings = states.init(tiny.SMALL, train, mesh)
    args = (tiny.SMALL, train, mesh, shardings, None, state, batch)
    return fit._meter(*args).flops

  twice = dataclasses.replace(TRAIN, remat=True, remat_logits=True)
  once = flops(TRAIN)
  assert flops(twice) == once
  shapes = weights.shapes(tiny.SMALL).items()
  kernels = sum(x.size for path, x in shapes if path.endswith("kernel"))
  least = 6 * kernels * batch["tokens"].size
  assert least < once < 4 * least
