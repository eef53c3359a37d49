"""No draft: plain autoregressive decoding, a tree of one node.

The baseline of every number. Where the main stream attends to its streams
(shared mode), plain decoding of the same model attaches them; without them
(`attach_streams=False`) the tokens are another model's, and only the time is of
use: it is that of a plain step of a model of the same size.
"""

import dataclasses

from spec_stream.drafters.base import Accepted, Drafter, Params, attached
from spec_stream.models.config import ModelConfig
from spec_stream.tree import root_only


@dataclasses.dataclass(frozen=True)
class NoDraft(Drafter):
  attach_streams: bool = True
  num_streams: int = 0

  name = "none"
  num_nodes = 1
  longest = 1

  @classmethod
  def of(cls, tree, length, prune) -> "NoDraft":
    return cls()

  def resolve(self, config: ModelConfig, own=None) -> "NoDraft":
    streams = attached(config) if self.attach_streams else 0
    return dataclasses.replace(self, num_streams=streams)

  def propose(self, params: Params, state, accepted: Accepted):
    return root_only(accepted.root), state
