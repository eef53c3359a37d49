"""The target's next token at every node: greedy, or Gumbel noise.

A draw is `argmax(logits / temperature + gumbel)`. The noise is a function of
the request's own seed and the absolute position of the drawn token alone: not
of its place in a batch, nor of the tree or the call it was verified in. All
nodes of one depth share it, and plain decoding meets the same noise at the
same position: hence equal tokens under equal seeds, for any drafter.

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
  # Static: what no row of the batch needs is not compiled.
  greedy: bool = flax.struct.field(pytree_node=False, default=True)
  filtered: bool = flax.struct.field(pytree_node=False, default=False)


def make(batch: int, temperature=0.0, top_k=0, top_p=1.0, seed=0) -> Sampling:
  """Sampling for `batch` requests; each setting one number or [B]."""

  def rows(name, value, dtype, valid, right):
    value = np.asarray(value)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
      raise UserError(f"{name} must be one number or one per request ({batch})")
    if not np.all(valid(value)):
      raise UserError(f"{name} must be {right}, not {value.tolist()}")
    return np.broadcast_to(value, (batch,)).astype(dtype)

  finite = lambda x: np.isfinite(x) & (x >= 0)
  temperature = rows(
    "temperature", temperature, np.float32, finite, "0 (greedy) or more"
  )
  top_k = rows("top_k", top_k, np.int32, lambda x: x >= 0, "0 (off) or more")
  top_p = rows(
    "top_p", top_p, np.float32, lambda x: (x > 0) & (x <= 1), "in (0, 1]"
  )
  fits = lambda x: (x >= 0) & (x < 2**32)
  seed = rows("seed", seed, np.uint32, fits, "in [0, 2**32)")
  return Sampling(
    seed=jnp.asarray(seed),
    temperature=jnp.asarray(temperature),
    top_k=jnp.asarray(top_k),
    top_p=jnp.asarray(top_p),
    greedy=not temperature.any(),
    filtered=bool((top_k > 0).any() or (top_p < 1).any()),
  )


def noise(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
  """Gumbel noise [B, P, V] float32 for seed [B] and positions [B, P]."""

  def one(seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)

  return jax.vmap(jax.vmap(one, (None, 0)))(seed, position)


def filter_logits(
  logits: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
  """Sets what top-k, then top-p of the rest, exclude to -inf.

  logits: [B, M, V], at temperature 1 already; top_k, top_p: [B]. Top-p keeps
  the smallest set of the most probable tokens whose probability reaches top_p.
  Equal logits: the lower token id first.
  """
  vocab = logits.shape[-1]
  order = jnp.argsort(logits, -1, descending=True, stable=True)
  ranked = jnp.take_along_axis(logits, order, -1)
  top_k = jnp.where(top_k > 0, top_k, vocab)[:, None, None]
  keep = jnp.arange(vocab) < top_k
  probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), -1)
  before = jnp.cumsum(probs, -1) - probs
  # Rounding must neither exclude the first token, nor anything at top_p = 1: a
  # request that filters nothing may stand in one batch with one that does.
  top_p = top_p[:, None, None]
  keep &= (before < top_p) | (top_p >= 1) | (jnp.arange(vocab) == 0)
  rank = jnp.argsort(order, -1)  # the inverse permutation
  keep = jnp.take_along_axis(keep, rank, -1)
  return jnp.where(keep, logits, -jnp.inf)


def scores(
  logits: jax.Array,
  depth: jax.Array,
  position: jax.Array,
  longest: int,
  sampling: Sampling,
) -> jax.Array:
  """[B, M, V] whose argmax is the draw; see `draw`."""
  if sampling.greedy:
    return logits
  temperature = sampling.temperature[:, None, None]
  scaled = logits / jnp.where(temperature > 0, temperature, 1)
  if sampling.filtered:
    scaled = filter_logits(scaled, sampling.top_k, sampling.top_p)
  # Noise once per depth: the draw of a node at depth d is for the next token.
  levels = position[:, None] + 1 + jnp.arange(longest)  # [B, A]
  gumbel = noise(sampling.seed, levels, logits.shape[-1])
  gumbel = jnp.take_along_axis(gumbel, depth[..., None], 1)
  return jnp.where(temperature > 0, scaled + gumbel, logits)


def draw(
  logits: jax.Array,
  depth: jax.Array,
  position: jax.Array,
  longest: int,
  sampling: Sampling,
) -> jax.Array:
  """The target's own next token after each node, [B, M] int32.

  Args:
    logits: [B, M, V].
    depth: [B, M], below `longest`.
    position: [B] absolute position of the root.
    longest: A, static.
    sampling: of the B requests.
  """
  return argmax(scores(logits, depth, position, longest, sampling))


def argmax(x: jax.Array) -> jax.Array:
  """Index of the largest along the last axis, the lowest of equals; int32.

  By two plain reductions: on a CPU, XLA does not vectorise a reduction over
  pairs, and `jnp.argmax` takes several times as long.
  """
  ids = jnp.arange(x.shape[-1], dtype=jnp.int32)
  top = x == x.max(-1, keepdims=True)
  return jnp.where(top, ids, x.shape[-1] - 1).min(-1)
