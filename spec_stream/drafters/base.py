"""What a drafter is: the one place where decoding methods differ.

A drafter is a frozen, hashable dataclass: it is static in the compiled loop.
Each rival is one file that draws up trees; the target, the cache, the
acceptance rule and the loop are the same for all of them.

A drafter with weights of its own also has `Options` (a frozen dataclass) and a
`Module` (an `nnx.Module`), made from the target's config and the options.
`launch/train.py` trains the module beside a frozen target, or with it.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import Transformer
from spec_stream.rules import RULES
from spec_stream.sampling import Sampling, coupled
from spec_stream.tree import TokenTree, TreeSpec


@flax.struct.dataclass
class Accepted:
  """What one call of the target decided; after prefill, the prompt.

  `tokens` are those committed to the cache by the call (root of the verified
  tree and accepted nodes), with the target's hidden states.
  """

  root: jax.Array  # [B] the new root: the last token emitted, not yet committed
  position: jax.Array  # [B] absolute position of the new root
  tokens: jax.Array  # [B, A] committed tokens, then junk
  count: jax.Array  # [B] how many of them count
  hidden: jax.Array  # [B, A, D] final-normed hidden at `tokens`
  streams: jax.Array | None  # [B, J or J', D] of the last committed token
  stream_logits: jax.Array | None = None  # [B, J', V] of its first, if known
  taps: jax.Array | None = None  # [B, A, n, D] of the layers in Drafter.taps
  draws: jax.Array | None = None  # [B, M] draw at each node; not after prefill
  sampling: Sampling | None = None  # of the requests

  @property
  def last_hidden(self) -> jax.Array:
    """[B, D] at the last committed token, which the root follows."""
    at = (self.count - 1)[:, None, None]
    return jnp.take_along_axis(self.hidden, at, 1)[:, 0]


class Params(NamedTuple):
  target: Transformer
  own: Any = None  # the drafter's own weights: an nnx.Module


class Drafter:
  """Base of all drafters. What a subclass does not set, stands here."""

  name: str
  num_streams = 0  # streams of a node: of which nodes, says `one_pass`
  stream_depth = 0  # J' of the first streams that it drafts from
  prune = Prune()  # early-exit pruning of its trees
  taps: tuple[int, ...] = ()  # layers whose hidden states it reads
  rule = "exact"  # of rules.RULES: how its drafts are accepted
  # Whether what it drafts at a depth is the same for any tree, see cost_model.
  nested = False
  # Of drafters with weights: what they are made of, and the weights.
  Options: type | None = None
  Module: type | None = None

  @classmethod
  def of(cls, tree: TreeSpec, length: int, prune: Prune) -> "Drafter":
    """From what a user may set; length: tokens to draft ahead, 0 = its own."""
    del prune  # of streams alone
    return cls(tree=tree, length=length)

  def resolve(self, config: ModelConfig, own: Any = None) -> "Drafter":
    """Checks against the target's config and the drafter's own weights; fills
    in what was left open. The two properties below are fixed from then on."""
    raise NotImplementedError

  @property
  def num_nodes(self) -> int:
    """M: nodes of the trees it proposes, root included."""
    raise NotImplementedError

  @property
  def longest(self) -> int:
    """A: nodes of the longest path, root included."""
    raise NotImplementedError

  def distribution(self, state: Any) -> jax.Array:
    """[B, A - 1, V] probabilities that the nodes of each depth of its last
    draft were drawn from, siblings without replacement: see `accept`."""
    raise NotImplementedError

  def guess(
    self, accepted: Accepted, logits: jax.Array, level: int | None = None
  ) -> jax.Array:
    """Logits [B, n, V] with which its drafts are to be chosen.

    level: how many drafted tokens stand before those that `logits` are of; None
    if they are of 0 .. n - 1.
    """
    if self.rule != "exact" or accepted.sampling is None:
      return logits
    at, depth, longest = accepted.position, jnp.arange(logits.shape[1]), 1
    if level is None:
      longest = logits.shape[1]
    else:  # all of one depth
      at, depth = at + level, 0
    return coupled(logits, depth, at, longest, accepted.sampling)

  def init(self, params: Params, batch: int, slots: int) -> Any:
    """The drafter's own state, a pytree of arrays (or None).

    slots: of the target's cache, enough for the prompt, a draft and its root.
      When it grows, arrays get zeros at their ends, to the shapes that more
      slots give here.
    """
    return None

  def propose(
    self, params: Params, state: Any, accepted: Accepted
  ) -> tuple[TokenTree, Any]:
    """The next tree to verify, [B, M], and the drafter's next state."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TreeDrafter(Drafter):
  """What most drafters are: a tree of nodes, some tokens ahead.

  tree: its kind and size; length: tokens to draft ahead, 0 = its own.
  """

  tree: TreeSpec = TreeSpec()
  length: int = 0
  num_streams: int = 0
  rule: str = "exact"

  def resolved(self, config: ModelConfig, tree: TreeSpec, length: int, **more):
    """Itself, with what was open and the streams that the target needs."""
    return dataclasses.replace(
      self, tree=tree, length=length, num_streams=attached(config), **more
    )

  @property
  def num_nodes(self) -> int:
    return self.tree.num_nodes

  @property
  def longest(self) -> int:
    return self.tree.reach(self.length)


class DrafterModule(nnx.Module):
  """The weights of a drafter, made by `Module(config, options, rngs=rngs)`.

  `options.length` is how many tokens ahead its loss asks for. Names of weights
  end in _kernel, _kernels (of several heads) or _bias: see `sharding`.
  """

  taps: tuple[int, ...] = ()  # layers of the target that its loss reads

  @staticmethod
  def start(options: Any, weights: dict) -> dict:
    """What fresh weights copy from the target's, both by path."""
    return {}

  def loss(self, model, batch, at, main, config, count, out):
    """-> (the loss, its parts by name); arguments as of `losses.ahead`, and the
    output of the pass."""
    raise NotImplementedError


def attached(config: ModelConfig) -> int:
  """Streams without which the target would be another model: see NoDraft."""
  return config.streams.num_streams if config.streams.attends else 0


def zeros(*shape: int) -> nnx.Param:
  """A weight of a drafter: float32, whatever the target's type."""
  return nnx.Param(jnp.zeros(shape, jnp.float32))


def normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
  """The same, with random values of variance 1 / inputs; [..., in, out]."""
  init = jax.nn.initializers.normal(shape[-2] ** -0.5, dtype=jnp.float32)
  return nnx.Param(init(rngs.params(), shape))


def lm_head(base: dict) -> jax.Array:
  """The target's LM head [D, V] float32 without its bias, from its weights by
  path."""
  if "head/kernel" in base:
    return jnp.asarray(base["head/kernel"], jnp.float32)
  return jnp.asarray(base["embed/table"], jnp.float32).T


def check_length(drafter: Drafter, trained: int) -> int:
  """Tokens to draft ahead, of a drafter that was trained for so many.

  Raises: UserError.
  """
  length = drafter.length or trained
  if not 0 < length <= trained:
    raise UserError(
      f"draft_length={length}: {drafter.name} was trained for {trained}"
    )
  return length


def check_rule(drafter: Drafter):
  """Raises: UserError for a rule that is unknown or needs drafts that this
  drafter does not draw."""
  if drafter.rule not in RULES:
    raise UserError(f"accept={drafter.rule}: use one of {', '.join(RULES)}")
  draws = type(drafter).distribution is not Drafter.distribution
  if drafter.rule == "rejection" and not draws:
    raise UserError(
      f"accept=rejection needs drafts that are drawn at random, and "
      f"{drafter.name} takes the most probable: use exact"
    )


def check_own(drafter: Drafter, own: Any):
  """Raises: UserError unless `own` are weights of this drafter."""
  if not isinstance(own, drafter.Module):
    raise UserError(
      f"this model was trained without {drafter.name}: train it with "
      f"model.drafter.name={drafter.name}, or name its run as "
      f"--drafters={drafter.name}=DIR"
    )
