"""One product with few rows, by where the kernel's outputs lie.

  python experiments/step_cost/products.py [--rows=1,4,8,16] [--rates=ROUNDS]
  XLA_FLAGS=--xla_cpu_use_xnnpack=true python experiments/step_cost/products.py

Kernels of a model's sizes, several so that none stays in a cache, multiplied
one after the other in a compiled loop: microseconds each, the best of five.
"in first": x W of W [I, out]; "panels", `panels.matmul`. Of W [out, I]: "out
first", `lora.rows_as_columns`; "x W^T", as it is written down.

--rates: FLOPs a second with --rows of panels, XLA and NumPy's BLAS, and of the
libraries with squares of 2048, where memory is no limit; in turns, medians.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.models import native, panels
from spec_stream.models.lora import rows_as_columns
from spec_stream.text_table import table

SIZES = (
  (192, 320),
  (192, 1024),
  (320, 1024),
  (768, 1280),
  (768, 4096),
  (768, 16384),
)
SIDE = 2048
HELD = 2**27  # bytes of all kernels of a size
TURNS = 10


def ways(first) -> dict:
  """Of each way its product and the kernels [I, out] as it wants them."""
  outputs = first[0].shape[1]
  other = [kernel.T for kernel in first]
  found = {"in first": (lambda x, kernel: x @ kernel, first)}
  if native.is_ready():
    multiply = lambda x, kernel: panels.matmul(x, kernel, outputs)
    found["panels"] = multiply, [panels.pack(kernel) for kernel in other]
  found["out first"] = rows_as_columns, other
  found["x W^T"] = (lambda x, kernel: x @ kernel.T), other
  return found


def timer(multiply, kernels, x):
  """-> what gives the microseconds of one product of x [R, I] with each kernel;
  I no more than outputs."""

  @jax.jit
  def run(x, kernels):
    def turn(_, x):
      for kernel in kernels:
        y = multiply(x, kernel)
        x = jnp.tanh(y[:, : x.shape[1]] + x)  # the next one waits for it
      return x

    return jax.lax.fori_loop(0, TURNS, turn, x)

  def timed():
    begin = time.perf_counter()
    jax.block_until_ready(run(x, kernels))
    return 1e6 * (time.perf_counter() - begin) / TURNS / len(kernels)

  timed()  # compiles
  return timed


def numpy_timer(kernels, x):
  """As `timer`, of NumPy's product."""

  def timed():
    begin = time.perf_counter()
    for _ in range(TURNS):
      for kernel in kernels:
        x @ kernel
    return 1e6 * (time.perf_counter() - begin) / TURNS / len(kernels)

  return timed


def rates(counts, rounds: int) -> dict[str, float]:
  """GFLOP/s of each way with each number of rows, and with squares."""
  square = np.full((SIDE, SIDE), 1 / SIDE, np.float32)
  turns = {
    "XLA, squares": (timer(jnp.matmul, [square], square), 2 * SIDE**3),
    "NumPy, squares": (numpy_timer([square], square), 2 * SIDE**3),
  }
  inputs, outputs = SIZES[-2]
  size = 4 * inputs * outputs
  many = [np.ones((inputs, outputs), np.float32) for _ in range(HELD // size)]
  here = ways([jnp.asarray(kernel) for kernel in many])
  for rows in counts:
    flops, x = 2 * rows * inputs * outputs, np.ones((rows, inputs), np.float32)
    for name, (multiply, kernels) in here.items():
      turns[f"{name}, {rows} rows"] = timer(multiply, kernels, x), flops
    turns[f"NumPy, {rows} rows"] = numpy_timer(many, x), flops
  found = {name: [] for name in turns}
  for _ in range(rounds):
    for name, (timed, flops) in turns.items():
      found[name].append(flops / timed() / 1e3)
  return {name: float(np.median(x)) for name, x in found.items()}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", default="1,4,8,16")
  parser.add_argument("--rates", type=int, default=0, metavar="ROUNDS")
  args = parser.parse_args(argv)
  counts = [int(rows) for rows in args.rows.split(",")]
  if not native.is_ready():
    print("no C++ compiler that can compile panels.cc: left out")
  if args.rates:
    for name, rate in rates(counts, args.rates).items():
      print(f"{name:24s}{rate:5.0f} GFLOP/s")
    return 0
  columns = {name: [] for name in ("kernel", "MB", "way")}
  columns |= {f"{rows} rows, us": [] for rows in counts}
  for inputs, outputs in SIZES:
    size = 4 * inputs * outputs
    keys = jax.random.split(jax.random.key(0), max(HELD // size, 1))
    first = [jax.random.normal(key, (inputs, outputs)) for key in keys]
    for name, (multiply, kernels) in ways(first).items():
      columns["kernel"].append(f"{inputs} x {outputs}")
      columns["MB"].append(f"{size / 1e6:.1f}")
      columns["way"].append(name)
      for rows in counts:
        timed = timer(multiply, kernels, jnp.ones((rows, inputs)))
        cell = min(timed() for _ in range(5))
        columns[f"{rows} rows, us"].append(f"{cell:.0f}")
  print(table(columns, ("kernel", "way")))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
