"""What either way of reading the cache compiles to, for one chip of a TPU.

  python experiments/step_cost/ways.py [--target=tpu:v5e:2x2] [--shape=1b]
    [--layers=24] [--slots=2048] [--nodes=1,16] [--quantize=,int8,int4]
    [--one_pass_rows=N]

Needs libtpu and no TPU. Bytes that a step of the decoding loop moves in the
chip's large memory, arrays of a layer's keys or values that it copies, the
compiler's own estimate of cycles, and seconds of compilation. The kernel's
bytes are those of its operands, read whole: that it stops at the length is not
seen there, nor what it computes. It is left out where `--target` is no TPU.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from unittest import mock

from steps import SHAPES

from spec_stream import UserError, ahead, compile_check, hlo, one_pass
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models import attention
from spec_stream.text_table import table
from spec_stream.tree import TreeSpec


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="tpu:v5e:2x2")
  parser.add_argument("--shape", default="1b", choices=SHAPES)
  parser.add_argument("--layers", type=int, help="those of the shape if left")
  parser.add_argument("--slots", type=int, default=2048)
  parser.add_argument("--nodes", default="1,16", help="of the drafts")
  parser.add_argument(
    "--quantize", default="", help="kinds of model.quantize, one of them empty"
  )
  parser.add_argument(
    "--one_pass_rows", type=int, help="of one_pass.most_rows, if not its own"
  )
  args = parser.parse_args(argv)
  if args.one_pass_rows is not None:
    one_pass.most_rows = lambda *_: args.one_pass_rows
  shape = SHAPES[args.shape]
  shape = dataclasses.replace(shape, num_layers=args.layers or shape.num_layers)
  mesh = ahead.make_mesh(args.target)
  platform = args.target.split(":")[0]
  ways = {"dense": ()}
  if platform == "tpu":
    ways["kernel"] = (platform,)
  heads = (
    "kernels",
    "nodes",
    "way",
    "MB",
    "copies",
    "Mcycles",
    "compiled in s",
  )
  columns = {name: [] for name in heads}
  kinds, numbers = args.quantize.split(","), map(int, args.nodes.split(","))
  for kind, nodes in itertools.product(kinds, list(numbers)):
    config = dataclasses.replace(shape, quantize=kind)
    drafter = NoDraft()
    if nodes > 1:
      drafter = StreamDraft(TreeSpec("best_first", nodes))
    for way, kernels in ways.items():
      chosen = mock.patch.object(
        attention, "kernels_on", lambda _, kernels=kernels: kernels
      )
      begin = time.monotonic()
      with chosen:
        _, loop, _, state, _ = ahead.decoding(
          config, drafter, mesh, slots=args.slots, prompt=args.slots // 2
        )
      seconds = time.monotonic() - begin
      program = hlo.Program(loop.as_text())
      step = program.loop()
      moved = program.traffic(step)
      copies = program.copies(step, compile_check.layer_bytes(state))
      cells = (
        kind or config.param_dtype,
        str(nodes),
        way,
        f"{moved.bytes / 1e6:,.0f}",
        str(len(copies)),
        f"{moved.cycles / 1e6:.2f}",
        f"{seconds:.0f}",
      )
      for name, cell in zip(heads, cells, strict=True):
        columns[name].append(cell)
  print(table(columns, ("kernels", "way")))
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f"error: {error}")
