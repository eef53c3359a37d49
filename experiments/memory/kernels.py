"""Does a loop copy the kernels that it multiplies by?

  python experiments/memory/kernels.py --target=tpu:v5p:2x2x1

Compiles, and never runs, a loop around one product of 32 rows with each kernel
of a layer of Llama-2-7B's shape, as `models.lora` does it (the kernel reshaped
to a matrix) and with the kernel stored as a matrix. Temporaries as large as the
kernel are a copy of it.
"""

import argparse
import math
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spec_stream import UserError, ahead
from spec_stream.text_table import table

# Kernel -> shape, and how many of its axes are inputs.
KERNELS = {
  "attention/qkv": ((4096, 32, 3, 128), 1),
  "attention/out": ((32, 1, 128, 4096), 3),
  "ffw/gate_up": ((4096, 2, 11008), 1),
  "ffw/down": ((11008, 4096), 1),
}


def temporaries(shape: tuple[int, ...], inputs: int, mesh) -> int:
  """Bytes that the loop needs beside its arguments and results."""
  place = NamedSharding(mesh, P())
  array = lambda *shape: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=place
  )
  width = math.prod(shape[:inputs])

  def loop(x, kernel):
    def body(state):
      i, x = state
      y = x @ kernel.reshape(width, -1)
      return i + 1, x + jnp.tanh(y[:, :1])

    return jax.lax.while_loop(lambda state: state[0] < 9, body, (0, x))

  lowered = jax.jit(loop).lower(array(32, width), array(*shape))
  return ahead.memory(lowered.compile())["temporaries"]


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="cpu", help=ahead.TARGET_HELP)
  args = parser.parse_args(argv)
  columns = {name: [] for name in ("kernel, MB", "size", "as it is", "matrix")}
  try:
    mesh = ahead.make_mesh(args.target)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  for name, (shape, inputs) in KERNELS.items():
    matrix = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    sizes = (
      2 * math.prod(shape),
      temporaries(shape, inputs, mesh),
      temporaries(matrix, 1, mesh),
    )
    cells = [f"{name} {list(shape)}", *(f"{x / 1e6:.1f}" for x in sizes)]
    for column, cell in zip(columns.values(), cells, strict=True):
      column.append(cell)
  print(table(columns, ("kernel, MB",)))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
