"""The shape of a model and of its streams; frozen, hashable, json-able."""

import dataclasses
import difflib
import functools
import sys
import typing
from typing import Any

from spec_stream.errors import UserError

_CHOICES = {
  "mode": ("shared", "lossless"),
  "stream_id": ("embedding", "rotation"),
  "stream_position": ("future", "same"),
  "lora_layers": ("streams", "all"),
}
# Of ModelConfig: in these two models with the same base may differ.
FREE = "streams drafter dtype param_dtype quantize known_tokens".split()
ROPE_SCALINGS = ("none", "linear", "llama3", "longrope")


def _check_choice(group: str, config, name: str, allowed: tuple[str, ...]):
  if getattr(config, name) not in allowed:
    raise UserError(
      f"{group}.{name} is '{getattr(config, name)}': use one of "
      f"{', '.join(allowed)}"
    )


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
  correction_rank: rank of what a drafted token adds to the logits of its
    children, which streams alone do not see; 0 = nothing, as in the paper.
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
  correction_rank: int = 0
  lora_rank: int = 0
  lora_alpha: float = 32.0
  lora_layers: str = "streams"
  prune_rank: int = 8

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      _check_choice("model.streams", self, name, allowed)
    ranks = ("map_rank", "correction_rank", "lora_rank", "prune_rank")
    for name in ("num_streams", *ranks):
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
class DrafterConfig:
  """Weights of a drafter beside the target: a module of `drafters`.

  name: of `drafters.registry`; "" = none. options: of its `Options`, by name,
  sorted; what is left out stands at its default.
  """

  name: str = ""
  options: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are changed for longer contexts.

  kind: "none"; "linear", positions / factor; "llama3", low frequencies divided
    by factor, high ones kept, a ramp between (low_freq_factor and
    high_freq_factor in turns over `original_positions`); "longrope", each
    frequency divided by a factor of its own.
  short_factors, long_factors: of longrope, one per pair. The long ones serve
    models with max_positions above original_positions, whatever the prompt:
    a cache must not mix the two.
  attention_factor: longrope multiplies cosines and sines by it.
  """

  kind: str = "none"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_positions: int = 8192
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()
  attention_factor: float = 1.0

  def __post_init__(self):
    _check_choice("model.rope_scaling", self, "kind", ROPE_SCALINGS)
    if self.factor <= 0:
      raise UserError("model.rope_scaling.factor must be above 0")
    if self.kind in ("llama3", "longrope") and self.original_positions < 1:
      raise UserError("model.rope_scaling.original_positions must be 1 or more")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder: grouped-query attention, and what families differ in.

  The defaults are Llama's: rotary positions, RMSNorm, SwiGLU, no biases.
  dtype is that of the computation, param_dtype that of the base weights, which
  may also be float16 (adapters are float32); softmax, norms and logits are
  float32 or wider.
  max_positions bounds prompt and output together: no cache is made for more.

  norm: "rms" or "layer" (with bias). norm_offset: scales are stored as their
    difference from 1. post_norms: attention and feed-forward are normed again
    before they are added. parallel_block: both read the same normed input.
  activation: "silu", "gelu", "gelu_tanh" or "relu"; gated: times a second
    projection.
  qk_norm: RMSNorm of each head's queries and keys.
  positions: "rotary", or "learned", a table with position_offset spare rows
    before position 0. rotary_dim: elements of a head that turn, 0 for all.
  sliding_layers: those whose tokens see the last sliding_window positions
    alone, themselves included; rope_theta_sliding: their rope_theta (then
    without rope_scaling), 0 for the same.
  attention_scale: of the scores; 0 for head_dim^-0.5. *_softcap: scores or
    logits x become c tanh(x / c); 0 for none.
  embed_scale: what token embeddings are multiplied by.
  known_tokens: those that the tokenizer has, 0 for all. Checkpoints pad their
    vocabulary, and what is behind is never drawn; set where a model is loaded.
  quantize: "int8" or "int4" stores the kernels of the blocks so, see `quant`:
    a frozen base, to be trained with adapters; "" as param_dtype says.
  """

  vocab_size: int = 1024
  width: int = 256
  num_layers: int = 6
  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  ffw_dim: int = 688
  max_positions: int = 2048
  norm: str = "rms"
  norm_eps: float = 1e-6
  norm_offset: bool = False
  post_norms: bool = False
  parallel_block: bool = False
  activation: str = "silu"
  gated: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  ffw_bias: bool = False
  head_bias: bool = False
  qk_norm: bool = False
  positions: str = "rotary"
  position_offset: int = 0
  rotary_dim: int = 0
  rope_theta: float = 10_000.0
  rope_theta_sliding: float = 0.0
  rope_scaling: RopeScaling = RopeScaling()
  sliding_window: int = 0
  sliding_layers: tuple[int, ...] = ()
  attention_scale: float = 0.0
  attention_softcap: float = 0.0
  logit_softcap: float = 0.0
  embed_scale: float = 1.0
  tie_embeddings: bool = True
  dtype: str = "float32"
  param_dtype: str = "float32"
  known_tokens: int = 0
  quantize: str = ""
  streams: StreamConfig = StreamConfig()
  drafter: DrafterConfig = DrafterConfig()

  def __post_init__(self):
    for name in (
      "vocab_size width num_layers num_heads num_kv_heads head_dim ffw_dim "
      "max_positions"
    ).split():
      if getattr(self, name) < 1:
        raise UserError(f"model.{name} must be 1 or more")
    if not 0 <= self.known_tokens <= self.vocab_size:
      raise UserError(
        f"model.known_tokens={self.known_tokens} must lie between 0 (all) and "
        f"model.vocab_size={self.vocab_size}"
      )
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f"model.num_heads={self.num_heads} must be a multiple of "
        f"model.num_kv_heads={self.num_kv_heads}"
      )
    for name in ("head_dim", "rotary_dim"):
      if getattr(self, name) % 2:
        raise UserError(f"model.{name} must be even: rotary positions pair it")
    if not 0 <= self.rotary_dim <= self.head_dim:
      raise UserError(
        f"model.rotary_dim={self.rotary_dim} must lie between 0 (all) and "
        f"model.head_dim={self.head_dim}"
      )
    for name, allowed in (
      ("norm", ("rms", "layer")),
      ("activation", ("silu", "gelu", "gelu_tanh", "relu")),
      ("positions", ("rotary", "learned")),
      ("quantize", ("", "int8", "int4")),
    ):
      _check_choice("model", self, name, allowed)
    for name in ("dtype", "param_dtype"):
      allowed = ["float32", "bfloat16", "float64"]
      allowed += ["float16"] * (name == "param_dtype")
      if getattr(self, name) not in allowed:
        raise UserError(
          f"model.{name} is '{getattr(self, name)}': use float32 or bfloat16"
        )
    if self.streams.num_stream_layers > self.num_layers:
      raise UserError(
        f"model.streams.num_stream_layers={self.streams.num_stream_layers} is "
        f"above model.num_layers={self.num_layers}"
      )
    if self.sliding_layers and self.sliding_window < 1:
      raise UserError(
        "model.sliding_layers needs model.sliding_window of 1 or more"
      )
    if any(not 0 <= l < self.num_layers for l in self.sliding_layers):
      raise UserError(
        f"model.sliding_layers={self.sliding_layers} must lie in "
        f"[0, {self.num_layers})"
      )
    scaling, pairs = self.rope_scaling, self.turned // 2
    for factors in (scaling.short_factors, scaling.long_factors):
      if scaling.kind == "longrope" and len(factors) != pairs:
        raise UserError(
          f"model.rope_scaling has {len(factors)} longrope factors, but there "
          f"are {pairs} pairs to turn"
        )

  @property
  def insertion_layer(self) -> int:
    """L - N_s: streams enter before this layer; it is the first MSA layer."""
    return self.num_layers - self.streams.num_stream_layers

  @property
  def groups(self) -> int:
    """G: query heads per key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def turned(self) -> int:
    """Elements of a head that rotary positions turn."""
    return self.rotary_dim or self.head_dim

  def slides(self, layer: int) -> bool:
    """Whether a layer sees the last `sliding_window` positions alone."""
    return layer in self.sliding_layers


def to_dict(config: ModelConfig) -> dict:
  """As json gives it back: tuples are lists."""
  lists = lambda pairs: {
    key: list(x) if isinstance(x, tuple) else x for key, x in pairs
  }
  values = dataclasses.asdict(config, dict_factory=lists)
  values["drafter"]["options"] = dict(config.drafter.options)
  del values["known_tokens"]  # its tokenizer says
  return values


def _tuples(group: dict) -> dict:
  return {
    key: tuple(x) if isinstance(x, list) else x for key, x in group.items()
  }


def drafter_from_dict(
  values: dict, where: str = "model.drafter"
) -> DrafterConfig:
  """Of {"name": ..., "options": {...}}, as `to_dict` has it."""
  options = values.get("options", {})
  if not isinstance(options, dict):
    raise UserError(f"{where}.options={options!r:.40} must be an object")
  options = tuple(sorted(_tuples(options).items()))
  return make(DrafterConfig, values | {"options": options}, where)


def from_dict(values: dict, where: str = "model") -> ModelConfig:
  """Inverse of `to_dict`, also after json. Raises: UserError, which says
  `where` the values are from."""
  if not isinstance(values, dict):
    raise UserError(f"{where}={values!r:.40} must be an object")
  parts = {
    "streams": functools.partial(make, StreamConfig),
    "drafter": drafter_from_dict,
    "rope_scaling": functools.partial(make, RopeScaling),
  }
  made = {}
  for name, read in parts.items():
    part = values.get(name, {})
    if not isinstance(part, dict):
      raise UserError(f"{where}.{name}={part!r:.40} must be an object")
    made[name] = read(part, where=f"{where}.{name}")
  return make(ModelConfig, values | made, where)


def make(cls, values: dict, where: str):
  """A dataclass from values that a file or a flag may have given.

  Raises: UserError for a key that it does not have, or a value of another kind.
  """
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}
  values = _tuples(values)
  for key, value in values.items():
    if key not in kinds:
      near = difflib.get_close_matches(key, kinds, 1)
      hint = (
        f"did you mean '{near[0]}'?" if near else f"it has {', '.join(kinds)}"
      )
      raise UserError(f"{where} has no key '{key:.60}'; {hint}")
    if not _is(value, kinds[key]):
      kind = kinds[key]
      words = kind if typing.get_args(kind) else kind.__name__
      raise UserError(f"{where}.{key}={value!r:.40} is not of type {words}")
  return cls(**values)


def _is(value, kind) -> bool:
  """Whether a value is of the type of a field, no union; whole numbers are
  floats too."""
  inner = typing.get_args(kind)
  if inner:  # a tuple, of some length or of any
    if not isinstance(value, tuple):
      return False
    kinds = inner[:1] * len(value) if inner[-1] is ... else inner
    return len(value) == len(kinds) and all(map(_is, value, kinds))
  if kind is float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max
  if kind is int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and abs(value) < 2**31
  return kind is Any or isinstance(value, kind)
