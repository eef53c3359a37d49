"""The target's next token at every node: greedy, or Gumbel noise.

A draw is `argmax(logits / temperature + gumbel)`, the logits after penalty and
filters, in the order of `transformers`: repetition penalty, temperature, top-k,
top-p, min-p. The noise is a function of the request's own seed and the absolute
position of the drawn token alone: not of its place in a batch, nor of the tree
or the call it was verified in. All nodes of one depth share it, and plain
decoding meets the same noise at the same position: hence equal tokens under
equal seeds, for any drafter.

Letters: B batch row, M nodes, V vocabulary.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spec_stream.errors import UserError


@flax.struct.dataclass
class Sampling:
  """How each request of a batch draws."""

  seed: jax.Array  # [B] uint32
  temperature: jax.Array  # [B] float32, 0 = greedy
  top_k: jax.Array  # [B] int32, 0 = all
  top_p: jax.Array  # [B] float32, 1 = all
  min_p: jax.Array  # [B] float32, 0 = all
  repetition_penalty: jax.Array  # [B] float32, 1 = none
  # Static: what no row of the batch needs is not compiled.
  greedy: bool = flax.struct.field(pytree_node=False, default=True)
  filtered: bool = flax.struct.field(pytree_node=False, default=False)
  penalized: bool = flax.struct.field(pytree_node=False, default=False)


def make(
  batch: int,
  temperature=0.0,
  top_k=0,
  top_p=1.0,
  min_p=0.0,
  repetition_penalty=1.0,
  seed=0,
) -> Sampling:
  """Sampling for `batch` requests; each setting one number or [B].

  temperature: 0 is greedy. top_k: the k most probable tokens, 0 is all. top_p:
  the most probable that reach p, 1 is all. min_p: those at least so probable,
  relative to the most probable, 0 is all. repetition_penalty: what divides the
  positive logits of tokens in prompt and output, and multiplies the negative
  (Keskar et al., 1909.05858), 1 is none; greedy requests heed it, too.

  Raises: UserError for a value out of range.
  """

  def rows(name, value, dtype, valid, right):
    with np.errstate(over="ignore"):
      given = value = np.asarray(value)
      if dtype == np.float32:  # what is too small or large for it is no number
        value = value.astype(dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
      raise UserError(f"{name} must be one number or one per request ({batch})")
    if not np.all(valid(value)):
      raise UserError(f"{name} must be {right}, not {given.tolist()}")
    return np.broadcast_to(value, (batch,)).astype(dtype)

  finite = lambda x: np.isfinite(x) & (x >= 0)
  temperature = rows(
    "temperature", temperature, np.float32, finite, "0 (greedy) or more"
  )
  top_k = rows("top_k", top_k, np.int32, lambda x: x >= 0, "0 (off) or more")
  top_p = rows(
    "top_p", top_p, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"
  )
  min_p = rows(
    "min_p", min_p, np.float32, lambda x: (x >= 0) & (x <= 1), "in [0, 1]"
  )
  positive = lambda x: np.isfinite(x) & (x > 0)
  penalty = rows(
    "repetition_penalty", repetition_penalty, np.float32, positive, "above 0"
  )
  fits = lambda x: (x >= 0) & (x < 2**32)
  seed = rows("seed", seed, np.uint32, fits, "in [0, 2**32)")
  return Sampling(
    seed=jnp.asarray(seed),
    temperature=jnp.asarray(temperature),
    top_k=jnp.asarray(top_k),
    top_p=jnp.asarray(top_p),
    min_p=jnp.asarray(min_p),
    repetition_penalty=jnp.asarray(penalty),
    greedy=not temperature.any(),
    filtered=bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any()),
    penalized=bool((penalty != 1).any()),
  )


def noise(
  seed: jax.Array, position: jax.Array, size: int, purpose: str = "target"
) -> jax.Array:
  """Noise [B, P, size] float32 for seed [B] and positions [B, P].

  purpose: "target" and "draft" are Gumbel noise, "accept" is uniform in [0, 1).
  """
  kind = ("target", "draft", "accept").index(purpose)
  make = jax.random.uniform if purpose == "accept" else jax.random.gumbel

  def one(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    key = jax.random.fold_in(key, kind) if kind else key
    return make(key, (size,), jnp.float32)

  return jax.vmap(jax.vmap(one, (None, 0)))(seed, position)


def next_positions(position: jax.Array, count: int) -> jax.Array:
  """[B, count] of the tokens that follow the one at `position` [B]."""
  return position[:, None] + 1 + jnp.arange(count)


def filter_logits(
  logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
  """Sets what top-k, then top-p of the rest, then min-p exclude to -inf.

  logits: [B, M, V], at temperature 1 already; top_k, top_p, min_p: [B]. Top-p
  keeps the smallest set of the most probable tokens whose probability reaches
  top_p; min-p what has at least min_p times the probability of the first.
  Equal logits: the lower token id first.
  """
  rows = lambda x: x[:, None, None]
  top_k = jnp.where(top_k > 0, top_k, logits.shape[-1])
  keep = _largest(logits, jnp.ones_like(logits, jnp.int32), rows(top_k))
  probs = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), -1)
  # Rounding must not exclude anything at top_p = 1: a request that filters
  # nothing may stand in one batch with one that does.
  top_p = rows(top_p)
  keep &= _largest(logits, probs, top_p) | (top_p >= 1)
  # The first is never excluded, whatever rounding does: log(1) is 0.
  floor = logits.max(-1, keepdims=True) + jnp.log(rows(min_p))
  return jnp.where(keep & (logits >= floor), logits, -jnp.inf)


def _largest(x: jax.Array, mass: jax.Array, need: jax.Array) -> jax.Array:
  """The fewest of the largest x [..., V] whose `mass` reaches `need` [..., 1];
  of equals those that stand first.

  The smallest of them is found bit by bit, in as many sums over V as a number
  has bits: sorting V numbers takes a CPU ten times as long and more.
  """
  x = jnp.where(x == 0, 0, x)  # -0 is no less than 0
  bits = 8 * x.dtype.itemsize
  kind = jnp.dtype(f"uint{bits}")
  keys = jax.lax.bitcast_convert_type(x, kind)
  sign = jnp.array(1 << (bits - 1), kind)
  keys = jnp.where(keys & sign, ~keys, keys | sign)  # in the order of x

  def refine(i, least):
    more = least | (sign >> i.astype(kind))
    total = jnp.where(keys >= more, mass, 0).sum(-1, keepdims=True)
    return jnp.where(total >= need, more, least)

  least = jnp.zeros_like(keys[..., :1])
  least = jax.lax.fori_loop(0, bits, refine, least)
  above, equal = keys > least, keys == least
  before = jnp.where(above, mass, 0).sum(-1, keepdims=True)
  ties = jnp.where(equal, mass, 0)
  return above | equal & (before + jnp.cumsum(ties, -1) - ties < need)


def penalize(
  logits: jax.Array, seen: jax.Array, repetition_penalty: jax.Array
) -> jax.Array:
  """Logits [B, M, V] with those of `seen` [B, M, V] tokens made smaller."""
  penalty = repetition_penalty[:, None, None]
  less = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, less, logits)


def seen_in(tokens: jax.Array, counts: jax.Array, vocab: int) -> jax.Array:
  """[B, V] bool: the tokens [B, T] for which `counts` [B, T] is True."""
  rows = jnp.arange(len(tokens))[:, None]
  at = jnp.where(counts, tokens, vocab)  # outside: dropped
  return (
    jnp.zeros((len(tokens), vocab), bool).at[rows, at].set(True, mode="drop")
  )


def seen_at_nodes(
  seen: jax.Array, tokens: jax.Array, above: jax.Array
) -> jax.Array:
  """[B, M, V] bool: `seen` [B, V] before the root, and on the path to a node.

  tokens: [B, M] of the nodes; above: [B, M, M] as of `tree.ancestors`.
  """
  one_hot = jax.nn.one_hot(tokens, seen.shape[1], dtype=jnp.float32)
  path = jnp.einsum("bmn,bnv->bmv", above.astype(jnp.float32), one_hot)
  return seen[:, None] | (path > 0)


def filtered(
  logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
  """Logits [B, M, V] after penalty, temperature and filters; those of greedy
  rows after the penalty alone."""
  if sampling.penalized and seen is not None:
    logits = penalize(logits, seen, sampling.repetition_penalty)
  if sampling.greedy:
    return logits
  temperature = sampling.temperature[:, None, None]
  # Below that nothing is left to chance, and logits must not become infinite.
  scaled = logits / jnp.where(
    temperature > 0, jnp.maximum(temperature, 1e-30), 1
  )
  if sampling.filtered:
    scaled = filter_logits(
      scaled, sampling.top_k, sampling.top_p, sampling.min_p
    )
  return jnp.where(temperature > 0, scaled, logits)


def probabilities(
  logits: jax.Array, sampling: Sampling, seen: jax.Array | None = None
) -> jax.Array:
  """[B, M, V] what the target draws from: of greedy rows a certainty."""
  logits = filtered(logits, sampling, seen)
  greedy = jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=logits.dtype)
  if sampling.greedy:
    return greedy
  warm = sampling.temperature[:, None, None] > 0
  return jnp.where(warm, jax.nn.softmax(logits, -1), greedy)


def _gumbel(logits, depth, position, longest, sampling) -> jax.Array:
  """[B, M, V] noise of the draw at each node, which is for the next token; made
  once per depth."""
  levels = next_positions(position, longest)  # [B, A]
  gumbel = noise(sampling.seed, levels, logits.shape[-1])
  return jnp.take_along_axis(gumbel, depth[..., None], 1)


def scores(
  logits: jax.Array,
  depth: jax.Array,
  position: jax.Array,
  longest: int,
  sampling: Sampling,
  seen: jax.Array | None = None,
) -> jax.Array:
  """[B, M, V] whose argmax is the draw; see `draw`."""
  logits = filtered(logits, sampling, seen)
  if sampling.greedy:
    return logits
  gumbel = _gumbel(logits, depth, position, longest, sampling)
  warm = sampling.temperature[:, None, None] > 0
  return jnp.where(warm, logits + gumbel, logits)


def coupled(
  logits: jax.Array,
  depth: jax.Array,
  position: jax.Array,
  longest: int,
  sampling: Sampling,
) -> jax.Array:
  """Guesses at the target's draw: a drafter's logits with the target's noise.

  Two draws with the same Gumbel noise agree with a probability of at least
  (1 - d) / (1 + d), d the distance in total variation between the two
  distributions (Daliri et al., 2408.07978); the token that is most probable
  without noise agrees as often as the target happens to draw it.

  Of `scores` times the temperature: what remains open is the difference between
  the logits of drafter and target, which the temperature does not change. A
  penalty is left out. Arguments as of `draw`; logits [B, M, V] at temperature
  1, depth [B, M] or [M].
  """
  if sampling.greedy:
    return logits
  depth = jnp.broadcast_to(depth, logits.shape[:2])
  gumbel = _gumbel(logits, depth, position, longest, sampling)
  temperature = sampling.temperature[:, None, None]
  # Beyond that it is all noise, and must not become infinite.
  guess = logits + jnp.minimum(temperature, 1e4) * gumbel
  if sampling.filtered:
    guess = jnp.where(filtered(logits, sampling) > -jnp.inf, guess, -jnp.inf)
  return jnp.where(temperature > 0, guess, logits)


def draw(
  logits: jax.Array,
  depth: jax.Array,
  position: jax.Array,
  longest: int,
  sampling: Sampling,
  seen: jax.Array | None = None,
) -> jax.Array:
  """The target's own next token after each node, [B, M] int32.

  Args:
    logits: [B, M, V].
    depth: [B, M], below `longest`.
    position: [B] absolute position of the root.
    longest: A, static.
    sampling: of the B requests.
    seen: [B, M, V] the tokens that a penalty is for; needed with one alone.
  """
  return argmax(scores(logits, depth, position, longest, sampling, seen))


def argmax(x: jax.Array) -> jax.Array:
  """Index of the largest along the last axis, the lowest of equals; int32.

  By two plain reductions: on a CPU, XLA does not vectorise a reduction over
  pairs, and `jnp.argmax` takes several times as long.
  """
  ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
  top = x == x.max(-1, keepdims=True)
  return jnp.where(top, ids, x.shape[-1] - 1).min(-1)
