"""No draft: plain autoregressive decoding, a tree of one node.

The baseline of every number. Where the main stream attends to its streams
(shared mode), plain decoding of the same model attaches them; without them
(`attach_streams=False`) the tokens are another model's, and only the time is of
use: it is that of a plain step of a model of the same size.
"""

import dataclasses

from spec_stream.drafters.base import Accepted, Params
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import Prune
from spec_stream.tree import root_only


@dataclasses.dataclass(frozen=True)
class NoDraft:
  attach_streams: bool = True
  num_streams: int = 0

  name = "none"
  num_nodes = 1
  longest = 1
  prune = Prune()

  def resolve(self, config: ModelConfig) -> "NoDraft":
    needed = self.attach_streams and config.streams.attends
    streams = config.streams.num_streams if needed else 0
    return dataclasses.replace(self, num_streams=streams)

  def init(self, params: Params, batch: int):
    return None

  def propose(self, params: Params, state, accepted: Accepted):
    return root_only(accepted.root), state
