"""Gemma 2 and the text models of Gemma 3.

Norms before and after each branch, whose scales are stored as differences from
1; embeddings times sqrt(D); layers with a sliding window between full ones.
Gemma 2 soft-caps scores and logits; Gemma 3 norms queries and keys, and its
sliding layers have a rotary base of their own.
"""

from spec_stream.hf.keys import (
  Keys,
  read_rope,
  read_sliding,
  write_rope,
  write_sliding,
)
from spec_stream.hf.layout import heads, linear, same
from spec_stream.models.config import ModelConfig

MODEL_TYPES = ("gemma2", "gemma3_text")
ARCHITECTURES = {
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}
_L = "model.layers.{}."

TABLE = {
  "embed/table": same("model.embed_tokens.weight"),
  "blocks/{}/attention_norm/scale": same(_L + "input_layernorm.weight"),
  "blocks/{}/attention/qkv/kernel": heads(
    _L + "self_attn.{}.weight", "q_proj k_proj v_proj"
  ),
  "blocks/{}/attention/q_norm/scale": same(_L + "self_attn.q_norm.weight"),
  "blocks/{}/attention/k_norm/scale": same(_L + "self_attn.k_norm.weight"),
  "blocks/{}/attention/out/kernel": linear(_L + "self_attn.o_proj.weight"),
  "blocks/{}/post_attention_norm/scale": same(
    _L + "post_attention_layernorm.weight"
  ),
  "blocks/{}/ffw_norm/scale": same(_L + "pre_feedforward_layernorm.weight"),
  "blocks/{}/ffw/gate_up/kernel": linear(
    _L + "mlp.{}.weight", "gate_proj up_proj"
  ),
  "blocks/{}/ffw/down/kernel": linear(_L + "mlp.down_proj.weight"),
  "blocks/{}/post_ffw_norm/scale": same(
    _L + "post_feedforward_layernorm.weight"
  ),
  "final_norm/scale": same("model.norm.weight"),
  "head/kernel": linear("lm_head.weight"),
}


def read(keys: Keys, model_type: str) -> dict:
  """Fields of ModelConfig."""
  three = model_type == "gemma3_text"
  most = keys.get("max_position_embeddings", 131_072 if three else 8192)
  num_layers, width = keys.get("num_hidden_layers"), keys.get("hidden_size")
  for name in ("hidden_activation", "hidden_act"):  # the second is the older
    keys.only(name, "gelu_pytorch_tanh", *["gelu"] * (name == "hidden_act"))
  keys.only("attention_bias", False)
  keys.only("use_bidirectional_attention", False)
  theta, theta_sliding = 1e6 if three else 1e4, 0.0
  rope = read_rope(keys, theta=theta, most=most, layers="full_attention")
  if three:
    theta_sliding = keys.get("rope_local_base_freq", 1e4)
    where = f"{keys.where}: rope_parameters"
    both = Keys(keys.get("rope_parameters", {}, dict), where)
    new = both.get("sliding_attention", {}, dict)
    sliding = Keys(new, f"{where}.sliding_attention")
    theta_sliding = sliding.get("rope_theta", theta_sliding)
    sliding.only("rope_type", "default")
    sliding.close()
  window = keys.get("sliding_window", 4096)
  every = keys.get("sliding_window_pattern", 6 if three else 2)
  slides = tuple(l for l in range(num_layers) if (l + 1) % every)
  cap = (0.0, 0.0) if three else (50.0, 30.0)
  return dict(
    vocab_size=keys.get("vocab_size"),
    width=width,
    num_layers=num_layers,
    num_heads=keys.get("num_attention_heads"),
    num_kv_heads=keys.get("num_key_value_heads", 4),
    head_dim=keys.get("head_dim", 256),
    ffw_dim=keys.get("intermediate_size"),
    max_positions=most,
    norm_eps=keys.get("rms_norm_eps", 1e-6),
    norm_offset=True,
    post_norms=True,
    activation="gelu_tanh",
    qk_norm=three,
    rope_theta=rope.theta,
    rope_theta_sliding=theta_sliding,
    rope_scaling=rope.scaling,
    attention_scale=keys.get("query_pre_attn_scalar", 256.0) ** -0.5,
    attention_softcap=keys.given("attn_logit_softcapping", cap[0], 0.0, float),
    logit_softcap=keys.given("final_logit_softcapping", cap[1], 0.0, float),
    embed_scale=width**0.5,
    tie_embeddings=keys.get("tie_word_embeddings", True),
    **read_sliding(keys, num_layers, window, slides),
  )


def write(config: ModelConfig, model_type: str) -> dict:
  """The inverse of `read`, for a model that it can describe."""
  scale = config.attention_scale or config.head_dim**-0.5
  scalar = round(scale**-2, 6)
  values = dict(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    intermediate_size=config.ffw_dim,
    max_position_embeddings=config.max_positions,
    rms_norm_eps=config.norm_eps,
    hidden_activation="gelu_pytorch_tanh",
    rope_theta=config.rope_theta,
    rope_scaling=write_rope(config.rope_scaling),
    query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
    sliding_window=config.sliding_window or 4096,
    layer_types=write_sliding(config),
    attn_logit_softcapping=config.attention_softcap or None,
    final_logit_softcapping=config.logit_softcap or None,
    tie_word_embeddings=config.tie_embeddings,
  )
  if model_type == "gemma3_text":
    values["rope_local_base_freq"] = config.rope_theta_sliding
  return values
