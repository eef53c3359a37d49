"""One product with few rows, by where the kernel's outputs lie.

  python experiments/step_cost/products.py [--rows=1,4,8,16]
  XLA_FLAGS=--xla_cpu_use_xnnpack=true python experiments/step_cost/products.py

Kernels of a model's sizes, several so that none stays in a cache, multiplied
one after the other in a compiled loop: microseconds each, the best of five.
"in first": x W of W [I, out]. "out first": `lora.matmul_out_first` of W
[out, I]. "x W^T": of the same, as it is written down.
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp

from spec_stream.models.lora import matmul, matmul_out_first
from spec_stream.text_table import table

SIZES = ((192, 1024), (320, 1024), (768, 1280), (768, 4096), (768, 16384))
HELD = 2**27  # bytes of all kernels of a size
TURNS = 10
WAYS = {
  "in first": matmul,
  "out first": matmul_out_first,
  "x W^T": lambda x, kernel: matmul(x, kernel.T),
}


def microseconds(multiply, kernels, rows: int) -> float:
  """Of one product of [1, rows, I] with each kernel."""

  @jax.jit
  def run(x, kernels):
    def turn(_, x):
      for kernel in kernels:
        y = multiply(x, kernel)
        x = jnp.tanh(y[..., : x.shape[2]] + x)  # the next one waits for it
      return x

    return jax.lax.fori_loop(0, TURNS, turn, x)

  inputs = min(kernels[0].shape)
  x, found = jnp.ones((1, rows, inputs)), []
  for _ in range(6):  # the first compiles
    begin = time.perf_counter()
    jax.block_until_ready(run(x, kernels))
    found.append(time.perf_counter() - begin)
  return 1e6 * min(found[1:]) / TURNS / len(kernels)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rows", default="1,4,8,16")
  args = parser.parse_args(argv)
  counts = [int(rows) for rows in args.rows.split(",")]
  columns = {name: [] for name in ("kernel", "MB", "way")}
  columns |= {f"{rows} rows, us": [] for rows in counts}
  for inputs, outputs in SIZES:
    size = 4 * inputs * outputs
    keys = jax.random.split(jax.random.key(0), max(HELD // size, 1))
    first = [jax.random.normal(key, (inputs, outputs)) for key in keys]
    other = [kernel.T for kernel in first]
    for name, multiply in WAYS.items():
      columns["kernel"].append(f"{inputs} x {outputs}")
      columns["MB"].append(f"{size / 1e6:.1f}")
      columns["way"].append(name)
      kernels = first if name == "in first" else other
      for rows in counts:
        cell = f"{microseconds(multiply, kernels, rows):.0f}"
        columns[f"{rows} rows, us"].append(cell)
  print(table(columns, ("kernel", "way")))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
