"""Predicted speed of a drafter: what its drafts give times what they cost.

    speed-up = tokens per step / step cost

Tokens per step are a matter of drafter and text, step cost is one of device and
batch: each is measured apart (see `auto`) and holds for all of the other.

Best-first trees are nested: the M most probable nodes of a large one are the
tree of M nodes, and its nodes of depth J or less the tree of J streams. So one
decoding with the largest gives what all sizes and depths accept. Trees that are
not nested (pruned, or grown by a drafter that looks at its own tokens) are
known at the sizes that were decoded. Step costs are interpolated between those
that were timed, also where one takes one pass and the next two.

Letters: P calibration prompts, J tokens ahead, M nodes (root included).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from spec_stream.drafters.base import Drafter
from spec_stream.drafters.none import NoDraft

WORTH = 1.05  # predicted speed-up from which on drafts are made at all


@dataclasses.dataclass(frozen=True)
class Acceptance:
  """What verifications of calibration prompts accepted, prompt by prompt.

  The counts of `accepted` are by place in the tree: place m is the m-th node
  of those of depth j and less, in the tree's own order.
  """

  tokens: (
    np.ndarray
  )  # [P] that decoding emitted; the first of each is prefill's
  steps: np.ndarray  # [P] verifications
  accepted: (
    np.ndarray
  )  # [P, J, M] how often j = 1..J, m = 0..M - 1 was accepted

  def steps_of(self, num_nodes: int, length: int) -> np.ndarray:
    """[P] steps that a tree of `num_nodes` and depth `length` would take."""
    depths, nodes = self.accepted.shape[1:]
    if not (1 <= length <= depths and 1 <= num_nodes <= nodes):
      raise ValueError(f"{num_nodes} nodes, {length} ahead: not measured")
    more = self.accepted[:, length - 1, 1:num_nodes].sum(1)
    per_step = 1 + more / np.maximum(self.steps, 1)
    return (self.tokens - 1) / per_step


@dataclasses.dataclass(frozen=True)
class Prediction:
  drafter: Drafter  # resolved
  tokens_per_call: float  # prefills counted, as in results
  step_cost: float  # in steps of the fastest plain decoding
  speedup: float

  def __str__(self):
    name, nodes, length, kept = setting(self.drafter)
    if nodes == 1:
      return "no draft pays: plain decoding"
    return (
      f"{name}, {nodes} nodes, {length} tokens ahead"
      + f", {kept} nodes kept" * (kept > 0)
      + f": {self.tokens_per_call:.2f} tokens per call, step cost "
      f"{self.step_cost:.2f}, speed-up {self.speedup:.2f} predicted"
    )


# A resolved drafter as a key: name, nodes, tokens ahead, nodes kept.
Setting = tuple[str, int, int, int]


def setting(drafter: Drafter) -> Setting:
  return (
    drafter.name,
    drafter.num_nodes,
    ahead(drafter),
    drafter.prune.kept_nodes,
  )


@dataclasses.dataclass
class CostModel:
  """Acceptance by drafter, step costs by setting, of one batch size.

  acceptance: of a nested drafter by its name, of others by setting.
  costs: by setting; of plain decoding by ("none", 1, 0, 0).
  refill: whether rows go on with the next prompt, and none waits for another.
  """

  batch: int
  acceptance: dict[Any, Acceptance]
  costs: dict[Setting, float]
  refill: bool = False

  def predict(self, drafter: Drafter) -> Prediction | None:
    """None if it is none of those that were measured, or between them."""
    key = name, nodes, length, _ = setting(drafter)
    if isinstance(drafter, NoDraft):
      # Without streams that belong to the model it would be another's time.
      return self.plain(drafter) if drafter.attach_streams else None
    found = self.acceptance.get(name if nested(drafter) else key)
    cost = self._cost(drafter)
    if found is None or cost is None:
      return None
    steps = found.steps.astype(float)
    if nested(drafter):
      length = min(length, nodes - 1)  # as deep as the nodes reach
      if nodes > found.accepted.shape[2] or length > found.accepted.shape[1]:
        return None
      steps = found.steps_of(nodes, length)
    passes = np.sum if self.refill else functools.partial(_passes, self.batch)
    plain, drafted = passes(found.tokens - 1), passes(steps)
    calls = found.tokens.sum() / (len(steps) + steps.sum())
    return Prediction(drafter, calls, cost, plain / drafted / cost)

  def fields(self, drafter: Drafter) -> dict:
    """For a row of results: what was to be expected of it, if anything was."""
    found = self.predict(drafter)
    return {
      "predicted_tokens_per_call": found and found.tokens_per_call,
      "predicted_step_cost": found and found.step_cost,
      "predicted_speedup": found and found.speedup,
    }

  def plain(self, drafter: Drafter) -> Prediction:
    """Of plain decoding of this very model: slower than 1 where it must attach
    its streams."""
    cost = self.costs["none", 1, 0, 0]
    return Prediction(drafter, 1.0, cost, 1 / cost)

  def _cost(self, drafter: Drafter) -> float | None:
    name, nodes, length, kept = key = setting(drafter)
    if key in self.costs or not nested(drafter):
      return self.costs.get(key)
    # At each length that was timed by nodes, and then by length.
    timed = {s: c for s, c in self.costs.items() if (s[0], s[3]) == (name, 0)}
    lengths, costs = [], []
    for at in sorted({s[2] for s in timed}):
      xs, ys = zip(*sorted((s[1], c) for s, c in timed.items() if s[2] == at))
      if xs[0] <= nodes <= xs[-1]:
        lengths.append(at)
        costs.append(np.interp(nodes, xs, ys))
    if not lengths or not lengths[0] <= length <= lengths[-1]:
      return None
    return float(np.interp(length, lengths, costs))

  def best(self, drafters: Sequence[Drafter], off: Drafter) -> Prediction:
    """The fastest of them; `off`, plain decoding, unless one is WORTH it."""
    plain = self.plain(off)
    known = [p for p in map(self.predict, drafters) if p is not None]
    best = max(known, key=lambda p: p.speedup, default=plain)
    return best if best.speedup >= WORTH * plain.speedup else plain


def nested(drafter: Drafter) -> bool:
  """Whether its tree of M nodes is the first M of a larger one's, and accepts
  what that accepts of them. (Of fewer streams, nodes that the large tree had no
  room for count as refused.)"""
  if not drafter.nested or drafter.prune or drafter.tree.kind != "best_first":
    return False
  # A typical path may leave a small tree where the large one has another.
  whole = drafter.tree.width >= drafter.num_nodes - 1  # none was left out
  return whole and drafter.rule == "exact"


def ahead(drafter: Drafter) -> int:
  """Tokens ahead that it could draft with more nodes; of streams, the streams
  (other drafters have a `length`, and the streams that the target needs)."""
  if drafter.num_nodes == 1:
    return 0
  return getattr(drafter, "length", drafter.num_streams)


def _passes(batch: int, steps: np.ndarray) -> float:
  """Of the loop: a batch runs until its last row is done."""
  return sum(steps[i : i + batch].max() for i in range(0, len(steps), batch))
