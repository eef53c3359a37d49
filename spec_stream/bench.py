"""Timing of decoding methods against plain decoding of the same weights.

The rules, so that a number means what it says:

- the baseline is `NoDraft` in the same compiled loop;
- each shape is compiled and run before the clock starts, with all caches that
  an output may need, and what still compiles while it runs is counted
  (`recompiles`);
- methods take turns, prompt by prompt, in an order drawn anew for each prompt:
  the one that runs second finds the caches warm. An A-against-A row shows what
  the clock makes of two equal methods;
- tokens are those emitted, up to the end token or the limit;
- prefill and decoding are timed apart, but with `refill`, where one compiled
  loop does both for all prompts.

Where the main stream attends to its streams (shared mode), plain decoding of
the same model attaches them, and a model of that size without streams decodes
faster: both are measured, the first for its tokens, the faster for its time.

`measure` runs; `bench_rows` makes numbers of what it returns.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spec_stream import buckets, draft_time
from spec_stream.decode import Decoder, Generation, collect
from spec_stream.drafters.base import Drafter
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer, for_decoding

NOISE = "none (A against A)"
NO_STREAMS = "none (no streams)"
_NONE: Mapping = {}


@dataclasses.dataclass(frozen=True)
class Settings:
  """batch: prompts decoded at once; repeats: times that all is run.

  refill: a row that is done goes on with the next prompt (see
  `spec_stream.refill`): throughput over all prompts, in place of batches that
  wait for their last row. Prompt i draws with seed + i, in each method alike.
  grow: whether caches begin small, see `buckets`; with refill they never do.
  """

  batch: int = 1
  refill: bool = False
  repeats: int = 1
  max_new_tokens: int = 128
  grow: bool = True
  end_token: int | tuple[int, ...] = -1
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for name in ("batch", "repeats", "max_new_tokens"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be 1 or more")

  def seeds(self, count: int) -> np.ndarray:
    """Seeds of prompts 0..count-1, wrapped at 2**32."""
    return (self.seed + np.arange(count, dtype=np.int64)) % 2**32

  def sampling(self) -> dict:
    """Of `sampling.make` all but the seed."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(self, name) for name in names}

  def options(self, seed) -> dict:
    """What `decode.generate` is to be told."""
    return dict(
      max_new_tokens=self.max_new_tokens,
      end_token=self.end_token,
      seed=seed,
      **self.sampling(),
    )


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table.

  expects: the method whose tokens it must give, None where there is none.
  times_against: the method it is timed against; None: the fastest baseline.
  own: the drafter's own weights, if they are not the target's.
  source: the run they are from.
  """

  name: str
  drafter: Drafter
  expects: str | None = "none"
  times_against: str | None = None
  own: Any = None
  source: str = ""

  @property
  def is_baseline(self) -> bool:
    return self.name in ("none", NO_STREAMS)


def plan(
  config: ModelConfig, drafters: Sequence[Drafter], own: Mapping = _NONE
) -> list[Method]:
  """Baselines, the A-against-A row, then the drafters (NoDraft left out).

  own: {name: (weights, run)} of drafters whose weights are another run's.
  """
  methods = [Method("none", NoDraft())]
  if config.streams.attends:
    plain = NoDraft(attach_streams=False)
    methods.append(Method(NO_STREAMS, plain, expects=None))
  twin = methods[-1]
  noise = Method(
    NOISE, twin.drafter, expects=twin.name, times_against=twin.name
  )
  rivals = [
    Method(
      drafter.name,
      drafter,
      own=own.get(drafter.name, (None, ""))[0],
      source=own.get(drafter.name, (None, ""))[1],
    )
    for drafter in drafters
    if not isinstance(drafter, NoDraft)
  ]
  return [*methods, noise, *rivals]


@dataclasses.dataclass
class Measured:
  """What one method did, batch by batch: `batch` prompts each, in order."""

  method: Method
  drafter: Drafter  # resolved against the model
  generations: list[Generation]  # one a prompt
  prefill_seconds: np.ndarray  # [repeats, batches]; 0 with refill
  decode_seconds: np.ndarray  # [repeats, batches]
  batch: int  # all prompts with refill: one loop
  refill: bool = False
  compile_seconds: float = 0.0
  recompiles: int = 0  # compilations while the clock ran
  draft_seconds: float = 0.0  # of one draft, the verification left out
  one_pass: bool | None = None  # see `Decoder.in_one_pass`
  panels: bool = False  # see `Decoder.in_panels`


def measure(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  methods: Sequence[Method],
  settings: Settings,
  on_warm_up: Callable[[int, int], None] = lambda done, total: None,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
  time_drafts: bool = True,
) -> list[Measured]:
  """Runs every method over all prompts; see the rules above.

  Args:
    model: the target of all methods.
    prompts: token ids, no two alike.
    methods: of `plan`.
    settings: alike for all.
    on_warm_up, on_batch: called with (pieces done, pieces in all), outside the
      timed regions.
    time_drafts: whether drafts are timed apart as well.

  Raises:
    UserError: a prompt appears twice or does not fit, a drafter does not fit.
  """
  _check_unique(prompts)
  seeds = settings.seeds(len(prompts))
  size = len(prompts) if settings.refill else settings.batch
  rows = min(settings.batch, len(prompts))
  batches = [
    slice(start, min(start + size, len(prompts)))
    for start in range(0, len(prompts), size)
  ]
  model = for_decoding(model)  # once, not in each decoder
  # A decoder for each row: the A-against-A row is independent of its twin.
  own = {
    id(m.own): for_decoding(m.own)
    for m in methods
    if isinstance(m.own, Transformer)
  }
  decoders = [
    Decoder(model, m.drafter, own.get(id(m.own), m.own)) for m in methods
  ]
  decoders[0].check(prompts, settings.max_new_tokens)
  zeros = lambda: np.zeros((settings.repeats, len(batches)))
  results = [
    Measured(
      m,
      d.drafter,
      [],
      zeros(),
      zeros(),
      size,
      settings.refill,
      one_pass=d.in_one_pass(rows),
      panels=d.in_panels(),
    )
    for m, d in zip(methods, decoders)
  ]

  def run(decoder: Decoder, at: slice):
    """One batch -> (finished state, prefill seconds, decoding seconds)."""
    options = settings.options(seeds[at])
    begin = middle = time.perf_counter()
    if settings.refill:
      state = decoder.serve(prompts[at], rows, **options)
    else:
      state = decoder.start(prompts[at], grow=settings.grow, **options)
      jax.block_until_ready(state)
      middle = time.perf_counter()
      state = decoder.finish(state)
    jax.block_until_ready(state)
    end = time.perf_counter()
    return state, middle - begin, end - middle

  compilations = Compilations()
  shapes = _one_of_each_shape(prompts, batches)
  for i, at in enumerate(shapes):
    for j, (decoder, result) in enumerate(zip(decoders, results), 1):
      begin = time.perf_counter()
      if settings.refill:
        run(decoder, at)
      else:  # larger caches too, which other prompts may need
        options = settings.options(seeds[at])
        decoder.warm_up(prompts[at], grow=settings.grow, **options)
      cold = time.perf_counter() - begin
      warm = sum(run(decoder, at)[1:])
      result.compile_seconds += max(cold - warm, 0.0)
      on_warm_up(i * len(methods) + j, len(shapes) * len(methods))

  total = settings.repeats * len(batches) * len(methods)
  done = 0
  order = np.random.default_rng(0)
  for repeat in range(settings.repeats):
    for i, at in enumerate(batches):
      for which in order.permutation(len(methods)):
        decoder, result = decoders[which], results[which]
        before = compilations.count
        state, prefill, decoding = run(decoder, at)
        result.recompiles += compilations.count - before
        result.prefill_seconds[repeat, i] = prefill
        result.decode_seconds[repeat, i] = decoding
        if repeat == 0:
          result.generations += collect(state)
        done += 1
        on_batch(done, total)
  for decoder, result in zip(decoders, results):
    if time_drafts and decoder.drafter.num_nodes > 1:
      first = prompts[shapes[0]][:rows]
      state = decoder.start(first, **settings.options(0))
      result.draft_seconds = draft_time.seconds(decoder, state)
  return results


def _check_unique(prompts):
  seen = {}
  for i, prompt in enumerate(prompts):
    first = seen.setdefault(tuple(prompt), i)
    if first != i:
      raise UserError(
        f"prompt {i} is the same as prompt {first}: no prompt may count twice"
      )
  if not prompts:
    raise UserError("no prompt to measure: give at least one")


def _one_of_each_shape(prompts, batches) -> list[slice]:
  """A batch for each combination of prompt bucket and batch size.

  The buckets are those of `Decoder`, but for the largest.
  """
  shapes = {}
  for at in batches:
    longest = max(map(len, prompts[at]))
    bucket = buckets.round_up(longest)
    shapes.setdefault((at.stop - at.start, bucket), at)
  return list(shapes.values())


# -- compilations ------------------------------------------------------------

_EVENT = "/jax/core/compile/backend_compile_duration"


class Compilations:
  """Counts the programs that XLA compiles from now on, in `count`.

  One listener serves all: JAX has no public way to take one away.
  """

  _total = None

  def __init__(self):
    if Compilations._total is None:
      Compilations._total = 0
      jax.monitoring.register_event_duration_secs_listener(self._listen)
    self._before = Compilations._total
    # A renamed event would make every count 0: better no number than that.
    size = 1 + Compilations._total  # a shape that was not compiled before
    jax.jit(lambda x: x + 1).lower(np.zeros(size)).compile()
    if Compilations._total == self._before:
      raise RuntimeError(f"jax {jax.__version__} does not report {_EVENT}")
    self._before = Compilations._total

  @staticmethod
  def _listen(event: str, duration: float, **_):
    del duration
    Compilations._total += event == _EVENT

  @property
  def count(self) -> int:
    return Compilations._total - self._before
