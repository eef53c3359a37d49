"""What an optimised program moves: read off its text (`compiled.as_text()`).

The compiler's own sum, `cost_analysis`, counts a weight that is brought into
on-chip memory three times, and adds what is done before a loop to what is done
in it. Here only traffic of the large memory counts, a loop's body as often as
the loop is known to turn, and of an array that is sliced or updated in place
the slice alone.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = (
  "all-reduce all-gather reduce-scatter all-to-all collective-permute"
).split()
# They move nothing, or their parts are counted instead.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all iota "
  "partition-id replica-id opt-barrier".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # operand with the update
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# Its last group is the memory, if it is not the large one: S(1) is on chip.
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\](\{[^}]*?S\(\d+\)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  rest: str  # after the opening bracket
  root: bool

  def called(self, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Traffic:
  """bytes: read and written, of the chip's large memory; collectives: {kind:
  (how many, bytes of their results)}; cycles: as the TPU compiler estimates
  them, 0 where it says nothing."""

  bytes: int = 0
  collectives: tuple[tuple[str, int, int], ...] = ()
  cycles: int = 0

  def __add__(self, other: "Traffic") -> "Traffic":
    sums: dict[str, list[int]] = {}
    for kind, count, size in self.collectives + other.collectives:
      total = sums.setdefault(kind, [0, 0])
      total[0] += count
      total[1] += size
    merged = tuple((kind, *total) for kind, total in sums.items())
    return Traffic(self.bytes + other.bytes, merged, self.cycles + other.cycles)

  def times(self, count: int) -> "Traffic":
    return Traffic(
      self.bytes * count,
      tuple((k, n * count, size * count) for k, n, size in self.collectives),
      self.cycles * count,
    )


class Program:
  """The computations of a program, by name."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        current = self.computations.setdefault(head[2], {})
        self.entry = head[2] if head[1] else self.entry
        continue
      found = _LINE.match(line)
      if found:
        root, name, shape, op, rest = found.groups()
        operands = tuple(re.findall(r"%([\w.\-]+)", _brackets(rest)))
        current[name] = Instruction(name, shape, op, operands, rest, bool(root))

  def loops(self) -> list[str]:
    """Bodies of the loops that turn a number of times not known before."""
    return [
      i.called("body")
      for inside in self.computations.values()
      for i in inside.values()
      if i.op == "while" and not self._turns(i, inside)
    ]

  def loop(self) -> str:
    """Of `loops` the one that moves most: of decoding, a step."""
    return max(self.loops(), key=lambda name: self.traffic(name).bytes)

  @functools.cache  # noqa: B019 (programs are few, and short-lived)
  def traffic(self, name: str) -> Traffic:
    """Of a computation; a loop of unknown length counts once."""
    total = Traffic()
    inside = self.computations[name]
    for i in inside.values():
      if i.op == "while":
        turns = self._turns(i, inside) or 1
        total += self.traffic(i.called("body")).times(turns)
      elif i.op == "call":
        total += self.traffic(i.called("to_apply"))
      elif i.op == "conditional":
        costs = [self.traffic(name) for name in self._branches(i)]
        total += max(costs, key=lambda cost: cost.bytes, default=Traffic())
      elif i.op not in _FREE and not i.op.endswith("-done"):
        total += Traffic(self._moved(i, inside), (), _cycles(i))
        for one in (i, *self._within(i)):
          total += Traffic(0, collective(one))
    return total

  def _branches(self, i: Instruction) -> list[str]:
    """The computations of which a conditional runs one."""
    found = re.findall(r"branch_computations=\{([^}]+)\}", i.rest)
    found += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", i.rest)
    names = [name.strip(" %,") for part in found for name in part.split(",")]
    return [name for name in names if name in self.computations]

  def _within(self, i: Instruction):
    """What a fusion that starts a collective holds; else nothing."""
    called = i.called("calls") if _starts(i) else ""
    return self.computations.get(called, {}).values()

  def _turns(self, loop: Instruction, around) -> int:
    """How often a loop turns; 0 where that is not known. around: the
    instructions among which it stands."""
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if found:
      return int(found[1])
    # Of a scan: the counter, which goes up by one, is below a constant.
    inside = self.computations.get(loop.called("condition"), {})
    root = next((x for x in inside.values() if x.root), None)
    if root is None or len(root.operands) != 2:
      return 0
    fused = self.computations.get(root.called("calls"), {}).values()
    tests = [x for x in (root, *fused) if x.op == "compare"]
    if not tests or "direction=LT" not in tests[0].rest:
      return 0
    counter, last = (inside[name] for name in root.operands)
    at = re.search(r"\bindex=(\d+)", counter.rest)
    state = around.get(loop.operands[0])
    if not at or state is None or state.op != "tuple":
      return 0
    first = around[state.operands[int(at[1])]]
    while first.op in ("copy", "bitcast") and first.operands[0] in around:
      first = around[first.operands[0]]
    return max(_constant(last, 0) - _constant(first, 0), 0)

  def copies(self, name: str, size: int) -> list[str]:
    """Instructions that copy an array of `size` bytes or more within the large
    memory, in a computation and all that it calls. Of a fusion its results: an
    order in which it reads what it then multiplies is written nowhere."""
    found = []
    for i in self.computations[name].values():
      inside, made = self.computations[name], [i]
      if i.op == "fusion":
        inside = self.computations[i.called("calls")]
        made = [result for result, _ in self._made(i)]
      for copy in made:
        if copy.op in ("copy", "copy-start"):
          arrays = _arrays(copy.shape)
          source = _large(inside[copy.operands[0]].shape)
          if arrays[0][0] >= size and arrays[0][1] and source:
            found.append(copy.name)
      called = re.findall(r"(?:body|to_apply)=%?([\w.\-]+)", i.rest)
      for other in (*called, *self._branches(i)):
        found += self.copies(other, size)
    return found

  def _made(self, i: Instruction):
    """A fusion's results: (what makes it, (bytes, whether in large memory))."""
    inside = self.computations[i.called("calls")]
    (root,) = (x for x in inside.values() if x.root)
    many = root.op == "tuple"
    results = [inside[n] for n in root.operands] if many else [root]
    for result, array in zip(results, _arrays(i.shape)):
      while result.op == "bitcast":
        result = inside[result.operands[0]]
      yield result, array

  def _moved(self, i: Instruction, inside) -> int:
    shapes = [inside[name].shape for name in i.operands if name in inside]
    if re.fullmatch(r"(copy|(dynamic-)?slice)-start", i.op):
      arrays = _arrays(i.shape)  # of a copy its result comes first
      source = arrays[1 if i.op == "copy-start" else 0]
      result = arrays[0 if i.op == "copy-start" else len(i.operands)]
      return result[0] * (result[1] + source[1])
    if i.op in _SLICES:
      size = _size(i.shape)
      return size * (_large(i.shape) + _large(shapes[0]))
    if i.op in _UPDATES:
      return 2 * _size(shapes[_UPDATES[i.op]]) * _large(i.shape)
    if i.op == "fusion":
      return self._fused(i, shapes)
    read = sum(map(_traffic_of, shapes))
    return read + sum(size * large for size, large in _results(i))

  def _fused(self, i: Instruction, shapes: list[str]) -> int:
    """What a fusion reads of its operands and writes of its results."""
    inside = self.computations[i.called("calls")]
    parameters = {
      int(x.rest.split(")")[0]): x
      for x in inside.values()
      if x.op == "parameter"
    }
    theirs = [x for x in inside.values() if collective(x)]
    if theirs and "-start" in i.name:
      return sum(self._moved(x, inside) for x in theirs)
    if theirs and "-done" in i.name:
      return 0
    # One that runs while they are under way hands their arrays on.
    under_way = set() if _starts(i) else {x.name for x in theirs}
    total = 0
    for at, shape in enumerate(shapes):
      if _large(shape) and not shape.startswith("("):
        read = _read(parameters[at].name, inside, under_way)
        total += min(read, _size(shape))
    for result, (size, large) in self._made(i):
      if result.op == "parameter" or result.name in under_way:
        continue
      if result.op in _UPDATES:
        size = _size(inside[result.operands[_UPDATES[result.op]]].shape)
      total += size * large
    return total


def _starts(i: Instruction) -> bool:
  """Whether a fusion starts the collective that it holds, if it does. A TPU's
  program starts it in one, ends it in another, and names it once more in each
  that runs meanwhile, in other loops too: the first alone counts."""
  return "kind=kCustom" in i.rest and "-done" not in i.name


def _read(
  name: str, inside: dict[str, Instruction], under_way: set[str]
) -> int:
  """Bytes of a fusion's parameter that its computation reads."""
  total = 0
  for user in inside.values():
    if name not in user.operands or user.name in under_way:
      continue
    if user.op == "tuple":  # handed on
      continue
    if user.op == "bitcast":
      total += _read(user.name, inside, under_way)
    elif user.op in _SLICES and user.operands[0] == name:
      total += _size(user.shape)
    elif user.op not in _UPDATES or user.operands[0] != name:
      return _size(inside[name].shape)
  return total


def _brackets(rest: str) -> str:
  """What stands before the bracket that closes the operands."""
  depth = 1
  for at, letter in enumerate(rest):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return rest[:at]
  return rest


def _arrays(shape: str) -> list[tuple[int, bool]]:
  """(bytes, whether it lies in the large memory) of each array of a shape."""
  return [
    (_bytes(kind, dims), not on) for kind, dims, on in _ARRAY.findall(shape)
  ]


def _bytes(kind: str, dims: str) -> int:
  """Of an array of elements f32, bf16, s4, pred, ... and dimensions "2,3"."""
  bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
  return math.ceil(
    math.prod(map(int, filter(None, dims.split(",")))) * bits / 8
  )


def _size(shape: str) -> int:
  return sum(size for size, _ in _arrays(shape))


def _large(shape: str) -> bool:
  return any(large for _, large in _arrays(shape))


def _traffic_of(shape: str) -> int:
  if shape.startswith("("):  # a tuple that is handed on; its parts are counted
    return 0
  return sum(size for size, large in _arrays(shape) if large)


def _results(i: Instruction) -> list[tuple[int, bool]]:
  """`_arrays` of what an instruction gives; the shape of one that is started
  names its operands before."""
  arrays = _arrays(i.shape)
  if i.op.endswith("-start") and len(arrays) > 1 and i.op != "all-reduce-start":
    arrays = arrays[len(i.operands) : 2 * len(i.operands)]
  return arrays


def _constant(i: Instruction, other: int) -> int:
  found = re.match(r"\d+", i.rest) if i.op == "constant" else None
  return int(found[0]) if found else other


def _cycles(i: Instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
  return int(found[1]) if found else 0


def collective(i: Instruction) -> tuple[tuple[str, int, int], ...]:
  """(kind, 1, bytes of its result) of an instruction that is one."""
  kind = i.op.removesuffix("-start")
  if kind not in COLLECTIVES:
    return ()
  return ((kind, 1, sum(size for size, _ in _results(i))),)


def host_transfers(text: str) -> list[str]:
  """Lines of a program that talk to the host."""
  form = r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(|xla_ffi_python"
  return [line for line in text.splitlines() if re.search(form, line)]
