"""What a program costs a chip, and the shortest time in which a chip of its
kind could do it.

FLOPs are those of all matrix products of the traced program, loops and
recomputation counted as often as they are done, shared evenly by the chips;
bytes and collectives are read off the compiled one (`hlo`).
"""

import dataclasses
import math

import jax

from spec_stream.hlo import Traffic


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


def flops(function, *args) -> int:
  """Of the matrix products of `function(*args)`; args may be abstract."""
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
  total, by_platform = 0, []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (inner, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      summed = math.prod(left[axis] for axis in inner)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * summed
      continue
    times = equation.params.get("length", 1)  # of a scan
    if equation.primitive.name == "pallas_call":  # of a block of its grid
      times = math.prod(equation.params["grid_mapping"].grid)
    inside = [_flops(sub) for sub in _within(equation.params)]
    if equation.primitive.name == "platform_index":
      by_platform += equation.outvars
    if equation.primitive.name == "cond":
      index = equation.invars[0]
      if any(index is x for x in by_platform):
        inside = inside[-1:]  # what the program asks for: that of any other
      else:
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


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one program on one chip; times are in seconds."""

  flops: float
  traffic: Traffic
  chip: Chip

  @property
  def parts(self) -> dict[str, float]:
    moved = sum(size for _, _, size in self.traffic.collectives)
    return {
      "FLOPs": self.flops / self.chip.flops,
      "memory": self.traffic.bytes / self.chip.bandwidth,
      "links": moved / self.chip.links,
    }

  @property
  def seconds(self) -> float:
    """If all three overlap without a gap."""
    return max(self.parts.values())

  @property
  def bound(self) -> str:
    return max(self.parts, key=self.parts.get)
