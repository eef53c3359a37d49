"""The shape of a model and of its streams; frozen, hashable, json-able."""

import dataclasses

from spec_stream.errors import UserError

_CHOICES = {
  "mode": ("shared", "lossless"),
  "stream_id": ("embedding", "rotation"),
  "stream_position": ("future", "same"),
  "lora_layers": ("streams", "all"),
}


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """Speculative streams (paper 3.1) and the adapters they are trained with.

  num_streams: J, the paper's gamma. 0 = a plain decoder.
  num_stream_layers: N_s, the top layers that hold streams (MSA layers).
  mode: "shared", adapters serve main and streams together; "lossless", they act
    on stream rows alone and the main stream is the base model's.
  main_attends_streams: eq. 1 of the published version: in MSA layers the main
    stream at t also attends to its own streams. Off in lossless mode.
  stream_id: "embedding", eq. 3; "rotation", eq. 9: values of stream j rotated
    by e^{i rotation_eps j}. rotation_eps in radians; the paper asks for at most
    pi / (2 (longest sequence + J)).
  stream_position: rotary position of stream j at t: "future" t+j, "same" t.
  map_rank: rank of f in eq. 3; 0 = identity, as in all the paper's runs.
  lora_rank: 0 = no adapters. lora_layers: "streams" (MSA layers) or "all".
  prune_rank: rank of o_theta of the early-exit pruner; 0 = no pruner.
  """

  num_streams: int = 3
  num_stream_layers: int = 2
  mode: str = "shared"
  main_attends_streams: bool = True
  stream_id: str = "embedding"
  rotation_eps: float = 0.001
  stream_position: str = "future"
  map_rank: int = 0
  lora_rank: int = 0
  lora_alpha: float = 32.0
  lora_layers: str = "streams"
  prune_rank: int = 8

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise UserError(
          f"model.streams.{name} is '{getattr(self, name)}': use one of "
          f"{', '.join(allowed)}"
        )
    for name in ("num_streams", "map_rank", "lora_rank", "prune_rank"):
      if getattr(self, name) < 0:
        raise UserError(f"model.streams.{name} must not be negative")
    if self.num_streams and self.num_stream_layers < 1:
      raise UserError(
        "model.streams.num_stream_layers must be 1 or more to hold streams"
      )
    if self.mode == "lossless" and self.lora_layers == "all":
      raise UserError(
        "lossless mode adapts stream rows alone, which exist in the stream "
        "layers only: use model.streams.lora_layers=streams"
      )

  @property
  def attends(self) -> bool:
    """Whether plain decoding needs the streams attached to be this model."""
    return (
      self.num_streams > 0
      and self.mode == "shared"
      and self.main_attends_streams
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

  dtype is that of the computation, param_dtype that of the weights; softmax,
  norms and logits are float32 or wider. max_positions bounds prompt and output
  together: no cache is made for more.
  """

  vocab_size: int = 1024
  width: int = 256
  num_layers: int = 6
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  ffw_dim: int = 688
  max_positions: int = 2048
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  dtype: str = "float32"
  param_dtype: str = "float32"
  streams: StreamConfig = StreamConfig()

  def __post_init__(self):
    for name in (
      "vocab_size width num_layers num_heads num_kv_heads head_dim ffw_dim "
      "max_positions"
    ).split():
      if getattr(self, name) < 1:
        raise UserError(f"model.{name} must be 1 or more")
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.num_heads={self.num_heads} must be a multiple of "
        f"model.num_kv_heads={self.num_kv_heads}"
      )
    if self.head_dim % 2:
      raise UserError("model.head_dim must be even: rotary positions pair it")
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in ("float32", "bfloat16", "float64"):
        raise UserError(
          f"model.{name} is '{getattr(self, name)}': use float32 or bfloat16"
        )
    if self.streams.num_stream_layers > self.num_layers:
      raise UserError(
        f"model.streams.num_stream_layers={self.streams.num_stream_layers} is "
        f"above model.num_layers={self.num_layers}"
      )

  @property
  def insertion_layer(self) -> int:
    """L - N_s: streams enter before this layer; it is the first MSA layer."""
    return self.num_layers - self.streams.num_stream_layers

  @property
  def groups(self) -> int:
    """G: query heads per key/value head."""
    return self.num_heads // self.num_kv_heads


def to_dict(config: ModelConfig) -> dict:
  return dataclasses.asdict(config)


def from_dict(values: dict) -> ModelConfig:
  """Inverse of `to_dict`; an unknown key is a UserError."""
  values = dict(values)
  try:
    streams = StreamConfig(**values.pop("streams", {}))
    return ModelConfig(**values, streams=streams)
  except TypeError as e:
    raise UserError(f"model config: {e}") from e
