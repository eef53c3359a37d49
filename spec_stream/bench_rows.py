"""Rows of results.jsonl, from what `bench.measure` returns.

ms_per_token        decoding seconds over the tokens that decoding emitted; the
                    first token of a prompt is prefill's (with refill all
                    seconds, over all tokens)
ms_to_first_token   prefill: it ends with the first token (not with refill)
tokens_per_second   all tokens over prefill and decoding
speedup             baseline's ms_per_token over the method's, hence a ratio of
                    total times where the tokens are the same
speedup_request     the same with prefill counted, per token emitted
step_ms, step_cost  one call of the compiled loop; in steps of the baseline
                    (not with refill, whose loop does prefills as well)
one_pass            whether nodes carry streams as they are verified, in a full
                    batch: see `one_pass`
panels              whether kernels of the target lie in `panels`
draft_ms            one draft alone, in a loop of nothing else (without streams,
                    and the LM head where the step reads it once for all);
                    draft_share: of a step
compile_seconds     first call of each shape, and of all caches that an output
                    may need, less a second one; where programs
                    are kept (JAX_COMPILATION_CACHE_DIR), of those not found
extra_params        weights beyond those of a plain decoder
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from scipy import stats

from spec_stream import sampling, ties
from spec_stream.bench import NOISE, Measured, Settings
from spec_stream.decode import Generation, tokens_per_call
from spec_stream.drafters.base import Drafter
from spec_stream.models.lora import LoRAParam
from spec_stream.models.prune import PruneParam
from spec_stream.models.streams import StreamParam
from spec_stream.models.transformer import Transformer, num_params
from spec_stream.rules import LOSSY

POSITIONS_PER_BIN = 8
RESAMPLES = 2000


def rows(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  results: Sequence[Measured],
  settings: Settings,
  about: dict,
) -> list[dict]:
  """One json-able dict per method, in the order of `results`.

  Args:
    model, prompts, settings: those that were measured.
    results: of `bench.measure`.
    about: what all rows share: run_id, dataset, commit, date, ...
  """
  by_name = {r.method.name: r for r in results[::-1]}  # the first of a name
  baselines = [r for r in results if r.method.is_baseline]
  fastest = min(baselines, key=lambda r: _ms_per_token(r) or math.inf)
  out = []
  for result in results:
    method = result.method
    step = step_ms(result)
    draft = 1e3 * result.draft_seconds or None
    base = by_name.get(method.times_against, fastest)
    row = _counts(result) | _times(result, base, fastest)
    row |= _agreement(model, prompts, result, by_name, settings)
    if method.name == NOISE:
      row |= {"noise_low": row["speedup_low"]}
      row |= {"noise_high": row["speedup_high"]}
    out.append(
      {
        "method": method.name,
        **about,
        "mode": model.config.streams.mode,
        "num_streams": result.drafter.num_streams,
        "num_stream_layers": model.config.streams.num_stream_layers,
        "stream_id": model.config.streams.stream_id,
        "stream_position": model.config.streams.stream_position,
        **tree_fields(result.drafter),
        "one_pass": result.one_pass,
        "panels": result.panels,
        "draft_length": result.drafter.longest - 1,
        "draft_from": method.source or None,
        "draft_ms": draft,
        "draft_share": draft / step if draft and step else None,
        **settings.sampling(),
        "batch": settings.batch,
        "refill": settings.refill,
        "repeats": settings.repeats,
        "max_new_tokens": settings.max_new_tokens,
        **row,
        "extra_params": extra_params(model, result.drafter, method.own),
        "compile_seconds": round(result.compile_seconds, 3),
        "recompiles": result.recompiles,
        "dtype": model.config.dtype,
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "seed": settings.seed,
      }
    )
  return out


def bugs(rows: Sequence[dict]) -> list[str]:
  """Differences too wide for a tie, one line a row; [] is as it should be."""
  return [
    f"{row['method']} ({row['tree_nodes']} nodes) departs from plain decoding "
    f"beyond a tie: {row['mismatch']}"
    for row in rows
    if row["mismatch"]
  ]


def note(rows: Sequence[dict]) -> str:
  """What a reader of the table must know: baseline, noise, device."""
  noise = next(row for row in rows if row["method"] == NOISE)
  words = [f"Speed-ups are against '{rows[-1]['baseline']}'"]
  if noise["noise_low"] is not None:
    low, high = noise["noise_low"], noise["noise_high"]
    words.append(f"noise: {NOISE} gave [{low:.2f}, {high:.2f}]")
  words.append(
    f"{noise['device']}, {noise['dtype']}, jax {noise['jax']}, "
    f"{noise['prompts']} prompts of {noise['dataset']}, batch {noise['batch']}"
  )
  if noise["refill"]:
    words.append(
      "prefills included; intervals of 3 repeats and more, of the clock alone"
    )
  for rule in dict.fromkeys(r["accept"] for r in rows if not r["lossless"]):
    words.append(f"accept={rule} is NOT lossless: it changes what is drawn")
  return "; ".join(words) + "."


# -- counts ------------------------------------------------------------------


def _counts(result: Measured) -> dict:
  generations = result.generations
  tokens = sum(len(g.token_ids) for g in generations)
  calls = sum(g.target_calls for g in generations)
  low, high = tokens_per_call_interval(generations)
  return {
    "prompts": len(generations),
    "tokens": tokens,
    "target_calls": calls,
    "tokens_per_call": tokens_per_call(generations),
    "tokens_per_call_low": low,
    "tokens_per_call_high": high,
    "tokens_per_call_by_position": tokens_per_call_by_position(generations),
    "accept_by_depth": accept_by_depth(generations),
  }


def tokens_per_call_interval(
  generations: Sequence[Generation], seed: int = 0
) -> tuple[float | None, float | None]:
  """Ends of the 95 % interval over prompts (bootstrap); None for fewer than 2.

  The same prompts are drawn for each method, so that two of them compare.
  """
  size = len(generations)
  if size < 2:
    return None, None
  tokens = np.array([len(g.token_ids) for g in generations])
  calls = np.array([g.target_calls for g in generations])
  drawn = np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))
  rates = tokens[drawn].sum(1) / calls[drawn].sum(1)
  low, high = np.percentile(rates, [2.5, 97.5])
  return float(low), float(high)


def tokens_per_call_by_position(
  generations: Sequence[Generation],
) -> list[float]:
  """Mean tokens per call of output positions 0-7, 8-15, ...

  A call that emits n tokens counts as 1/n of a call at each of them, so that a
  call across two bins is shared between them. Prefill is a call of one token.
  """
  tokens, calls = [], []
  for generation in generations:
    size = np.bincount(generation.calls)
    for position, call in enumerate(generation.calls):
      which = position // POSITIONS_PER_BIN
      while len(tokens) <= which:
        tokens.append(0)
        calls.append(0.0)
      tokens[which] += 1
      calls[which] += 1 / size[call]
  return [t / c for t, c in zip(tokens, calls)]


def accept_by_depth(generations: Sequence[Generation]) -> list[float]:
  """Share of verifications that accepted a node of depth 1, 2, ..."""
  total = np.sum([g.accepts for g in generations], 0)
  return [float(n / total[0]) for n in total[1:]] if total[0] else []


def extra_params(model: Transformer, drafter: Drafter, own=None) -> int:
  """Weights that this drafter needs beyond a plain decoder of this shape.

  Adapters of shared mode serve the main stream, as in any fine-tuning; those
  of lossless mode exist for the streams alone. own: the drafter's own weights,
  if they are not the model's: of a draft model, all.
  """
  kinds, own = [], own or (drafter.Module and model.drafter)
  if drafter.num_streams:
    kinds.append(StreamParam)
    if model.config.streams.mode == "lossless":
      kinds.append(LoRAParam)
  if drafter.prune:
    kinds.append(PruneParam)
  beside = num_params(own) if own else 0
  return beside + sum(num_params(model, kind) for kind in kinds)


def tree_fields(drafter: Drafter) -> dict:
  tree = getattr(drafter, "tree", None)
  return {
    "tree": tree and tree.kind,
    "tree_nodes": drafter.num_nodes,
    "tree_width": tree and tree.width,
    "kept_nodes": drafter.prune.kept_nodes,
    "prune_threshold": drafter.prune.threshold,
    "accept": drafter.rule,
    "lossless": drafter.rule not in LOSSY,
  }


# -- times -------------------------------------------------------------------


def _times(result: Measured, base: Measured, fastest: Measured) -> dict:
  decoding = lambda r: (r.decode_seconds, _tokens(r, first=r.refill))
  request = lambda r: (r.prefill_seconds + r.decode_seconds, _tokens(r))
  speedup, low, high = ratio_with_interval(decoding(base), decoding(result))
  by_request = ratio_with_interval(request(base), request(result))
  step, plain = step_ms(result), step_ms(fastest)
  seconds, tokens = request(result)
  to_first = 1e3 * float(result.prefill_seconds.mean())
  return {
    "ms_per_token": _ms_per_token(result),
    "ms_to_first_token": None if result.refill else to_first,
    "tokens_per_second": float(tokens.sum() * len(seconds) / seconds.sum()),
    "baseline": base.method.name,
    "speedup": speedup,
    "speedup_low": low,
    "speedup_high": high,
    "speedup_request": by_request[0],
    "step_ms": step,
    "step_cost": step / plain if step and plain else None,
  }


def ratio_with_interval(
  base: tuple[np.ndarray, np.ndarray],
  method: tuple[np.ndarray, np.ndarray],
  seed: int = 0,
) -> tuple[float | None, float | None, float | None]:
  """-> (how much faster, and the ends of its 95 % interval).

  base, method: ([repeats, n] seconds, [n] tokens) of the same prompts (or
  batches). A bootstrap: the prompts are drawn anew RESAMPLES times, for both
  together (paired), and the same ones for each pair of methods. Of a single
  batch Student's t of the repeats' log ratios: so few cannot be drawn from, and
  it is of the clock alone. None where nothing was decoded, and for the interval
  of fewer than 3 repeats.
  """
  if not (base[1].sum() and method[1].sum()):
    return None, None, None
  if len(base[1]) == 1:
    return _of_repeats(base, method)
  base, method = ((x[0].sum(0), x[1] * len(x[0])) for x in (base, method))
  size = len(base[0])
  drawn = np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))
  at = np.concatenate([np.arange(size)[None], drawn])  # first: as measured
  # ([n] sums of seconds / of tokens) per resample, base over method.
  rate = [
    x[0][at].sum(1) / np.maximum(x[1][at].sum(1), 1) for x in (base, method)
  ]
  ratio = rate[0] / rate[1]
  low, high = np.percentile(ratio[1:], [2.5, 97.5])
  return float(ratio[0]), float(low), float(high)


def _of_repeats(base, method) -> tuple[float, float | None, float | None]:
  """`ratio_with_interval` of one batch."""
  tokens = float(method[1][0] / base[1][0])
  ratio = tokens * float(base[0].sum() / method[0].sum())
  logs = np.log(tokens * base[0][:, 0] / method[0][:, 0])
  if len(logs) < 3:
    return ratio, None, None
  width = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
  low, high = np.exp(logs.mean() + np.array([-width, width]))
  return ratio, float(low), float(high)


def _tokens(result: Measured, first: bool = True) -> np.ndarray:
  """[batches] tokens emitted; first=False: those of decoding alone."""
  counts = [len(g.token_ids) - (not first) for g in result.generations]
  size = result.batch
  return np.array(
    [sum(counts[i : i + size]) for i in range(0, len(counts), size)]
  )


def _ms_per_token(result: Measured) -> float | None:
  tokens = _tokens(result, first=result.refill).sum()
  seconds = result.decode_seconds.sum(1).mean()
  return float(1e3 * seconds / tokens) if tokens else None


def step_ms(result: Measured) -> float | None:
  """Of one pass of the loop; a batch runs until its last row is done."""
  if result.refill:
    return None
  steps, size = [g.target_calls - 1 for g in result.generations], result.batch
  passes = sum(max(steps[i : i + size]) for i in range(0, len(steps), size))
  seconds = result.decode_seconds.sum(1).mean()
  return float(1e3 * seconds / passes) if passes else None


# -- agreement with plain decoding -------------------------------------------


def promises(drafter: Drafter, settings: Settings) -> bool:
  """Whether the tokens of plain decoding are: where they are certain, by each
  rule; where they are drawn, by "exact" alone."""
  return drafter.rule == "exact" or settings.temperature == 0


def _agreement(model, prompts, result, by_name, settings) -> dict:
  """identical, max_tie_margin, and mismatch: words for what is no tie."""
  if result.method.expects is None or not promises(result.drafter, settings):
    return {"identical": None, "max_tie_margin": None, "mismatch": None}
  seeds = settings.seeds(len(prompts))
  draws = [
    sampling.make(1, **settings.sampling(), seed=int(seed)) for seed in seeds
  ]
  found = ties.compare(
    model,
    prompts,
    [g.token_ids for g in by_name[result.method.expects].generations],
    [g.token_ids for g in result.generations],
    draws,
    attach_streams=result.drafter.num_streams > 0,
  )
  widest = max(found, key=lambda d: d.margin, default=None)
  bound = ties.widest_tie(model.config.dtype)
  wrong = widest is not None and widest.margin >= bound
  finite = widest is not None and math.isfinite(widest.margin)
  return {
    "identical": 1 - len(found) / len(prompts),
    "max_tie_margin": widest.margin if finite else None,
    "mismatch": str(widest) if wrong else None,
  }
