"""Whose streams a step computes, and in which pass.

Only after acceptance it is known whose streams count. While a step waits for
memory, streams on every node cost little: they go through the top layers and
the LM head in the pass that verifies (paper 3.1.2). With more rows than a
device multiplies meanwhile they cost more than reading those weights once more:
then the accepted node's alone go through them, after acceptance.
"""

from spec_stream.drafters.base import Drafter
from spec_stream.models.transformer import Transformer


def most_rows(platform: str, coarse: bool) -> int:
  """Nodes and streams, of all requests, up to which one pass is taken.

  coarse: whether the streams' own pass reads `Coarse` copies: on a CPU it then
  costs less than the rows it spares. There as measured, elsewhere by what the
  compiler for a v5e estimates: one pass is faster with 64 rows, two with 512
  (experiments/step_cost).
  """
  if platform != "cpu":
    return 128
  return 0 if coarse else 16


def reads_head_once(model: Transformer, drafter: Drafter, batch: int) -> bool:
  """Whether a step multiplies all streams with the LM head, as it does
  nodes."""
  depth = drafter.stream_depth
  num_nodes = drafter.prune.kept_nodes or drafter.num_nodes
  return 0 < depth and batch * num_nodes * (1 + depth) <= model.one_pass_rows


def streams_on_nodes(model: Transformer, drafter: Drafter, batch: int) -> int:
  """Streams on each node in the pass that verifies; 0 if they come after it.

  Where the main stream attends to its streams every node needs all of its own,
  and the LM head alone may be read twice.
  """
  if model.config.streams.attends:
    return drafter.num_streams
  once = reads_head_once(model, drafter, batch)
  return drafter.stream_depth if once else 0
