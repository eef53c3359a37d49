"""`--tree=auto`: the drafter and the tree that pay on this device.

Measures what `cost_model` predicts from: acceptance by decoding calibration
prompts, step costs by timing, by the rules of `bench`. What was measured is
kept beside the run, and holds for these drafters, device, batch and sampling;
acceptance for any device and batch.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spec_stream import bench, bench_rows, checkpoints, json_text, storage, task
from spec_stream.cost_model import (
  Acceptance,
  CostModel,
  Setting,
  ahead,
  nested,
  setting,
)
from spec_stream.decode import Decoder, path_of
from spec_stream.drafters import registry
from spec_stream.drafters.base import Drafter, attached
from spec_stream.errors import UserError
from spec_stream.models import native
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import Transformer, for_decoding
from spec_stream.tree import TreeSpec

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # nodes that are considered
TIMED = (2, 4, 8, 16, 32, 64)  # of these, the ones that are timed
ROWS = 8  # calibration prompts decoded at once
STEPS = 48  # tokens of a row while steps are timed
_SECONDS = 2.0  # of plain decoding, at least about, while steps are timed

# -- what is considered -------------------------------------------------------


def candidates(
  model: Transformer, drafters: Mapping[str, Any], rule: str = "exact"
) -> list[Drafter]:
  """Resolved drafters of all sizes, lengths and numbers of kept nodes.

  drafters: {name: own weights or None}. Raises: UserError if one of them does
  not fit the model at any size.
  """
  found, config = {}, model.config
  for name, own in drafters.items():
    if name == "none":
      continue
    if own is None and registry.get(name).Module is not None:
      own = model.drafter
    wrong, before = None, len(found)
    for length, nodes, kept in _shapes(config, name, own):
      kind = "beam" if name == "redrafter" else "best_first"
      drafter = registry.get(name).of(
        TreeSpec(kind, nodes), length, Prune(kept)
      )
      try:
        drafter = dataclasses.replace(drafter, rule=rule).resolve(config, own)
      except UserError as e:  # too many nodes for so short a draft, say
        wrong = wrong or e
        continue
      found.setdefault(setting(drafter), drafter)
    if len(found) == before:
      raise wrong
  return list(found.values())


def _largest() -> int:
  """Nodes beyond which nothing is gained: a CPU's steps cost by the row."""
  return 32 if jax.default_backend() == "cpu" else SIZES[-1]


def _shapes(config: ModelConfig, name: str, own):
  """Yields (tokens ahead, nodes, kept nodes); 0 is the drafter's own."""
  largest = _largest()
  sizes = [n for n in SIZES if n <= largest]
  lengths, grows = [0], config.streams.correction_rank > 0
  if name == "streams" and not (grows or attached(config)):
    lengths = range(1, max(config.streams.num_streams, 1) + 1)
  if name == "medusa" and own is not None:
    lengths = range(1, own.options.length + 1)
  if not registry.get(name).nested or (name == "streams" and grows):
    sizes = [n for n in TIMED if n <= largest]
  for length in lengths:
    yield from ((length, nodes, 0) for nodes in sizes)
  if name == "streams" and config.streams.prune_rank:
    for kept in (4, 8, 16):
      for nodes in (2 * kept, 4 * kept):
        if nodes <= largest:
          yield 0, nodes, kept


def timed(drafters: Sequence[Drafter]) -> list[Drafter]:
  """Those whose steps are timed; between them costs are interpolated."""
  spans = {}
  for drafter in drafters:
    spans.setdefault(drafter.name, set()).add(ahead(drafter))
  ends = {name: (min(x), max(x)) for name, x in spans.items()}
  return [
    d
    for d in drafters
    if not nested(d) or (d.num_nodes in TIMED and ahead(d) in ends[d.name])
  ]


# -- measuring ----------------------------------------------------------------


def acceptance(
  model: Transformer,
  drafter: Drafter,
  prompts: Sequence[Sequence[int]],
  own=None,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
  **settings,
) -> Acceptance:
  """Decodes prompts with `drafter`, step by step.

  settings: of `generate`; seed is that of the first prompt, as in
  `bench.Settings`.
  """
  decoder = Decoder(model, drafter, own)
  drafter = decoder.drafter
  seeds = bench.Settings(seed=settings.pop("seed", 0)).seeds(len(prompts))
  tokens, steps = np.zeros((2, len(prompts)), np.int64)
  size = max(drafter.longest - 1, 1), drafter.num_nodes
  counts = np.zeros((len(prompts), *size), np.int64)
  for start in range(0, len(prompts), ROWS):
    at = range(start, min(start + ROWS, len(prompts)))
    state = decoder.start(
      [prompts[i] for i in at], seed=seeds[start : at.stop], **settings
    )
    look = lambda s: jax.device_get((s.tree, s.tokens, s.num_tokens, s.done))
    tree, _, before, done = look(state)
    while not done.all():
      state = decoder.step(state)
      new_tree, text, after, ended = look(state)
      for row in np.flatnonzero(~done):
        drawn = text[row, before[row] : after[row] - 1]
        one = jax.tree.map(lambda x, at=row: x[at], tree)
        path = path_of(one, drawn)[1:]
        for j in range(size[0]):
          place = np.cumsum(one.depth <= j + 1) - 1
          counts[start + row, j, place[path[: j + 1]]] += 1
        steps[start + row] += 1
      tree, before, done = new_tree, after, ended
    tokens[at] = before
    on_batch(at.stop, len(prompts))
  return Acceptance(tokens, steps, counts)


def step_costs(
  model: Transformer,
  drafters: Sequence[Drafter],
  prompts: Sequence[Sequence[int]],
  settings: bench.Settings,
  own: Mapping[str, Any] | None = None,
  **progress,
) -> dict[Setting, float]:
  """Times a step of each of the drafters, in steps of plain decoding.

  The rows run to their limit, whatever they say. own: weights by name.
  """
  room = model.config.max_positions - max(map(len, prompts))
  settings = dataclasses.replace(
    settings,
    max_new_tokens=min(settings.max_new_tokens, STEPS, room),
    end_token=-1,
  )
  own = {name: (x, "") for name, x in (own or {}).items()}
  methods = bench.plan(model.config, drafters, own)
  methods = [m for m in methods if m.name != bench.NOISE]
  measure = lambda s, methods: bench.measure(
    model, prompts, methods, s, time_drafts=False, **progress
  )
  # Steps of a small model are short: the more often they are run.
  (once,) = measure(settings, methods[:1])
  seconds = once.decode_seconds.sum()
  repeats = int(np.clip(_SECONDS / max(seconds, 1e-6), 2, 20))
  settings = dataclasses.replace(settings, repeats=repeats)
  results = measure(settings, methods)
  ms = [bench_rows.step_ms(r) for r in results]
  fastest = min(
    x for x, r in zip(ms, results, strict=True) if r.method.is_baseline
  )
  costs = {}
  for x, result in zip(ms, results, strict=True):
    if result.method.name != bench.NO_STREAMS:
      costs[setting(result.drafter)] = x / fastest
  return costs


def measure(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  drafters: Mapping[str, Any],
  settings: bench.Settings,
  rule: str = "exact",
  known: Mapping[Any, Acceptance] | None = None,
  progress: Callable = lambda name: lambda done, total: None,
) -> tuple[CostModel, list[Drafter]]:
  """-> (the model of costs, the drafters among which to choose).

  Args:
    model: the target.
    prompts: token ids of the calibration prompts, none of those measured later;
      of these as many whole batches as there are, two at the most, are timed:
      at least a batch.
    drafters: {name: own weights or None}.
    settings: as they will be decoded.
    rule: of acceptance.
    known: acceptance that was measured before, at any batch.
    progress: of a piece of work, by its name.
  """
  model = for_decoding(model)
  chosen = candidates(model, drafters, rule)
  batches = min(2, len(prompts) // settings.batch)
  if settings.max_new_tokens < 2:
    raise UserError("--tree=auto needs --max_new_tokens of 2 or more")
  found = dict(known or {})
  wanted = {}
  for drafter in chosen:  # of nested ones the last is the largest
    wanted[drafter.name if nested(drafter) else setting(drafter)] = drafter
  options = settings.options(settings.seed)
  for key, drafter in wanted.items():
    if key not in found:
      found[key] = acceptance(
        model,
        drafter,
        prompts,
        drafters[drafter.name],
        progress(f"calibrate {drafter.name}"),
        **options,
      )
  costs = step_costs(
    model,
    timed(chosen),
    prompts[: batches * settings.batch],
    settings,
    drafters,
    on_warm_up=progress("compile"),
    on_batch=progress("time steps"),
  )
  return CostModel(settings.batch, found, costs), chosen


# -- of a run, kept beside it --------------------------------------------------

FILE = "cost_model.json"
PROMPTS = 32  # of the validation split


def of_run(
  run,
  directory: str | pathlib.Path,
  drafters: Mapping[str, tuple[Any, str]],
  settings: bench.Settings,
  rule: str = "exact",
  progress: Callable = lambda name: lambda done, total: None,
) -> tuple[CostModel, list[Drafter]]:
  """As `measure`, with prompts of the run's validation split.

  Reads what <directory>/cost_model.json holds of this run, commit, device and
  settings, and writes what it has to measure.

  run: a `checkpoints.Run`. drafters: {name: (own weights or None, where they
  are from)}.

  Raises: UserError for a run without prompts, or drafters that do not fit.
  """
  path = pathlib.Path(directory) / FILE
  ends = run.tokenizer.eos_ids
  refill = settings.refill
  settings = dataclasses.replace(
    settings, end_token=ends, repeats=1, refill=False
  )
  # As many for any batch but large ones, of which two must be had.
  count = max(PROMPTS, 2 * settings.batch)
  about = {
    "prompts": count,
    "run": _state(run.config, run.step, directory),
    "drafters": {
      name: place and _state(None, None, place)
      for name, (_, place) in drafters.items()
    },
    "largest": _largest(),
    "accept": rule,
    **settings.sampling(),
    "max_new_tokens": settings.max_new_tokens,
    "seed": settings.seed,
  }
  here = about | {
    "batch": settings.batch,
    "device": task.device_words(),
    "jax": jax.__version__,
    "commit": checkpoints.git_commit(),  # a time is that of the code timed
    "panels": jax.default_backend() == "cpu" and native.is_ready(),
    "matmul_precision": str(jax.config.jax_default_matmul_precision),
  }
  own = {name: x for name, (x, _) in drafters.items()}
  kept = _read(path)
  texts, devices = kept["acceptance"], kept["step_cost"]
  known = texts.get(_key(about), {})
  costs = devices.get(_key(here))
  if costs is not None:  # written with the acceptance it belongs to
    chosen = candidates(run.model, own, rule)
    return CostModel(settings.batch, known, costs, refill), chosen
  most = run.model.config.max_positions - settings.max_new_tokens
  prompts = task.prompts(run, "validation", count)
  prompts = [p.token_ids for p in prompts if len(p.token_ids) <= most]
  if len(prompts) < settings.batch:
    raise UserError(
      f"--tree=auto: of {count} prompts of the validation split, "
      f"{len(prompts)} leave room for {settings.max_new_tokens} new tokens in "
      f"{run.model.config.max_positions} positions, and a batch of "
      f"{settings.batch} needs as many: lower --max_new_tokens or --batch"
    )
  found, chosen = measure(
    run.model, prompts, own, settings, rule, known, progress
  )
  texts[_key(about)], devices[_key(here)] = found.acceptance, found.costs
  task.write_json(path, _to_json(kept))
  return dataclasses.replace(found, refill=refill), chosen


def _state(config: dict | None, step: int | None, workdir) -> dict:
  """Names the weights of a run, trained anew or further."""
  config = checkpoints.read_config(workdir) if config is None else config
  if step is None:
    (*_, step) = storage.steps(workdir)
  digests = storage.read_manifest(workdir, step).get("digests")
  return {"config": config, "step": step, "digests": digests}


def _key(about: dict) -> str:
  text = json.dumps(about, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_json(kept: dict) -> dict:
  name = lambda key: key if isinstance(key, str) else " ".join(map(str, key))
  lists = lambda x: {n: a.tolist() for n, a in vars(x).items()}
  return {
    "acceptance": {
      about: {name(key): lists(x) for key, x in found.items()}
      for about, found in kept["acceptance"].items()
    },
    "step_cost": {
      here: {name(key): x for key, x in found.items()}
      for here, found in kept["step_cost"].items()
    },
  }


def _read(path: pathlib.Path) -> dict:
  """What `_to_json` wrote; nothing if there is no file."""
  if not path.exists():
    return {"acceptance": {}, "step_cost": {}}

  def key(text):
    name, *numbers = text.split()
    return (name, *map(int, numbers)) if numbers else name

  try:
    found = json_text.parse(path.read_text())
    kept = {
      "acceptance": {
        about: {key(k): _arrays(x) for k, x in each.items()}
        for about, each in found["acceptance"].items()
      },
      "step_cost": {
        here: {key(k): float(x) for k, x in each.items()}
        for here, each in found["step_cost"].items()
      },
    }
    for costs in kept["step_cost"].values():
      if not all(0 < x < math.inf for x in costs.values()):
        raise ValueError("a cost is no positive number")
      if ("none", 1, 0, 0) not in costs or any(len(s) != 4 for s in costs):
        raise ValueError("a setting is none, or plain decoding is missing")
    return kept
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
  ) as e:
    raise UserError(
      f"{path} is not what --tree=auto wrote: delete it, and all is measured "
      f"anew ({e!r:.80})"
    ) from e


def _arrays(values: dict) -> Acceptance:
  """Raises: ValueError, TypeError or KeyError unless they fit together."""
  names = ("tokens", "steps", "accepted")
  found = Acceptance(*(np.asarray(values[name], np.int64) for name in names))
  count = len(found.tokens)
  shapes = found.tokens.shape, found.steps.shape, found.accepted.shape[:1]
  if set(shapes) != {(count,)} or found.accepted.ndim != 3 or not count:
    raise ValueError("counts of different sizes")
  if min(found.tokens) < 1 or min(found.steps) < 0 or found.accepted.min() < 0:
    raise ValueError("a count is negative")
  return found
