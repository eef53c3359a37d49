"""How well training uses its devices: MFU, memory, and a trace to look at."""

import contextlib
import dataclasses

import jax
from jax.sharding import Mesh

from spec_stream import roofline

# Dense bfloat16 FLOP/s of a device, by the beginning of its `device_kind`.
PEAKS = {
  "TPU v4": roofline.CHIPS["v4"].flops,
  "TPU v5 lite": roofline.CHIPS["v5e"].flops,
  "TPU v5e": roofline.CHIPS["v5e"].flops,
  "TPU v5": roofline.CHIPS["v5p"].flops,
  "TPU v6": roofline.CHIPS["v6e"].flops,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}
PROFILED = (10, 15)  # steps since the start: the first ones compile and warm up


def peak(device) -> float | None:
  """FLOP/s of a device at best; None where that is not known."""
  kind = device.device_kind
  return next((x for name, x in PEAKS.items() if kind.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Meter:
  """flops: of the matrix products of one step on all devices, none of them
  counted twice; None where the devices' peak is not known."""

  mesh: Mesh
  flops: int | None

  def read(self, steps: int, tokens: int, seconds: float) -> dict[str, float]:
    """Metrics of the last `steps`: tokens_per_second, and where they are known
    mfu (model FLOPs utilisation, 1 is the peak) and memory_gb (the most that
    this process's first device has held)."""
    found = {"tokens_per_second": tokens / seconds}
    device = self.mesh.local_devices[0]
    if self.flops and (best := peak(device)):
      found["mfu"] = self.flops * steps / seconds / (best * self.mesh.size)
    stats = device.memory_stats() or {}  # None on a CPU
    if "peak_bytes_in_use" in stats:
      found["memory_gb"] = stats["peak_bytes_in_use"] / 1e9
    return found


def make(mesh: Mesh, step, *args) -> Meter:
  """Of a step function, traced here if its FLOPs are of use. It should compute
  nothing twice: recomputation is no progress."""
  known = peak(mesh.local_devices[0])
  return Meter(mesh, roofline.flops(step, *args) if known else None)


@contextlib.contextmanager
def profiler(directory: str):
  """A function of the steps since the start, to be called before each: it
  writes a trace of those of PROFILED to `directory` ("" for none)."""
  running = []

  def note(step: int):
    if directory and step == PROFILED[0]:
      jax.profiler.start_trace(directory)
      running.append(True)
    elif running and step == PROFILED[1]:
      running.clear()
      jax.profiler.stop_trace()
      print(f"a trace of {PROFILED[1] - PROFILED[0]} steps is in {directory}")

  try:
    yield note
  finally:
    if running:  # the end came first
      jax.profiler.stop_trace()
