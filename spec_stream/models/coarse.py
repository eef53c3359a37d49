"""Copies in 4 bits of what the streams of an accepted token run through.

Where they come after acceptance (`one_pass`), the top layers and the LM head
are read a second time, for a few rows: a sixth of a step on a CPU, which waits
for its memory. Drafts alone come of it, so by the rule "exact" no token depends
on it (as on any draft), and drafts hardly do: a copy of an eighth of the size
serves, and so do products of integers (`four_bits`; experiments/e2e_nlg has the
tokens per call). Nodes go through the weights themselves, and so do streams in
one pass with them, as all do where the main stream attends to its streams.
"""

from flax import nnx

from spec_stream.models.config import ModelConfig
from spec_stream.models.layers import Embed
from spec_stream.models.lora import PANELS, Linear


class Coarse(nnx.Module):
  """blocks: copies of the top N_s layers; head: of the LM head."""

  def __init__(self, blocks, head: Linear):
    self.blocks, self.head = nnx.List(blocks), head


def copies(config: ModelConfig, blocks, head: Linear | Embed) -> Coarse | None:
  """Of a model's layers and its LM head or tied table, as they are laid out;
  None without streams, where the main stream attends to them, or if a kernel
  that streams alone go through is not in `panels`, in float32.

  Norms, adapters and biases are the model's own.
  """
  streams = config.streams
  if not streams.num_streams or streams.attends:
    return None
  top = [nnx.clone(block) for block in blocks[config.insertion_layer :]]
  is_tied = isinstance(head, Embed)
  head = _linear(head, config) if is_tied else nnx.clone(head)
  linears = [x for block in top for x in block.linears()] + [head]
  if any(x.out_first != PANELS or x.kernel_scale is not None for x in linears):
    return None
  for linear in linears:
    linear.round_to_4_bits()
  return Coarse(top, head)


def _linear(embed: Embed, config: ModelConfig) -> Linear:
  """A tied LM head by itself; its table is not copied."""
  sizes = (config.width,), (config.vocab_size,)
  make = lambda: Linear(*sizes, config, lora_rank=0, rngs=nnx.Rngs(0))
  linear = nnx.eval_shape(make)  # draws no weights
  linear.kernel, linear.out_first = nnx.Param(embed.table[...]), embed.out_first
  return linear
