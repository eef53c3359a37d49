"""Where the time of a step goes, by the model's named scopes."""

import collections
import glob
import re
import tempfile
from collections.abc import Sequence

import jax

from spec_stream import decode, hlo

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


def milliseconds(
  decoder: decode.Decoder, prompts: Sequence[Sequence[int]], **settings
) -> dict[str, float]:
  """{scope: ms a step} of one batch, and all that has none as "rest".

  What `jax.profiler` says of the operations of the decoding loop: operations
  that run at a time count each, and what is between them not. Compiles the loop
  once more, to read its scopes. settings: as of `Decoder.start`. {} if prefill
  alone ends every row.
  """
  start = lambda: jax.block_until_ready(decoder.start(prompts, **settings))
  done = decoder.finish(start())  # compiles
  steps = int(done.target_calls.max()) - 1
  if not steps:
    return {}
  state = start()
  program = decode._loop.lower(
    decoder.graphdef,
    drafter=decoder.drafter,
    weights=decoder.weights,
    state=state,
  ).compile()
  scope = scopes(program.as_text())
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
