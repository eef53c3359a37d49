"""Reading a config.json key by key, so that nothing in it is ignored.

Transformers has written two generations of these files: up to version 4 with
`rope_theta` and `rope_scaling` at the top, from version 5 on with both in
`rope_parameters`. Either is read; the older one, which both read, is written.
"""

import dataclasses
import math
from typing import Any

from spec_stream.errors import UserError
from spec_stream.models.config import RopeScaling

# Keys that say nothing about what the model computes in inference.
_HARMLESS = frozenset(
  """_name_or_path architectures model_type torch_dtype dtype auto_map
  transformers_version use_cache initializer_range init_std attention_dropout
  dropout layerdrop activation_dropout resid_pdrop embd_pdrop hidden_dropout
  attn_implementation _attn_implementation _attn_implementation_autoset
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
  decoder_start_token_id forced_bos_token_id forced_eos_token_id prefix
  pretraining_tp cache_implementation task_specific_params
  problem_type id2label label2id num_labels return_dict output_attentions
  output_hidden_states torchscript tie_encoder_decoder is_decoder
  is_encoder_decoder finetuning_task tokenizer_class max_length min_length
  do_sample early_stopping num_beams num_beam_groups diversity_penalty
  temperature top_k top_p typical_p repetition_penalty length_penalty
  no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
  output_scores return_dict_in_generate remove_invalid_values
  exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
  bad_words_ids chunk_size_feed_forward _sliding_window_pattern
  use_bfloat16""".split()
)
_NEEDED = object()
_LARGEST = 2**31 - 1
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


class Keys:
  """The object of a config.json; `close` refuses what nobody has read."""

  def __init__(self, values: dict, where: str):
    self._values, self._left, self.where = values, set(values), where

  def get(self, name: str, default: Any = _NEEDED, kind: type | None = None):
    """A value; null counts as missing. Raises: UserError."""
    self._left.discard(name)
    value = self._values.get(name)
    if value is None:
      if default is _NEEDED:
        raise UserError(f"{self.where} lacks the key {name}")
      return default
    kind = kind or (type(default) if default is not _NEEDED else int)
    if kind is float and isinstance(value, int) and value is not True:
      value = float(value)
    wrong = kind is not type(None) and not isinstance(value, kind)
    if wrong or (kind is int and isinstance(value, bool)):
      words = _WORDS.get(kind, kind.__name__)
      raise UserError(f"{self.where}: {name}={value!r:.60} must be {words}")
    huge = kind is int and abs(value) > _LARGEST
    if huge or (kind is float and not math.isfinite(value)):
      raise UserError(f"{self.where}: {name}={value} is no size of a model")
    return value

  def given(self, name: str, absent, null, kind: type | None = None):
    """A value, where a missing key means one thing and a null another."""
    return self.get(name, null if name in self._values else absent, kind)

  def only(self, name: str, *allowed):
    """Refuses a value that is not implemented; missing: the first one."""
    value = self.get(name, allowed[0], object)
    if value not in allowed:
      words = " or ".join(map(repr, allowed))
      raise UserError(
        f"{self.where}: {name}={value!r:.60} is not implemented, only {words}"
      )
    return value

  def close(self):
    """Raises: UserError naming keys that nothing here knows."""
    idle = (None, False, {}, [], "")
    left = {n for n in self._left - _HARMLESS if self._values[n] not in idle}
    if left:
      words = ", ".join(
        f"{n:.60}={self._values[n]!r:.40}" for n in sorted(left)
      )
      raise UserError(f"{self.where}: not implemented: {words}")


# -- rotary positions --------------------------------------------------------

# Older name -> ours; "default" is none.
_KINDS = {"default": "none", "su": "longrope"}


@dataclasses.dataclass(frozen=True)
class Rope:
  theta: float
  scaling: RopeScaling
  partial: float = 1.0  # share of a head that turns


def read_rope(
  keys: Keys,
  *,
  theta: float = 10_000.0,
  partial: float | None = None,
  most: int = 0,
  layers: str = "",
) -> Rope:
  """Rotary settings of either generation.

  theta, partial: the family's defaults, None if its heads turn whole; most:
  max_position_embeddings; layers: the entry of `rope_parameters` to read, where
  it has one per kind of layer.
  """
  where = f"{keys.where}: rope_parameters"
  new = keys.get("rope_parameters", {}, dict)
  if layers and layers in new:
    new = new[layers]
  theta = keys.get("rope_theta", theta, float)
  share = keys.get("partial_rotary_factor", partial or 1.0, float)
  original = keys.get("original_max_position_embeddings", 0, int)
  old = keys.get("rope_scaling", {}, dict)
  if not isinstance(new, dict):
    raise UserError(f"{where}.{layers} must be an object")
  values = Keys({**old, **new}, where if new else f"{keys.where}: rope_scaling")
  theta = values.get("rope_theta", theta, float)
  share = values.get("partial_rotary_factor", share, float)
  original = values.get("original_max_position_embeddings", original, int)
  older = values.get("type", "default", str)
  kind = values.get("rope_type", older, str)
  kind = _KINDS.get(kind, kind)
  scaling = {}
  if kind == "linear":
    scaling = {"factor": values.get("factor", kind=float)}
  elif kind == "llama3":
    scaling = {
      name: values.get(name, kind=float)
      for name in ("factor", "low_freq_factor", "high_freq_factor")
    }
    scaling["original_positions"] = original or most
  elif kind == "longrope":
    original = original or most
    short, long = (
      tuple(map(float, values.get(f"{name}_factor", kind=list)))
      for name in ("short", "long")
    )
    factor = values.get("factor", most / original, float)
    grown = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    scaling = {
      "short_factors": short,
      "long_factors": long,
      "original_positions": original,
      "attention_factor": values.get("attention_factor", grown, float),
    }
  elif kind != "none":
    raise UserError(
      f"{values.where}: rope_type={kind!r} is not implemented, only default, "
      "linear, llama3 and longrope"
    )
  values.close()
  if theta <= 0:
    raise UserError(f"{keys.where}: rope_theta={theta} must be above 0")
  if share != 1 and (partial is None or not 0 < share <= 1):
    most = "1 here" if partial is None else "above 0, and at most 1"
    raise UserError(
      f"{keys.where}: partial_rotary_factor={share} must be {most}"
    )
  return Rope(theta, RopeScaling(kind, **scaling), share)


def write_rope(scaling: RopeScaling) -> dict | None:
  """`rope_scaling` of the older generation."""
  if scaling.kind == "none":
    return None
  values = {"rope_type": scaling.kind}
  if scaling.kind in ("linear", "llama3"):
    values["factor"] = scaling.factor
  if scaling.kind == "llama3":
    values["low_freq_factor"] = scaling.low_freq_factor
    values["high_freq_factor"] = scaling.high_freq_factor
  if scaling.kind != "linear":
    values["original_max_position_embeddings"] = scaling.original_positions
  if scaling.kind == "longrope":
    values["short_factor"] = list(scaling.short_factors)
    values["long_factor"] = list(scaling.long_factors)
    values["attention_factor"] = scaling.attention_factor
  return values


# -- sliding windows ---------------------------------------------------------

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_sliding(
  keys: Keys, num_layers: int, window: int, default: tuple[int, ...]
) -> dict:
  """Fields of ModelConfig from `layer_types`; without it, `default` layers."""
  types = keys.get("layer_types", None, list)
  slides = default
  if types is not None:
    if len(types) != num_layers or set(types) - {_SLIDING, _FULL}:
      raise UserError(
        f"{keys.where}: layer_types must name {_FULL} or {_SLIDING} for each "
        f"of {num_layers} layers"
      )
    slides = tuple(l for l, kind in enumerate(types) if kind == _SLIDING)
  if not window:
    slides = ()
  return {"sliding_window": window if slides else 0, "sliding_layers": slides}


def write_sliding(config) -> list[str]:
  """`layer_types`."""
  layers = range(config.num_layers)
  return [_SLIDING if config.slides(layer) else _FULL for layer in layers]
