"""One optimizer step, compiled once: `jax.jit` with shardings and donation."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spec_stream import sharding, weights
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import PruneParam
from spec_stream.train import losses
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig
from spec_stream.train.losses import Batch, Metrics
from spec_stream.train.state import TrainState


def make_step(
  model: ModelConfig,
  config: TrainConfig,
  mesh: Mesh,
  shardings: TrainState,
  teacher: ModelConfig | None = None,
):
  """-> jitted (state, batch) -> (state, metrics). The old state is donated.

  With a teacher, its weights by path are the third argument.

  metrics: those of `losses.loss`, grad_norm (before clipping, without the
  pruner) and learning_rate.
  """
  tx, rate = states.optimizer(model, config), states.schedule(config)
  loss_config = _loss_config(model, config)
  ahead = losses.reach(model)
  pruner = weights.paths(model, PruneParam)

  def gradient(trained, frozen, batch, count, *taught):
    def loss(trained):
      module = weights.to_model(model, {**trained, **frozen})
      other = weights.to_model(teacher, *taught) if taught else None
      return losses.loss(module, batch, loss_config, count, other)

    return jax.grad(loss, has_aux=True)(trained)

  def step(
    state: TrainState, batch: Batch, *taught
  ) -> tuple[TrainState, Metrics]:
    count = losses.counts(batch, ahead)

    def add(total, part):
      new = gradient(state.trained, state.frozen, part, count, *taught)
      return jax.tree.map(jnp.add, total, new), None

    if config.accumulate == 1:
      grads, metrics = gradient(
        state.trained, state.frozen, batch, count, *taught
      )
    else:
      parts = _split(batch, config.accumulate, mesh)
      one = jax.tree.map(lambda x: x[0], parts)
      start = jax.eval_shape(
        gradient, state.trained, state.frozen, one, count, *taught
      )
      start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), start)
      (grads, metrics), _ = jax.lax.scan(add, start, parts)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    metrics["grad_norm"] = optax.tree.norm(
      {path: g for path, g in grads.items() if path not in pruner}
    )
    metrics["learning_rate"] = rate(state.step)
    state = state.replace(
      step=state.step + 1,
      trained=optax.apply_updates(state.trained, updates),
      opt_state=opt_state,
    )
    return state, metrics

  everywhere, given = NamedSharding(mesh, P()), ()
  if teacher is not None:
    given = (sharding.weight_shardings(mesh, weights.shapes(teacher)),)
  return jax.jit(
    step,
    in_shardings=(shardings, sharding.batch_sharding(mesh), *given),
    out_shardings=(shardings, everywhere),
    donate_argnums=0,
  )


def _loss_config(model: ModelConfig, config: TrainConfig) -> losses.LossConfig:
  alone = config.trainable == "drafter"
  lossless = model.streams.mode == "lossless" and model.streams.num_streams
  return losses.LossConfig(
    main_weight=0.0 if lossless or alone else config.main_weight,
    streams=not alone,
    stream_weight=config.stream_weight,
    prune_weight=config.prune_weight,
    target=config.target,
    segment=config.segment,
    remat=config.remat,
    remat_logits=config.remat_logits,
  )


def _split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
  """[B, ...] -> [parts, B / parts, ...]; each device splits its own rows."""
  spec = P(None, *sharding.batch_sharding(mesh).spec)

  def split(x):
    x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(split, batch)
