"""Where the time of a step goes, by the model's named scopes."""

import collections
import glob
import re
import tempfile
from collections.abc import Sequence

import jax

from spec_stream import decode, hlo
from spec_stream.errors import UserError

# Below `verify` a scope counts by itself; below the others it does not.
_SCOPE = re.compile(
  r"while/body/(verify/(?:qkv|attend|out|ffw|head|prune|insert_streams)|"
  r"verify|accept|commit|streams|draft)\b"
)


def scopes(program: hlo.Program) -> dict[str, str]:
  """{instruction: its scope}; of one that the compiler left without a name that
  of the first that reads it."""
  found = {}
  for inside in program.computations.values():
    for i in reversed(inside.values()):  # what reads comes after
      path = re.search(r'op_name="([^"]*)"', i.rest)
      match = _SCOPE.search(path[1]) if path else None
      if match:
        found[i.name] = match[1]
      for name in i.operands if i.name in found else ():
        if name in inside and "op_name=" not in inside[name].rest:
          found[name] = found[i.name]
  return found


def kernels(program: hlo.Program, scope: dict[str, str]) -> dict[str, str]:
  """{a GPU's kernel: its scope}, for traces that name no instruction.

  XLA names a kernel as the instruction, and one for all that are alike, by the
  first; Pallas as it was told, which counts if all of that name are of one
  scope. Those of libraries (cuBLAS) are not known.
  """
  told = collections.defaultdict(set)
  for inside in program.computations.values():
    for i in inside.values():
      match = re.search(r"/(\w+)/pallas_call\"", i.rest)
      if match and i.name in scope:
        told[match[1]].add(scope[i.name])
  sure = {name: found.pop() for name, found in told.items() if len(found) == 1}
  return {re.sub(r"\W", "_", name): scope[name] for name in scope} | sure


def milliseconds(
  decoder: decode.Decoder, prompts: Sequence[Sequence[int]], **settings
) -> dict[str, float]:
  """{scope: ms a step} of one batch, and all that has none as "rest".

  What `jax.profiler` says of the operations of the decoding loop: operations
  that run at a time count each, and what is between them not. A program that
  JAX kept from a former process has the scopes of that one's code, unless
  jax_compilation_cache_include_metadata_in_key is set. settings: as of
  `Decoder.start`. {} if prefill alone ends every row.

  Raises: UserError if the profiler leaves nothing to read.
  """
  settings["grow"] = False  # one program
  start = lambda: jax.block_until_ready(decoder.start(prompts, **settings))
  done = decoder.finish(start())  # compiles
  steps = int(done.target_calls.max()) - 1
  if not steps:
    return {}
  state = start()
  program = hlo.Program(decoder.lower(state).compile().as_text())
  scope, around = scopes(program), _around(program)
  of_kernel = kernels(program, scope)
  total = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(decoder.finish(state))
    paths = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    if not paths:
      raise UserError("the profiler wrote no trace: is it allowed here?")
    for op, kernel, nanoseconds in _operations(paths[0]):
      if op not in around:
        kernel = re.sub(r"__\d+$", "", kernel)  # of several of one name
        total[scope.get(op) or of_kernel.get(kernel, "rest")] += nanoseconds
  return {name: ns / 1e6 / steps for name, ns in total.items()}


def _around(program: hlo.Program) -> set[str]:
  """Instructions whose time is that of what they hold."""
  return {
    i.name
    for inside in program.computations.values()
    for i in inside.values()
    if i.op in ("while", "call", "conditional")
  }


def _operations(path: str):
  """(instruction, its kernel, nanoseconds) of each that a trace has; of a
  device's own clock where there is one. Of what a GPU runs as one graph the
  instruction is the graph's."""
  found = {"/device:": [], "": []}
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    kind = "/device:" if plane.name.startswith("/device:") else ""
    for line in plane.lines:
      for event in line.events:
        op = dict(event.stats).get("hlo_op")
        if op:
          found[kind].append((op, event.name, event.duration_ns))
  return found["/device:"] or found[""]
