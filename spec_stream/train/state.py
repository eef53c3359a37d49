"""The training state: weights that move, weights that do not, the optimizer's.

Born sharded: shapes -> rules -> `jax.jit(init, out_shardings=...)`.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spec_stream import sharding, weights
from spec_stream.models.config import ModelConfig
from spec_stream.models.prune import PruneParam
from spec_stream.train.config import TrainConfig
from spec_stream.weights import Weights


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # [] int32, finished optimizer steps
  trained: Weights
  frozen: Weights  # empty unless train.trainable=adapters
  opt_state: optax.OptState  # of `trained` alone

  @property
  def weights(self) -> Weights:
    return {**self.trained, **self.frozen}


def schedule(config: TrainConfig) -> optax.Schedule:
  """Learning rate by step: linear growth, then the schedule down to 0."""
  peak, warmup = config.learning_rate, min(config.warmup_steps, config.steps)
  rest = max(config.steps - warmup, 1)
  after = {
    "linear": optax.linear_schedule(peak, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest),
    "constant": optax.constant_schedule(peak),
  }[config.schedule]
  if not warmup:
    return after
  # The first step moves already: (step + 1) / warmup of the peak.
  grow = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([grow, after], [warmup])


def optimizer(model: ModelConfig, config: TrainConfig):
  """AdamW after clipping; the pruner is clipped by a norm of its own, so that
  its loss cannot move another weight by way of the clipping."""
  pruner = weights.paths(model, PruneParam)
  is_pruner = lambda tree: {path: path in pruner for path in tree}
  is_other = lambda tree: {path: path not in pruner for path in tree}
  clip = optax.identity()
  if config.clip_norm:
    norm = optax.clip_by_global_norm(config.clip_norm)
    clip = optax.chain(
      optax.masked(norm, is_other), optax.masked(norm, is_pruner)
    )
  adamw = optax.adamw(
    schedule(config),
    b1=0.9,
    b2=0.95,
    weight_decay=config.weight_decay,
    mask=lambda tree: {path: _decays(path) for path in tree},
  )
  return optax.chain(clip, adamw)


def _decays(path: str) -> bool:
  return path.rsplit("/", 1)[-1] not in ("scale", "table", "embed")


def init(
  model: ModelConfig, config: TrainConfig, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """The fresh state on the mesh, and the shardings of its leaves.

  Raises: UserError if the mesh does not divide the model.
  """
  names = weights.paths(model, object)
  if config.trainable == "adapters":
    names = weights.paths(model, *weights.ADAPTERS)
  tx = optimizer(model, config)

  def make():
    fresh = weights.init(model, config.seed)
    trained = {path: w for path, w in fresh.items() if path in names}
    frozen = {path: w for path, w in fresh.items() if path not in names}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      trained=trained,
      frozen=frozen,
      opt_state=tx.init(trained),
    )

  by_path = sharding.weight_shardings(mesh, weights.shapes(model))
  shardings = sharding.tree_shardings(mesh, jax.eval_shape(make), by_path)
  return jax.jit(make, out_shardings=shardings)(), shardings


def with_base(state: TrainState, base: Weights) -> TrainState:
  """The state with these weights in place of its own; see `checkpoints`."""

  def place(own: Weights) -> Weights:
    return {
      path: jax.device_put(base[path], w.sharding) if path in base else w
      for path, w in own.items()
    }

  return state.replace(trained=place(state.trained), frozen=place(state.frozen))
