"""Speculative streams: the target drafts its own next tokens (paper 3.1).

The J streams of the last accepted token predict the J tokens after the new
root, each on its own; a tree over their candidates is the next draft.
Parameters beyond the target's: J D stream embeddings (shared mode), and LoRA on
stream rows in lossless mode.

With `model.streams.correction_rank` R, a step beyond the paper, a drafted token
adds a term of rank R to the logits of its children, R (D + V) parameters, and
the tree grows level by level.

Where requests sample, candidates are ranked with the noise that the target will
meet (`Drafter.guess`).

Under the rule "rejection" the candidates are not the most probable but drawn
from the streams' distributions at the request's own temperature and filters,
without replacement: the k largest of logits and Gumbel noise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from spec_stream.drafters import grow
from spec_stream.drafters.base import Accepted, Drafter, Params
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import Transformer
from spec_stream.sampling import filtered, next_positions, noise
from spec_stream.tree import TokenTree, TreeSpec, check_ranks, from_paths, top


@dataclasses.dataclass(frozen=True)
class StreamDraft(Drafter):
  """tree: its kind and size; num_streams: J' <= J, 0 for all that were trained;
  rule: of `accept`.

  Fewer streams draft less deep and cost less. Not open to models whose main
  stream attends to its streams.
  """

  tree: TreeSpec = TreeSpec()
  prune: Prune = Prune()
  num_streams: int = 0
  rule: str = "exact"

  name = "streams"
  nested = True

  @classmethod
  def of(cls, tree, length, prune) -> "StreamDraft":
    return cls(tree, prune, length)

  def resolve(self, config: ModelConfig, own=None) -> "StreamDraft":
    trained = config.streams.num_streams
    num_streams = self.num_streams or trained
    if trained == 0:
      raise UserError(
        "this model has no streams: use --drafter=none, or train one with "
        "model.streams.num_streams above 0"
      )
    if not 0 < num_streams <= trained:
      raise UserError(
        f"draft_length={num_streams}: this model has {trained} streams"
      )
    if config.streams.attends and num_streams != trained:
      raise UserError(
        f"draft_length={num_streams}: the main stream of this model attends to "
        f"its streams, so all {trained} must be attached"
      )
    grows = config.streams.correction_rank > 0
    resolve = grow.resolve if grows else TreeSpec.resolve
    tree = resolve(self.tree, num_streams, config.vocab_size)
    kept, threshold = self.prune.kept_nodes, self.prune.threshold
    if not 0 <= kept <= tree.num_nodes:
      raise UserError(
        f"kept_nodes={kept} must lie between 0 (off) and the tree's "
        f"{tree.num_nodes} nodes"
      )
    if not 0 <= threshold < 1:
      raise UserError(f"prune_threshold={threshold} must lie in [0, 1)")
    if self.prune and config.streams.prune_rank == 0:
      raise UserError(
        "this model has no pruner: train with model.streams.prune_rank above 0"
      )
    if self.rule == "rejection":
      if not tree.paths and tree.num_nodes > 1:
        raise UserError(
          f"accept=rejection: the shape of a {tree.kind} tree depends on what "
          "was drawn: use --tree=chain, cartesian or a file of paths"
        )
      if self.prune or grows:
        raise UserError(
          "accept=rejection goes with neither pruning nor "
          "model.streams.correction_rank"
        )
      check_ranks(tree.paths)
    return dataclasses.replace(self, tree=tree, num_streams=num_streams)

  @property
  def num_nodes(self) -> int:
    return self.tree.num_nodes

  @property
  def longest(self) -> int:
    return self.tree.reach(self.num_streams)

  @property
  def stream_depth(self) -> int:
    return max(self.longest - 1, 1)

  def init(self, params: Params, batch: int, slots: int):
    if self.rule != "rejection":
      return None
    vocab = params.target.config.vocab_size
    return jnp.zeros((batch, self.longest - 1, vocab), jnp.float32)

  def distribution(self, state) -> jax.Array:
    return state

  def propose(self, params: Params, state, accepted: Accepted):
    target, logits = params.target, accepted.stream_logits
    if logits is None:
      streams = accepted.streams[:, : self.stream_depth]
      logits = target.logits(streams, drafts=True)
    if self.rule == "rejection" and self.num_nodes > 1:
      return self._drawn(logits, accepted)
    if target.config.streams.correction_rank:
      return self._grown(target, accepted, logits), state
    logits = self.guess(accepted, logits)
    return self.tree.build(accepted.root, logits), state

  def _drawn(self, logits, accepted: Accepted):
    """A tree of draws, and the probabilities [B, A - 1, V] they are from."""
    sampling = accepted.sampling
    logits = filtered(logits, sampling)
    levels = next_positions(accepted.position, logits.shape[1])
    gumbel = noise(sampling.seed, levels, logits.shape[2], "draft")
    warm = sampling.temperature[:, None, None] > 0
    _, tokens = top(jnp.where(warm, logits + gumbel, logits), self.tree.width)
    log_probs = jax.nn.log_softmax(logits, -1)
    chosen = jnp.take_along_axis(log_probs, tokens, 2)
    # A filter may leave fewer than the tree has room for.
    tokens = jnp.where(jnp.isfinite(chosen), tokens, -1)
    tree = from_paths(accepted.root, chosen, tokens, self.tree.paths)
    return tree, jnp.exp(log_probs.astype(jnp.float32))

  def _grown(self, target: Transformer, accepted, logits) -> TokenTree:
    """Stream j's logits [B, J, V] with what the token before it adds."""

    def follow(level, tokens):
      more = target.streams.correction(target.embed(tokens))
      return logits[:, level, None] + more

    def extend(level, tokens, parents):
      return follow(level, tokens), level + 1

    root = accepted.root
    first = follow(0, root[:, None])[:, 0]
    guess = functools.partial(self.guess, accepted)
    return grow.grow(self.tree, self.num_streams, root, first, 1, extend, guess)
