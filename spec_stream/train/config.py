"""What is trained, for how long, and how; frozen and checked at once."""

import dataclasses

from spec_stream.drafters import registry
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig

_CHOICES = {
  "schedule": ("linear", "cosine", "constant"),
  "objective": ("streams", "next_token"),
  "trainable": ("all", "adapters", "drafter"),
  "target": ("labels", "main"),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """steps: optimizer steps; the schedule ends at 0 there (but "constant").

  learning_rate: the peak, after `warmup_steps` of linear growth (AdamW).
  weight_decay: of matrices; norms and embeddings are not decayed.
  clip_norm: largest global norm of the gradient; 0 = no clipping.
  accumulate: microbatches of one step, which divide data.batch_size.
  main_weight: a_0 of eq. 5. In lossless mode a_0 is 0 whatever stands here.
  stream_weight: a_j, one number for all or one for each of the J streams.
  target: what streams learn to say. "labels": the text's token (eq. 5). "main":
    the main stream's own distribution at that position, from the same pass and
    held constant; it is what acceptance compares a draft with.
  prune_weight: of the pruner's loss, which moves nothing but the pruner.
  objective: "next_token" builds the model without streams: the baseline.
  trainable: "adapters" trains LoRA, streams, pruner and model.drafter, and
    freezes the base; "drafter" trains model.drafter alone.
  init_from: workdir of an earlier run, or a Hugging Face directory (which is
    what config.model.checkpoint sets). Its base weights (LoRA of shared mode
    folded in) and its tokenizer start this one, and a run's streams and
    adapters if they are configured alike; the rest starts fresh.
  teacher: workdir of a run with the same tokenizer whose distribution the main
    stream learns in place of the text: a draft model's target (DistillSpec).
  log_every, save_every: in steps. keep: checkpoints kept, the last ones.
  segment: positions whose attention scores are in memory at a time (paper
    appendix C); must divide data.seq_len and data.stream_positions; 0 = all.
  remat: compute each block twice rather than keep what it computed.
  remat_logits: compute logits twice rather than keep them: less memory.
  seed: of the fresh weights; the order of the data follows data.seed.
  """

  steps: int = 1000
  learning_rate: float = 5e-4
  warmup_steps: int = 50
  schedule: str = "linear"
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  accumulate: int = 1
  main_weight: float = 1.0
  stream_weight: float | tuple[float, ...] = (0.1,)
  target: str = "labels"
  prune_weight: float = 1.0
  objective: str = "streams"
  trainable: str = "all"
  init_from: str = ""
  teacher: str = ""
  log_every: int = 10
  save_every: int = 200
  keep: int = 2
  segment: int = 0
  remat: bool = False
  remat_logits: bool = False
  seed: int = 0

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise UserError(
          f"train.{name} is '{getattr(self, name)}': use one of "
          f"{', '.join(allowed)}"
        )
    for name in "steps accumulate log_every save_every keep".split():
      if getattr(self, name) < 1:
        raise UserError(f"train.{name} must be 1 or more")
    for name in (
      "learning_rate warmup_steps weight_decay clip_norm main_weight "
      "prune_weight segment seed"
    ).split():
      if not getattr(self, name) >= 0:
        raise UserError(f"train.{name} must not be negative")


def stream_weights(
  weight: float | tuple[float, ...], num_streams: int
) -> tuple[float, ...]:
  """a_1..a_J from J numbers, or from one that serves all.

  Raises: UserError if there are neither J nor one.
  """
  weight = weight if isinstance(weight, (tuple, list)) else (weight,)
  if len(weight) not in (1, num_streams):
    raise UserError(
      f"train.stream_weight has {len(weight)} numbers for {num_streams} "
      "streams: give one number, or one per stream"
    )
  weight = tuple(weight) * (num_streams if len(weight) == 1 else 1)
  return tuple(map(float, weight))


def check_segment(segment: int, seq_len: int, stream_positions: int):
  """Raises: UserError unless segments divide the rows."""
  for name, size in (
    ("seq_len", seq_len),
    ("stream_positions", stream_positions or seq_len),
  ):
    if segment and size % segment and size > segment:
      raise UserError(f"train.segment={segment} must divide data.{name}={size}")


def resolve(model: ModelConfig, train: TrainConfig) -> ModelConfig:
  """The model that is trained, after checks of the two configs together.

  Raises: UserError if they contradict each other.
  """
  if train.objective == "next_token":
    streams = dataclasses.replace(model.streams, num_streams=0)
    model = dataclasses.replace(model, streams=streams)
  if model.drafter.name:
    registry.options(model.drafter)
    if train.trainable != "drafter" and model.streams.num_streams:
      raise UserError(
        f"train either streams or model.drafter.name={model.drafter.name}: set "
        "model.streams.num_streams=0, or train.trainable=drafter"
      )
  elif train.trainable == "drafter":
    raise UserError("train.trainable=drafter needs model.drafter.name")
  lossless = model.streams.num_streams and model.streams.mode == "lossless"
  if train.teacher and (lossless or train.trainable == "drafter"):
    raise UserError(
      f"train.teacher={train.teacher} teaches the main stream, which is frozen "
      "here: leave it out"
    )
  streams = model.streams
  stream_weights(train.stream_weight, streams.num_streams)
  if model.quantize and train.trainable == "all":
    raise UserError(
      f"model.quantize={model.quantize} is for a frozen base: set "
      "train.trainable=adapters"
    )
  if train.trainable == "all" and model.param_dtype in ("bfloat16", "float16"):
    raise UserError(
      f"train.trainable=all with weights in {model.param_dtype} would lose "
      "small updates: set model.param_dtype=float32 (model.dtype may stay), or "
      "train.trainable=adapters"
    )
  if streams.mode == "lossless" and train.trainable == "all":
    if streams.num_streams:
      raise UserError(
        "model.streams.mode=lossless leaves the base model as it is: set "
        "train.trainable=adapters, and model.checkpoint=HF_DIR or "
        "train.init_from=WORKDIR of a base run"
      )
  if train.trainable != "all":
    if not train.init_from:
      raise UserError(
        f"train.trainable={train.trainable} freezes the base model, which here "
        "is fresh and untrained: set model.checkpoint=HF_DIR or "
        "train.init_from=WORKDIR of a base run"
      )
  if train.trainable == "adapters":
    drafter = model.drafter.name
    if not (streams.num_streams or streams.lora_rank or drafter):
      raise UserError(
        "train.trainable=adapters has nothing to train: set "
        "model.streams.lora_rank or num_streams above 0"
      )
    if streams.mode == "lossless" and not streams.num_streams:
      raise UserError(
        "lossless adapters act on streams alone: train.objective=next_token "
        "would train nothing; use model.streams.mode=shared"
      )
  return model
