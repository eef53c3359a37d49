"""Where the time of a step goes, by the model's named scopes.

  python experiments/step_cost/stages.py [--shape=86m] [--nodes=1,4,16]

Decodes one prompt under `jax.profiler` and adds up, for each scope (verify/qkv,
verify/head, draft, ...), what the trace says of its operations. On a CPU; two
threads that work at a time count twice, and what is between operations not.
"""

import argparse
import collections
import glob
import re
import sys
import tempfile

import jax
import numpy as np
from steps import SHAPES

from spec_stream import (
  NoDraft,
  StreamDraft,
  TreeSpec,
  decode,
  hlo,
  weights,
)
from spec_stream.text_table import table

# Below `verify` a scope counts by itself; below the others it does not.
_SCOPE = re.compile(
  r"while/body/(verify/(?:qkv|attend|out|ffw|head|prune|insert_streams)|"
  r"verify|accept|commit|draft)\b"
)


def scopes(text: str) -> dict[str, str]:
  """{instruction of an optimised program: its scope}; of one that the compiler
  left without a name that of the first that reads it."""
  found = {}
  for inside in hlo.Program(text).computations.values():
    for i in reversed(inside.values()):  # what reads comes after
      path = re.search(r'op_name="([^"]*)"', i.rest)
      match = _SCOPE.search(path[1]) if path else None
      if match:
        found[i.name] = match[1]
      for name in i.operands if i.name in found else ():
        if name in inside and "op_name=" not in inside[name].rest:
          found[name] = found[i.name]
  return found


def milliseconds(decoder, prompt, new: int) -> dict[str, float]:
  """{scope: ms a step}, and all that has none as "rest"."""
  start = lambda: jax.block_until_ready(
    decoder.start([prompt], max_new_tokens=new)
  )
  done = decoder.finish(start())  # compiles
  steps = int(done.target_calls[0]) - 1
  program = decode._loop.lower(
    decoder.graphdef,
    drafter=decoder.drafter,
    weights=decoder.weights,
    state=start(),
  ).compile()
  scope, state = scopes(program.as_text()), start()
  total = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(decoder.finish(state))
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    for plane in jax.profiler.ProfileData.from_file(path).planes:
      for line in plane.lines:
        for event in line.events:
          inside = "hlo_op" in dict(event.stats)
          if inside and not event.name.startswith("while"):
            total[scope.get(event.name, "rest")] += event.duration_ns
  return {name: ns / 1e6 / steps for name, ns in total.items()}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="86m", choices=SHAPES)
  parser.add_argument("--nodes", default="1,4,16", help="1: plain decoding")
  parser.add_argument("--length", type=int, default=100, help="of the prompt")
  parser.add_argument("--new", type=int, default=48)
  args = parser.parse_args(argv)
  config = SHAPES[args.shape]
  model = weights.to_model(config, jax.jit(lambda: weights.init(config, 0))())
  rng = np.random.default_rng(0)
  prompt = rng.integers(1, config.vocab_size, args.length).tolist()
  found = {}
  for nodes in map(int, args.nodes.split(",")):
    tree = StreamDraft(TreeSpec("best_first", nodes))
    decoder = decode.Decoder(model, tree if nodes > 1 else NoDraft())
    found[f"{nodes} nodes, ms"] = milliseconds(decoder, prompt, args.new)
  names = sorted({name for times in found.values() for name in times})
  columns = {"scope": [*names, "all"]}
  for title, times in found.items():
    cells = [f"{times.get(name, 0):.2f}" for name in names]
    columns[title] = [*cells, f"{sum(times.values()):.2f}"]
  print(table(columns, ("scope",)))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
