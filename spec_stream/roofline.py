"""What a compiled program costs a chip: FLOPs, bytes, collectives, and the
shortest time in which a chip of its kind could do them.

FLOPs are those of all matrix products of the traced program, loops and
recomputation counted as often as they are done, shared evenly by the chips.
Bytes are the compiler's count (`cost_analysis`) of one chip; the body of a loop
counts once there, so for the decoding loop they are those of one step, and for
a training step with segments they are too few. Collectives are the results of
those in the program text, each counted once.
"""

import dataclasses
import math
import re

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks: bfloat16 FLOP/s, bytes/s of memory, bytes of memory,
  bytes/s to other chips (all links, one direction)."""

  flops: float
  bandwidth: float
  memory: float
  links: float


# Google's system architecture pages of each generation.
CHIPS = {
  "v4": Chip(275e12, 1228e9, 32 * 2**30, 300e9),
  "v5e": Chip(197e12, 819e9, 16 * 2**30, 200e9),
  "v5p": Chip(459e12, 2765e9, 95 * 2**30, 600e9),
  "v6e": Chip(918e12, 1640e9, 32 * 2**30, 448e9),
}

COLLECTIVES = (
  "all-reduce all-gather reduce-scatter all-to-all collective-permute"
).split()
_KINDS = "|".join(COLLECTIVES)
# But for all-reduce, a "-start" names its operand beside its result.
_RESULT = re.compile(rf"= (\([^=]*?\)|\S+) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def flops(function, *args) -> int:
  """Of the matrix products of `function(*args)`; args may be abstract."""
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (inner, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      summed = math.prod(left[axis] for axis in inner)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
      continue
    times = equation.params.get("length", 1)  # of a scan
    inside = [_flops(sub) for sub in _within(equation.params)]
    if equation.primitive.name == "cond":
      inside = [max(inside, default=0)]
    total += times * sum(inside)
  return total


def _within(params: dict):
  """The programs inside an equation."""
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """{kind: (how many, bytes of their results)} of an optimised program."""
  found = {}
  for shape, kind, started in _RESULT.findall(text):
    sizes = [
      math.prod(map(int, filter(None, dims.split(",")))) * _width(kind_)
      for kind_, dims in _ARRAY.findall(shape)
    ]
    if started and len(sizes) > 1 and kind != "all-reduce":
      sizes = sizes[1:2]  # (operand, result, ...)
    size = sum(sizes)
    count, bytes_ = found.get(kind, (0, 0))
    found[kind] = (count + 1, bytes_ + size)
  return found


def _width(kind: str) -> int:
  """Bytes of an element, by its name in a program: f32, bf16, pred."""
  if kind == "pred":
    return 1
  return max(int(re.sub(r"\D", "", kind)) // 8, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one program on one chip; times are in seconds."""

  flops: float
  bytes: float
  collectives: dict[str, tuple[int, int]]
  chip: Chip

  @property
  def parts(self) -> dict[str, float]:
    moved = sum(size for _, size in self.collectives.values())
    return {
      "FLOPs": self.flops / self.chip.flops,
      "memory": self.bytes / self.chip.bandwidth,
      "links": moved / self.chip.links,
    }

  @property
  def seconds(self) -> float:
    """If all three overlap without a gap."""
    return max(self.parts.values())

  @property
  def bound(self) -> str:
    return max(self.parts, key=self.parts.get)


def cost(compiled, total_flops: float, devices: int, chip: Chip) -> Cost:
  """Of a compiled program; total_flops: of all devices together."""
  bytes_ = compiled.cost_analysis().get("bytes accessed", 0.0)
  return Cost(
    total_flops / devices, bytes_, collectives(compiled.as_text()), chip
  )


def host_transfers(text: str) -> list[str]:
  """Lines of an optimised program that talk to the host."""
  form = r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(|xla_ffi_python"
  return [line for line in text.splitlines() if re.search(form, line)]


def copies(text: str, shape) -> list[str]:
  """Lines of an optimised program that copy an array of this shape."""
  dims = ",".join(map(str, shape))
  form = rf"= \w+\[{dims}\]\S* copy(-start)?\("
  return [line for line in text.splitlines() if re.search(form, line)]
