"""The training loss (paper eq. 5), on completion tokens only.

    L = a_0 mean CE(main at i -> token i+1, or what a teacher says there)
      + sum_j a_j mean CE(stream j at i -> token i+1+j, or main at i+j)
      + CE(early exit at i -> token i+1), which moves the pruner alone
      + the loss of a drafter beside the target, see its module

A target counts if its token belongs to the completion (`loss_mask`) of the
segment of i. Each mean is over all targets of its kind in the global batch.
The positions i before a completion token are those that carry streams, so the
LM head runs on these U rows alone.

The stream's target is the token itself, or what the main stream says of it at
position i+j, which the same pass holds: acceptance compares a draft with the
main stream, not with the text.

Letters: B batch row, T positions, U positions with streams, J streams, D width,
V vocabulary, R rows.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from spec_stream.drafters import registry
from spec_stream.models.attention import at_rows
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import PruneParam
from spec_stream.models.segments import Segments
from spec_stream.models.transformer import Transformer, forward
from spec_stream.sampling import argmax
from spec_stream.train.config import stream_weights

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the terms: a_0, a_j (one number or J of them), the pruner's.

  target, segment, remat: see `TrainConfig`.
  remat_logits: compute logits again in the backward pass rather than keep them.
  streams: whether streams and pruner count at all: not where a drafter alone is
    trained.
  """

  main_weight: float = 1.0
  stream_weight: float | tuple[float, ...] = 0.1
  prune_weight: float = 1.0
  target: str = "labels"
  segment: int = 0
  remat: bool = False
  remat_logits: bool = False
  streams: bool = True


def targets(batch: Batch, at: jax.Array, ahead: int):
  """Labels and validity [B, R] of predicting `ahead` tokens on from `at`.

  at: [B, R] indices into T; -1 predicts nothing.
  """
  size = batch["tokens"].shape[1]
  label_at = jnp.minimum(at + ahead, size - 1)
  take = lambda name, index: jnp.take_along_axis(batch[name], index, 1)
  segment = take("segment_ids", jnp.maximum(at, 0))
  valid = (at >= 0) & (at + ahead < size) & take("loss_mask", label_at)
  valid &= (segment > 0) & (take("segment_ids", label_at) == segment)
  return take("tokens", label_at), valid


def _places(batch: Batch) -> jax.Array:
  """[B, U] positions that predict a completion token; -1 for none."""
  return jnp.where(batch["stream_mask"], batch["stream_at"], -1)


def reach(config: ModelConfig) -> int:
  """Tokens ahead of the main stream's that training asks for."""
  length = 0
  if config.drafter.name:
    length = registry.options(config.drafter).length
  return max(config.streams.num_streams, length)


def counts(batch: Batch, ahead: int) -> jax.Array:
  """[1 + ahead] number of targets of the main stream and 1.. tokens on."""
  at = _places(batch)
  valid = [targets(batch, at, 1 + j)[1] for j in range(1 + ahead)]
  return jnp.stack([x.sum() for x in valid])


def cross_entropy(
  model: Transformer,
  hidden,
  labels,
  valid,
  *,
  teacher=None,
  teacher_model=None,
  remat=False,
  score=Transformer.logits,
):
  """Sums over valid rows of the cross-entropy and of right argmaxes.

  hidden: [B, R, D] final-normed; labels, valid: [B, R]. teacher: [B, R, D]
  hidden whose distribution is the target in place of the labels, and whose
  argmax is then what is right; it gets no gradient. teacher_model: whose hidden
  that is; None: of `model`. score: (model, hidden) ->
  logits [B, R, V], of whatever `hidden` is.
  """

  def sums(model, hidden, labels, teacher):
    logits = score(model, hidden)
    if teacher is None:
      right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    else:
      target = jax.lax.stop_gradient((teacher_model or model).logits(teacher))
      labels = argmax(target)
      right = (jax.nn.softmax(target, -1) * logits).sum(-1)
    ce = jax.nn.logsumexp(logits, -1) - right
    hit = argmax(jax.lax.stop_gradient(logits)) == labels
    return jnp.where(valid, ce, 0).sum(), (hit & valid).sum()

  graph, state = nnx.split(model)
  run = lambda state, *rest: sums(nnx.merge(graph, state), *rest)
  run = jax.checkpoint(run) if remat else run
  return run(state, hidden, labels, teacher)


def loss(
  model: Transformer,
  batch: Batch,
  config: LossConfig,
  count: jax.Array | None = None,
  teacher: Transformer | None = None,
) -> tuple[jax.Array, Metrics]:
  """The loss and its parts.

  Args:
    model: with J streams or none, a drafter or none.
    batch: tokens, segment_ids, positions [B, T] int32, loss_mask [B, T] bool,
      stream_at [B, U] int32 indices into T, stream_mask [B, U] bool: every
      position before a completion token (see `data.pipeline`).
    config: the weights of the terms.
    count: what the sums are divided by, see `counts`; None: of this batch. With
      that of the whole batch, losses of its parts add up to that of the whole.
    teacher: whose distribution the main stream learns in place of the text.

  Returns:
    the scalar, and loss, loss_main, accuracy_main, loss_stream_1..,
    accept_1.. (share of targets that stream j's argmax hits: the token, or the
    main stream's own argmax for target "main"), loss_prune; of a drafter
    loss_draft_1.. in place of the streams'.
  """
  num_streams = model.config.streams.num_streams
  count = counts(batch, reach(model.config)) if count is None else count
  count = jnp.maximum(count, 1).astype(jnp.float32)
  at, drafter = _places(batch), model.drafter
  out = forward(
    model,
    batch["tokens"],
    batch["positions"],
    Segments(batch["segment_ids"], config.segment),
    streams=at if num_streams else None,
    taps=() if drafter is None else drafter.taps,
    remat=config.remat,
  )
  head = dict(remat=config.remat_logits)
  labels, valid = targets(batch, at, 1)
  main = at_rows(out.main, at)
  if not config.main_weight:  # then it needs no backward pass
    main = jax.lax.stop_gradient(main)
  taught = {} if teacher is None else _taught(teacher, batch, at, config)
  ce, hits = cross_entropy(model, main, labels, valid, **taught, **head)
  metrics = {"loss_main": ce / count[0], "accuracy_main": hits / count[0]}
  total = config.main_weight * metrics["loss_main"]
  if model.pruner is not None and config.streams:
    frozen = _pruner_alone(model)
    early = jax.lax.stop_gradient(at_rows(out.early, at))
    early = frozen.final_norm(frozen.pruner(early))
    ce, _ = cross_entropy(frozen, early, labels, valid, **head)
    metrics["loss_prune"] = ce / count[0]
    total += config.prune_weight * metrics["loss_prune"]
  rest = (model, batch, at, out.main, config, count)
  if num_streams and config.streams:
    weights = stream_weights(config.stream_weight, num_streams)
    hidden = [out.streams[:, :, j] for j in range(num_streams)]
    scores = ()
    if model.config.streams.correction_rank:
      word = lambda j: words(model, batch, at, j)
      hidden = [(x, word(j)) for j, x in enumerate(hidden, 1)]
      scores = [_corrected] * num_streams
    more, parts = ahead(*rest, weights, hidden, scores, name="stream")
    total, metrics = total + more, metrics | parts
  if drafter is not None:
    more, parts = drafter.loss(*rest, out)
    total, metrics = total + more, metrics | parts
  return total, {"loss": total, **metrics}


def words(model: Transformer, batch: Batch, at, j: int) -> jax.Array:
  """[B, U, D] embeddings of the tokens j on from `at`."""
  last = batch["tokens"].shape[1] - 1
  return model.embed(at_rows(batch["tokens"], jnp.minimum(at + j, last)))


def _taught(teacher: Transformer, batch: Batch, at, config: LossConfig) -> dict:
  """What `cross_entropy` is to be told of another model as the teacher."""
  out = forward(
    teacher,
    batch["tokens"],
    batch["positions"],
    Segments(batch["segment_ids"], config.segment),
    streams=at if teacher.config.streams.attends else None,
  )
  return dict(teacher=at_rows(out.main, at), teacher_model=teacher)


def _corrected(model: Transformer, hidden) -> jax.Array:
  """Logits of a stream, given its hidden state and the token before."""
  stream, word = hidden
  return model.logits(stream) + model.streams.correction(word)


def ahead(
  model: Transformer,
  batch: Batch,
  at: jax.Array,
  main: jax.Array,
  config: LossConfig,
  count: jax.Array,
  weights: Sequence[float],
  hidden: Sequence,
  scores: Sequence = (),
  name: str = "draft",
) -> tuple[jax.Array, Metrics]:
  """Of what is said at `at` of the tokens that follow the main stream's.

  Args:
    at: [B, U] positions, -1 for none.
    main: [B, T, D] final-normed hidden of the main stream, the teacher of
      target "main".
    count: [1 + J or more] number of targets, see `counts`.
    weights: one for each of the J tokens.
    hidden: of each of the J tokens what its `score` makes logits of.
    scores: (model, hidden) -> [B, U, V], of each; the model's head if left out.

  Returns: the weighted sum, and loss_<name>_j and accept_j for j = 1..J.
  """
  total, metrics = jnp.zeros(()), {}
  for j in range(1, len(hidden) + 1):
    labels, valid = targets(batch, at, 1 + j)
    teacher = None
    if config.target == "main":
      last = main.shape[1] - 1
      teacher = at_rows(jax.lax.stop_gradient(main), jnp.minimum(at + j, last))
    ce, hits = cross_entropy(
      model,
      hidden[j - 1],
      labels,
      valid,
      teacher=teacher,
      remat=config.remat_logits,
      score=scores[j - 1] if scores else Transformer.logits,
    )
    metrics[f"loss_{name}_{j}"] = ce / count[j]
    metrics[f"accept_{j}"] = hits / count[j]
    total += weights[j - 1] * metrics[f"loss_{name}_{j}"]
  return total, metrics


def _pruner_alone(model: Transformer) -> Transformer:
  """The model with every weight but the pruner's held constant."""
  graph, pruner, rest = nnx.split(model, PruneParam, ...)
  return nnx.merge(graph, pruner, jax.lax.stop_gradient(rest))
