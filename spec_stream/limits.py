"""How fast a step could be here: what it must move, and what this device does.

Beside `roofline`, which reads a compiled program and takes published peaks:
here rates are measured, in turns with the steps, and a step's bytes are those
that no implementation can leave out.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream import decode, roofline, stages
from spec_stream import step as steps
from spec_stream.bench import Measured, Settings
from spec_stream.models.transformer import Transformer, for_decoding
from spec_stream.text_table import table


@dataclasses.dataclass(frozen=True)
class Rates:
  """read: bytes/s from memory; copy: bytes/s read and written together, where
  they were; matrix: FLOP/s of a product of large matrices."""

  read: float
  copy: float
  matrix: float


class Meter:
  """Measures the rates of the default device in turns with what is to be held
  against them: a memory that others use too gives more at one time than at
  another.

  dtype: of what is read and multiplied. size: bytes of the array that is read,
  far above any on-chip memory; a meter holds that, a copy, and two squares of
  2048 (on an accelerator 8192) numbers a side. every: seconds between samples.
  """

  def __init__(self, dtype: str, size: int = 2**29, every: float = 2.0):
    width = 4096
    rows = size // (width * jnp.dtype(dtype).itemsize)
    array = jnp.ones((rows, width), dtype)
    row = jnp.ones((width, 1), dtype)
    # An accelerator needs larger ones to be at its best.
    side = 2048 if jax.default_backend() == "cpu" else 8192
    square = jnp.full((side, side), 1 / side, dtype)
    small = lambda x: (1e-30 * x.astype(jnp.float32).sum()).astype(dtype)
    zero = jnp.zeros((), dtype)
    self._every, self._last = every, -math.inf
    self._size, self._flops = array.nbytes, 2 * side**3
    self._turns = {
      "by a product": _timer(
        lambda c, x, y: small(x @ (y + c)), zero, array, row
      ),
      "by a sum": _timer(lambda c, x: small(x + c), zero, array),
      "copy": _timer(lambda c: c + 1, array),
      "matrix": _timer(lambda c, x: c @ x, square, square),
    }
    self._seconds = {name: [] for name in self._turns}

  def sample(self, *_) -> None:
    """Takes a sample, if the last one is older than `every` seconds; ignores
    what `bench.measure` tells its `on_batch`, which this can be."""
    if time.monotonic() - self._last < self._every:
      return
    for name, turn in self._turns.items():
      self._seconds[name].append(turn())
    self._last = time.monotonic()

  def rates(self) -> Rates:
    """Over all samples, one at least, as a step's time is over all steps."""
    mean = {name: float(np.mean(x)) for name, x in self._seconds.items()}
    # Whichever way of reading it all is faster here.
    read = min(mean["by a product"], mean["by a sum"])
    return Rates(
      read=self._size / read,
      copy=2 * self._size / mean["copy"],
      matrix=self._flops / mean["matrix"],
    )


_LONG = 0.05  # seconds, above which starting a program counts for nothing


def _timer(turn, carry, *args) -> Callable[[], float]:
  """-> a function that does `turn(carry, *args) -> carry` often, in a loop on
  the device, and gives the seconds of one."""
  loop = jax.jit(
    lambda count, carry, args: jax.lax.fori_loop(
      0, count, lambda _, carry: turn(carry, *args), carry
    ),
    # Else it first copies the carry into fresh memory, within the time.
    donate_argnums=1,
  )
  carry = jnp.copy(carry)

  def timed(count):
    nonlocal carry
    begin = time.perf_counter()
    carry = jax.block_until_ready(loop(count, carry, args))
    return (time.perf_counter() - begin) / count

  timed(1)  # compiles
  count = max(1, math.ceil(_LONG / timed(1)))
  return lambda: timed(count)


@dataclasses.dataclass(frozen=True)
class Step:
  """What one step needs: bytes to be read, FLOPs of its matrix products."""

  bytes: int
  flops: int

  def seconds(self, rates: Rates) -> float:
    """The least, if reading and multiplying overlap without a gap."""
    return max(self.bytes / rates.read, self.flops / rates.matrix)

  def fields(self, rates: Rates, seconds: float) -> dict:
    """For a row of results; seconds: what the step took."""
    return {
      "step_bytes": self.bytes,
      "step_flops": self.flops,
      "read_rate": rates.read,
      "copy_rate": rates.copy,
      "matrix_rate": rates.matrix,
      "read_share": self.bytes / rates.read / seconds,
      "matrix_share": self.flops / rates.matrix / seconds,
      "limit_ms": 1e3 * self.seconds(rates),
    }


def of_step(decoder: decode.Decoder, batch: int = 1, length: int = 128) -> Step:
  """Of the step that decodes `batch` rows with `length` committed tokens each.

  Bytes: every weight that the traced step uses, the drafter's too, once (of a
  table that is only looked up in, what is found), although a step in two passes
  reads some twice, and the copies that it then reads (`coarse`); keys and
  values of `length` tokens a row. FLOPs: of the same, whose cache has that many
  slots, rounded up.
  """
  config = decoder.config
  pairs = 2 * config.num_layers * config.num_kv_heads * config.head_dim
  cache = batch * length * pairs * jnp.dtype(config.dtype).itemsize
  state = jax.eval_shape(
    lambda: decoder.start([[1] * length] * batch, max_new_tokens=1)
  )

  def step(weights, state):
    params = decoder.graph.merge(weights)
    return steps.step(params, decoder.drafter, state)

  jaxpr = jax.make_jaxpr(step)(decoder.weights, state).jaxpr
  held = jaxpr.invars[: len(jax.tree.leaves(decoder.weights))]
  return Step(
    bytes=cache + sum(_read(weight, jaxpr) for weight in held),
    flops=roofline.flops(step, decoder.weights, state),
  )


def _read(weight, jaxpr) -> int:
  """Bytes of an input that a program reads."""
  size = lambda x: math.prod(x.aval.shape) * x.aval.dtype.itemsize
  total = 0
  for equation in jaxpr.eqns:
    for at, x in enumerate(equation.invars):
      if x is weight:
        if equation.primitive.name != "gather" or at:
          return size(weight)
        total += size(equation.outvars[0])
  return total


# -- rows of a benchmark -----------------------------------------------------


def add(
  rows: Sequence[dict],
  results: Sequence[Measured],
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  settings: Settings,
  rates: Rates,
  with_stages: bool = True,
) -> None:
  """Adds to rows of `bench_rows` what their step needs, what this device does
  (of a `Meter` that sampled while they ran), the share reached, and
  (`stage_ms`) where the time goes.

  A row that made no step stays as it is. Not of results with `refill`, whose
  steps are not timed apart.
  """
  model = for_decoding(model)  # once, not for each method
  for row, result in zip(rows, results, strict=True):
    if not row["step_ms"]:
      continue
    decoder = decode.Decoder(model, result.drafter, result.method.own)
    lengths = [
      len(prompt) + len(made.token_ids) / 2
      for prompt, made in zip(prompts, result.generations, strict=True)
    ]
    batches = result.decode_seconds.shape[1]
    at_once = round(len(prompts) / batches)  # the last may have fewer
    need = of_step(decoder, at_once, round(np.mean(lengths)))
    row |= need.fields(rates, row["step_ms"] / 1e3)
    row["length"] = float(np.mean(lengths))
    if with_stages:
      few = prompts[: settings.batch]
      options = settings.options(settings.seeds(len(few)))
      row["stage_ms"] = stages.milliseconds(decoder, few, **options)


_COLUMNS = {
  "method": "{method}",
  "nodes": "{tree_nodes}",
  "kept": "{kept_nodes}",
  "batch": "{batch}",
  "length": "{length:.0f}",
  "ms a step": "{step_ms:.2f}",
  "plain steps": "{step_cost:.2f}",
  "MB to read": "{megabytes:.0f}",
  "GFLOP": "{gflop:.2f}",
  "of read rate": "{read_share:.0%}",
  "of matrix rate": "{matrix_share:.0%}",
  "limit, ms": "{limit_ms:.2f}",
}


def render(rows: Sequence[dict]) -> str:
  """Of rows as `add` left them: steps against their limits, then their time by
  stage, if it is known."""
  rows = [
    row
    | {"megabytes": row["step_bytes"] / 1e6, "gflop": row["step_flops"] / 1e9}
    for row in rows
    if "limit_ms" in row
  ]
  if not rows:
    return "no step was made: nothing to hold against the limits"
  columns = {n: [f.format(**row) for row in rows] for n, f in _COLUMNS.items()}
  if not any(row["kept_nodes"] for row in rows):
    del columns["kept"]
  best = rows[0]
  lines = [
    table(columns, ("method",)),
    f"measured here: {best['read_rate'] / 1e9:.1f} GB/s read, "
    f"{best['copy_rate'] / 1e9:.1f} copied, "
    f"{best['matrix_rate'] / 1e9:.0f} GFLOP/s",
  ]
  timed = [row for row in rows if row.get("stage_ms")]
  if timed:
    names = sorted({name for row in timed for name in row["stage_ms"]})
    columns = {"ms a step": [*names, "all"]}
    for row in timed:
      times = row["stage_ms"]
      cells = [f"{times.get(name, 0):.2f}" for name in names]
      title = "{method}, {tree_nodes} nodes".format(**row)
      title += f", {row['kept_nodes']} kept" if row["kept_nodes"] else ""
      columns[title] = [*cells, f"{sum(times.values()):.2f}"]
    lines += ["", table(columns, ("ms a step",))]
  return "\n".join(lines)
