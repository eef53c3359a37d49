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

_NONE: Weights = {}


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
  return not path.endswith(("scale", "bias", "table", "embed"))


def trained_paths(model: ModelConfig, config: TrainConfig) -> frozenset[str]:
  """Paths of the weights that training moves."""
  chosen = {
    "all": lambda model: frozenset(weights.shapes(model)),
    "adapters": weights.adapters,
    "drafter": weights.of_drafter,
  }
  return chosen[config.trainable](model)


def init(
  model: ModelConfig, config: TrainConfig, mesh: Mesh, base: Weights = _NONE
) -> tuple[TrainState, TrainState]:
  """The first state on the mesh, and the shardings of its leaves.

  base: weights that are known already, by path; the others are drawn afresh,
  and nothing is drawn or held twice.

  Raises: UserError if the mesh does not divide the model.
  """
  shapes = weights.shapes(model)
  names = trained_paths(model, config)
  place = sharding.weight_shardings(mesh, shapes)
  tx = optimizer(model, config)

  def fresh():
    drawn = weights.init(model, config.seed)
    return {path: x for path, x in drawn.items() if path not in base}

  part = lambda values, kept: {
    path: x for path, x in values.items() if (path in names) == kept
  }
  drawn = jax.jit(
    fresh, out_shardings={p: place[p] for p in shapes if p not in base}
  )()
  given = {path: jax.device_put(base[path], place[path]) for path in base}
  values = {path: drawn.get(path, given.get(path)) for path in shapes}

  def make(trained, frozen):
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, trained, frozen, tx.init(trained))

  shape = jax.eval_shape(make, part(shapes, True), part(shapes, False))
  shardings = sharding.tree_shardings(mesh, shape, place)
  trained = part(values, True)
  opt_state = jax.jit(tx.init, out_shardings=shardings.opt_state)(trained)
  step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
  return TrainState(step, trained, part(values, False), opt_state), shardings
