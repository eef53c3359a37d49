"""What a drafter is: the one place where decoding methods differ.

A drafter is a frozen, hashable dataclass: it is static in the compiled loop.
Each rival is one file that draws up trees; the target, the cache, the
acceptance rule and the loop are the same for all of them.
"""

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import Transformer
from spec_stream.tree import TokenTree


@flax.struct.dataclass
class Accepted:
  """What one call of the target decided; after prefill, the prompt.

  `tokens` are those committed to the cache by the call (root of the verified
  tree and accepted nodes), with the target's hidden states.
  """

  root: jax.Array  # [B] the new root: the target's last draw, not yet committed
  position: jax.Array  # [B] absolute position of the new root
  tokens: jax.Array  # [B, A] committed tokens, then junk
  count: jax.Array  # [B] how many of them count
  hidden: jax.Array  # [B, A, D] final-normed hidden at `tokens`
  streams: jax.Array | None  # [B, J, D] streams of the last committed token


class Params(NamedTuple):
  target: Transformer
  own: Any = None  # pytree of the drafter's own weights


class Drafter(Protocol):
  """Frozen dataclass. After `resolve`, the properties below are fixed."""

  name: str

  def resolve(self, config: ModelConfig) -> "Drafter":
    """Checks against the target's config; fills in what was left open."""

  @property
  def num_nodes(self) -> int:
    """M: nodes of the trees it proposes, root included."""

  @property
  def longest(self) -> int:
    """A: nodes of the longest path, root included."""

  @property
  def num_streams(self) -> int:
    """Streams the target attaches to each node, 0 for none."""

  @property
  def prune(self) -> Prune:
    """Early-exit pruning of its trees."""

  def init(self, params: Params, batch: int) -> Any:
    """The drafter's own state, a pytree of arrays (or None)."""

  def propose(
    self, params: Params, state: Any, accepted: Accepted
  ) -> tuple[TokenTree, Any]:
    """The next tree to verify, [B, M], and the drafter's next state."""
