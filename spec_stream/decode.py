"""Decoding from the host: `generate` and `stream`, and what they compile.

`generate` makes compiled calls: the prefill, and `lax.while_loop` over `step`
until every row is done, with the state donated. `stream` runs the same `step`
call by call. The loop also ends when a row has no room for another step: it
goes on as a program for a larger cache (`buckets`).

Letters: B batch row, M tree nodes, S cache slots.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import buckets, one_pass, refill, stops
from spec_stream.cache import empty
from spec_stream.drafters.base import Drafter, Params, check_rule
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models import attention
from spec_stream.models.lora import devices
from spec_stream.models.transformer import (
  Transformer,
  for_decoding,
  uses_panels,
)
from spec_stream.sampling import make as make_sampling
from spec_stream.step import DecodeState, has_room, prefill, step
from spec_stream.tree import TokenTree


class Graph:
  """What a model is beside its weights; as a static argument equal to itself
  alone.

  In each call of a program a graphdef of nnx would be hashed and its weights
  found one by one, in Python: 1.5 ms and more with 12 layers. Of equal models
  the graph is the same one, and so are their programs.
  """

  def __init__(self, graphdef: nnx.GraphDef, tree: jax.tree_util.PyTreeDef):
    self._graphdef, self._tree = graphdef, tree

  @staticmethod
  def split(params: Params) -> tuple["Graph", list]:
    """-> (graph, weights, in the order of their names)."""
    graphdef, state = nnx.split(params)
    weights, tree = jax.tree.flatten(state)
    return _graph(graphdef, tree), weights

  def merge(self, weights: list) -> Params:
    return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, weights))


_graph = functools.cache(Graph)  # kept for ever: no weights are in it


# Jitted entry points. Target and drafter's own weights (`Params`) travel as
# (graph, weights): their structure is static, their weights are arguments.

_STATIC = ("graph", "drafter", "slots", "num_new")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill(graph, weights, drafter, slots, num_new, *args):
  params = graph.merge(weights)
  return prefill(params, drafter, *args, slots=slots, num_new=num_new)


@functools.partial(jax.jit, static_argnames=(*_STATIC, "batch"))
def _serve(graph, weights, drafter, slots, num_new, batch, requests):
  params = graph.merge(weights)
  return refill.serve(params, drafter, requests, batch, slots, num_new)


@functools.partial(
  jax.jit, static_argnames=("graph", "drafter"), donate_argnames="state"
)
def _loop(graph, weights, drafter, state):
  params = graph.merge(weights)
  return jax.lax.while_loop(
    lambda state: (~state.done).any() & has_room(state, drafter),
    lambda state: step(params, drafter, state),
    state,
  )


@functools.partial(jax.jit, static_argnames="shape")
def _pad(x, shape):
  """x at the beginning of zeros."""
  return jnp.pad(x, [(0, new - old) for new, old in zip(shape, x.shape)])


@functools.partial(jax.jit, static_argnames=("graph", "drafter"))
def _step(graph, weights, drafter, state):
  return step(graph.merge(weights), drafter, state)


def suit(model: Transformer, to):
  """Sets what a step's program depends on beside shapes; to: the devices that
  hold the weights.

  A drafter's model (`draft_model`) is suited too, of which the kernel reads
  what the draft catches up with; one that is no Transformer (EAGLE's) is not.
  """
  platform, coarse = next(iter(to)).platform, model.coarse is not None
  model.one_pass_rows = one_pass.most_rows(platform, coarse)
  kernels = attention.kernels_on(to)
  copies = model.coarse.blocks if model.coarse else ()
  for block in (*model.blocks, *copies):
    block.attention.kernels = kernels


class Decoder:
  """A target and a drafter, checked against each other and ready to run.

  The model is made ready here, see `for_decoding`. Holds no state between
  requests: `generate` calls `start` and `finish`, apart so that they can be
  timed apart.

  own: the drafter's own weights; None: those that came with the model, if any.
  """

  def __init__(self, model: Transformer, drafter: Drafter, own=None):
    self.config = model.config
    model = for_decoding(model)
    target = nnx.clone(model)
    target.drafter = nnx.data(None)
    on = devices(model.embed.table[...]) or jax.devices()[:1]
    suit(target, on)
    if own is None and drafter.Module is not None:
      own = model.drafter
    if isinstance(own, Transformer):
      own = nnx.clone(for_decoding(own))
      suit(own, on)
    self.drafter = drafter.resolve(model.config, own)
    check_rule(self.drafter)
    self.graph, self.weights = Graph.split(Params(target, own))

  def in_one_pass(self, batch: int) -> bool | None:
    """Whether nodes carry streams, see `one_pass`; None if none are drafted
    from."""
    if not self.drafter.stream_depth:
      return None
    target = self.graph.merge(self.weights).target
    return one_pass.streams_on_nodes(target, self.drafter, batch) > 0

  def in_panels(self) -> bool:
    """Whether kernels of the target lie in `panels`."""
    return uses_panels(self.graph.merge(self.weights).target)

  def start(
    self, prompts: Sequence[Sequence[int]], *, grow: bool = True, **settings
  ) -> DecodeState:
    """Prefill of a batch of prompts; arguments as in `generate`."""
    args, first, most, num_new = self._requests(prompts, **settings)
    slots = first if grow else most
    return _prefill(
      self.graph, self.weights, self.drafter, slots, num_new, *args
    )

  def serve(
    self,
    prompts: Sequence[Sequence[int]],
    batch: int,
    **settings,
  ) -> refill.Served:
    """All prompts by `batch` rows in one compiled loop: see `refill`. The cache
    has all slots at once, for rows at all lengths."""
    if not 0 < batch <= len(prompts):
      raise UserError(
        f"batch={batch} must lie between 1 and the {len(prompts)} prompts"
      )
    args, _, slots, num_new = self._requests(prompts, **settings)
    return _serve(
      self.graph,
      self.weights,
      self.drafter,
      slots,
      num_new,
      batch,
      refill.Requests(*args),
    )

  def _requests(
    self,
    prompts,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    end_token: int | Sequence[int] = -1,
    stop: Sequence[Sequence[int]] | np.ndarray = (),
    slots: int = 0,
    **sampling,
  ) -> tuple[tuple, int, int, int]:
    """-> (what `prefill` takes, slots to begin with, slots to end with, room
    for new tokens), checked."""
    prompts = [np.asarray(p, np.int64) for p in prompts]
    batch = len(prompts)
    limits = np.broadcast_to(np.asarray(max_new_tokens, np.int64), (batch,))
    if not prompts:
      raise UserError("no prompt given: a batch needs at least one")
    self.check(prompts, limits)
    positions, longest = self.config.max_positions, self.drafter.longest
    bucket = buckets.bucket(max(len(p) for p in prompts), positions)
    num_new = buckets.bucket(int(limits.max()), positions)
    slots = buckets.check(slots, positions, longest)
    most = max(slots, buckets.whole(bucket, num_new + longest))
    first = buckets.first(max(slots, bucket + longest + 1), most)
    ends = np.atleast_1d(np.asarray(end_token, np.int64))
    for end in ends:
      if not -1 <= end < self.config.vocab_size:
        raise UserError(
          f"end token {end} is outside the vocabulary of "
          f"{self.config.vocab_size} tokens"
        )
    if not isinstance(stop, np.ndarray):
      stop = stops.of_tokens(stop, self.config.vocab_size) if stop else None
    elif stop.ndim != 2 or stop.shape[1] != self.config.vocab_size:
      raise UserError(
        f"stop has shape {stop.shape}: give lists of token ids, or a table of "
        "spec_stream.stops for this vocabulary"
      )
    padded = np.zeros((batch, bucket), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
      row[: len(prompt)] = prompt
    args = (
      padded,
      np.array([len(p) for p in prompts], np.int32),
      limits.astype(np.int32),
      ends.astype(np.int32),
      stop,
      make_sampling(batch, **sampling),
    )
    return args, first, most, num_new

  def finish(self, state: DecodeState) -> DecodeState:
    """Decodes to the end of every row. `state` is donated."""
    state = self._run(state)
    while not np.asarray(state.done).all():
      state = self._grown(state, donate=True)
      state = self._run(state)
    return state

  def warm_up(self, prompts: Sequence[Sequence[int]], **settings):
    """Compiles what `start` and `finish` of such requests may need, whatever
    the length of their outputs, which it decodes once.

    Else `finish` compiles a loop when first an output outgrows a cache.
    """
    state = self.finish(self.start(prompts, **settings))
    while self._larger(state) > state.cache.num_slots:
      state = self._grown(state, donate=True)
      state = self._run(state)
    jax.block_until_ready(state)

  def _run(self, state: DecodeState) -> DecodeState:
    return _loop(self.graph, self.weights, self.drafter, state)

  def lower(self, state: DecodeState) -> jax.stages.Lowered:
    """The loop of `finish` for the cache of `state`, which may be abstract."""
    return _loop.lower(self.graph, self.weights, self.drafter, state)

  def step(self, state: DecodeState) -> DecodeState:
    """One step, for streaming and debugging."""
    if not has_room(state, self.drafter):
      state = self._grown(state)
    return _step(self.graph, self.weights, self.drafter, state)

  def _grown(self, state: DecodeState, donate: bool = False) -> DecodeState:
    """With a larger cache; array by array, so that with `donate` no more is
    held than the old or the new, and one array."""
    layers, slots = state.cache.layers, self._larger(state)
    batch, *heads, _ = layers[0][0].shape

    def larger():
      params = self.graph.merge(self.weights)
      cache = empty(batch, slots, len(layers), *heads, layers[0][0].dtype)
      return cache, self.drafter.init(params, batch, slots)

    def grow(old, new):
      if old.shape == new.shape:
        return old
      made = _pad(old, new.shape)
      if donate:
        old.delete()
      return made

    held = state.cache, state.drafter
    cache, own = jax.tree.map(grow, held, jax.eval_shape(larger))
    return state.replace(cache=cache, drafter=own)

  def _larger(self, state: DecodeState) -> int:
    """Slots that come after those of `state`; they stay, if all are there."""
    longest = int((state.cache.length - state.num_tokens).max()) + 1
    bucket = buckets.bucket(longest, self.config.max_positions)
    most = buckets.whole(bucket, state.tokens.shape[1])
    return buckets.larger(state.cache.num_slots, most)

  def check(self, prompts: Sequence[Sequence[int]], limits):
    """Raises: UserError, naming the prompt by its place, if one is empty, too
    long for the cache, or outside the vocabulary.

    limits: most new tokens, of all prompts or of each.
    """
    vocab, most = self.config.vocab_size, self.config.max_positions
    prompts = [np.asarray(p, np.int64) for p in prompts]
    limits = np.broadcast_to(np.asarray(limits, np.int64), (len(prompts),))
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
      if not len(prompt):
        raise UserError(f"prompt {i} is empty: it needs at least one token")
      bad = prompt[(prompt < 0) | (prompt >= vocab)]
      if bad.size:
        raise UserError(
          f"prompt {i} has token {bad[0]}: the vocabulary ends at {vocab - 1}"
        )
      if limit < 1:
        raise UserError(f"max_new_tokens={limit} must be 1 or more")
      if len(prompt) + limit > most:
        raise UserError(
          f"prompt {i} of {len(prompt)} tokens and {limit} new ones do not fit "
          f"the cache of {most} (model.max_positions): shorten the prompt or "
          "lower max_new_tokens"
        )


@dataclasses.dataclass(frozen=True)
class Generation:
  """Output of one request."""

  token_ids: list[int]  # new tokens; the end token is the last, if it came
  calls: list[int]  # call of the target that emitted each; 0 = prefill
  target_calls: int  # prefill included
  accepts: list[int]  # steps that accepted a node of depth 0, 1, ...

  @property
  def tokens_per_call(self) -> float:
    return len(self.token_ids) / self.target_calls


def tokens_per_call(generations: Sequence[Generation]) -> float:
  """Of all together: tokens over calls of the target, prefills included."""
  calls = sum(g.target_calls for g in generations)
  return sum(len(g.token_ids) for g in generations) / calls


def _check_finite(state: DecodeState | refill.Served):
  broken = np.flatnonzero(jax.device_get(state.broken))
  if broken.size:
    raise UserError(
      f"the model's logits are not finite after {state.num_tokens[broken[0]]} "
      f"new tokens of prompt {broken[0]} of its batch: its weights hold NaN or "
      "infinity, or are too large for its dtype"
    )


def collect(state: DecodeState | refill.Served) -> list[Generation]:
  """The outputs of a finished state, on the host.

  Raises: UserError if a row met logits that are not finite.
  """
  _check_finite(state)
  done = jax.device_get(
    (state.tokens, state.calls, state.num_tokens, state.accepts)
  )
  if isinstance(state, refill.Served):
    done = [x[:-1] for x in done]
  return [
    Generation(
      token_ids=tokens[:count].tolist(),
      calls=calls[:count].tolist(),
      target_calls=1 + int(accepts[0]),
      accepts=accepts.tolist(),
    )
    for tokens, calls, count, accepts in zip(*done, strict=True)
  ]


def generate(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  drafter: Drafter | None = None,
  own=None,
  batch: int = 0,
  **settings,
) -> list[Generation]:
  """Decodes prompts (token ids) in a compiled loop.

  Args:
    model: the target. For many calls give `for_decoding(model)`, or make one
      `Decoder`: else each call makes it ready anew.
    prompts: token ids; rows may differ in length.
    drafter: StreamDraft() if None.
    own: the drafter's own weights, see `Decoder`.
    batch: rows decoded at once; a row that is done goes on with the next prompt
      (see `refill`). 0: a row for each prompt.
    **settings: max_new_tokens=128 and those of `sampling.make`, one value or
      one per prompt; end_token=-1 (none), or several, any of which ends a row;
      stop=(), sequences of token ids that do, or a table of `stops` for text;
      slots=0, the least of the cache; without `batch` also grow=True, or
      False: the cache is made at once with as many as prompt and output may
      need, so that all is one program and no cache is copied.
      The noise of a request depends on its seed and on positions alone: the
      same prompt and seed give the same tokens in any batch, with any drafter.

  Raises:
    UserError: prompt empty, too long, or outside the vocabulary; a setting out
      of range; a drafter that does not fit the model.
  """
  decoder = Decoder(model, drafter or StreamDraft(), own)
  if batch:
    return collect(decoder.serve(prompts, batch, **settings))
  return collect(decoder.finish(decoder.start(prompts, **settings)))


@dataclasses.dataclass(frozen=True)
class Step:
  """One call of the target while streaming; node 0 is the root."""

  token_ids: list[int]  # emitted by this call
  tree: TokenTree | None  # the draft it verified, [M] arrays; None for prefill
  path: list[int]  # accepted nodes of `tree`, root first


def stream(
  model: Transformer,
  prompt: Sequence[int],
  drafter: Drafter | None = None,
  own=None,
  **settings,
) -> Iterator[Step]:
  """`generate` for one prompt, call by call, with the drafts; model: as
  there."""
  decoder = Decoder(model, drafter or StreamDraft(), own)
  state = decoder.start([prompt], **settings)
  _check_finite(state)
  yield Step(state.tokens[0, :1].tolist(), None, [])
  while not bool(state.done[0]):
    before, tree = state, jax.tree.map(lambda x: np.asarray(x[0]), state.tree)
    state = decoder.step(state)
    _check_finite(state)
    first, last = int(before.num_tokens[0]), int(state.num_tokens[0])
    accepts = np.asarray(state.accepts[0] - before.accepts[0]).sum()
    drawn = np.asarray(state.tokens[0, first : first + accepts])
    path = path_of(tree, drawn[: accepts - 1])
    yield Step(state.tokens[0, first:last].tolist(), tree, path)


def path_of(tree: TokenTree, tokens) -> list[int]:
  """Nodes of `tree` ([M] arrays) that spell `tokens` below the root. Siblings
  may be alike: then it is one that leads on."""
  reached = [[0]]
  for token in tokens:
    match = np.isin(tree.parents, reached[-1]) & (tree.tokens == token)
    reached.append(np.flatnonzero(match))
  path = [int(reached[-1][0])]
  while path[0] > 0:
    path.insert(0, int(tree.parents[path[0]]))
  return path
