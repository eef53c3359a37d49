"""No draft: plain autoregressive decoding, a tree of one node.

The baseline of every number. Where the main stream attends to its streams
(shared mode), plain decoding of the same model attaches them; without them
(`attach_streams=False`) the tokens are another model's, and only the time is of
use: it is that of a plain step of a model of the same size.

`dead_nodes` beside the root are verified and never accepted: plain decoding
through matrices of the shape of a draft, which may round otherwise.
"""

import dataclasses

import jax.numpy as jnp

from spec_stream.drafters.base import Accepted, Drafter, Params, attached
from spec_stream.models.config import ModelConfig
from spec_stream.tree import root_only, star


@dataclasses.dataclass(frozen=True)
class NoDraft(Drafter):
  attach_streams: bool = True
  num_streams: int = 0
  dead_nodes: int = 0

  name = "none"

  @property
  def num_nodes(self) -> int:
    return 1 + self.dead_nodes

  @property
  def longest(self) -> int:
    return min(self.num_nodes, 2)

  @classmethod
  def of(cls, tree, length, prune) -> "NoDraft":
    return cls()

  def resolve(self, config: ModelConfig, own=None) -> "NoDraft":
    streams = attached(config) if self.attach_streams else 0
    return dataclasses.replace(self, num_streams=streams)

  def propose(self, params: Params, state, accepted: Accepted):
    if not self.dead_nodes:
      return root_only(accepted.root), state
    dead = jnp.full((len(accepted.root), self.dead_nodes), -1, jnp.int32)
    return star(accepted.root, dead), state
