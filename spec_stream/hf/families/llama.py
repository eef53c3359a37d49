"""Llama 1, 2 and 3, Vicuna, TinyLlama, OpenLLaMA; Mistral; Qwen2; Qwen3.

One layout: RMSNorm, rotary positions, SwiGLU. Mistral adds a sliding window,
Qwen2 biases of queries, keys and values, Qwen3 norms of queries and keys.
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

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_L = "model.layers.{}."

TABLE = {
  "embed/table": same("model.embed_tokens.weight"),
  "blocks/{}/attention_norm/scale": same(_L + "input_layernorm.weight"),
  "blocks/{}/attention/qkv/kernel": heads(
    _L + "self_attn.{}.weight", "q_proj k_proj v_proj"
  ),
  "blocks/{}/attention/qkv/bias": heads(
    _L + "self_attn.{}.bias", "q_proj k_proj v_proj"
  ),
  "blocks/{}/attention/q_norm/scale": same(_L + "self_attn.q_norm.weight"),
  "blocks/{}/attention/k_norm/scale": same(_L + "self_attn.k_norm.weight"),
  "blocks/{}/attention/out/kernel": linear(_L + "self_attn.o_proj.weight"),
  "blocks/{}/attention/out/bias": linear(_L + "self_attn.o_proj.bias"),
  "blocks/{}/ffw_norm/scale": same(_L + "post_attention_layernorm.weight"),
  "blocks/{}/ffw/gate_up/kernel": linear(
    _L + "mlp.{}.weight", "gate_proj up_proj"
  ),
  "blocks/{}/ffw/gate_up/bias": linear(_L + "mlp.{}.bias", "gate_proj up_proj"),
  "blocks/{}/ffw/down/kernel": linear(_L + "mlp.down_proj.weight"),
  "blocks/{}/ffw/down/bias": linear(_L + "mlp.down_proj.bias"),
  "final_norm/scale": same("model.norm.weight"),
  "head/kernel": linear("lm_head.weight"),
}


def read(keys: Keys, model_type: str) -> dict:
  """Fields of ModelConfig."""
  most = keys.get("max_position_embeddings", 2048)
  rope = read_rope(keys, most=most)
  num_layers = keys.get("num_hidden_layers")
  keys.only("hidden_act", "silu")
  width, num_heads = keys.get("hidden_size"), keys.get("num_attention_heads")
  bias = model_type == "qwen2"
  out_bias = ffw_bias = False
  if model_type in ("llama", "qwen3"):
    bias = out_bias = keys.get("attention_bias", False)
  if model_type == "llama":
    ffw_bias = keys.get("mlp_bias", False)
  window, slides = 0, ()
  if model_type == "mistral":
    window = keys.given("sliding_window", 4096, 0, int)
    slides = tuple(range(num_layers))
  elif model_type != "llama":
    first = keys.get("max_window_layers", 28)
    window = keys.given("sliding_window", 4096, 0, int)
    slides = tuple(range(first, num_layers))
    if not keys.get("use_sliding_window", False):
      window = 0
  head_dim = 128 if model_type == "qwen3" else width // num_heads
  # The families' own defaults, where a config.json leaves the key out.
  kv_heads = {"llama": num_heads, "mistral": 8}.get(model_type, 32)
  return dict(
    vocab_size=keys.get("vocab_size"),
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=keys.given("num_key_value_heads", kv_heads, num_heads, int),
    head_dim=keys.get("head_dim", head_dim),
    ffw_dim=keys.get("intermediate_size"),
    max_positions=most,
    norm_eps=keys.get("rms_norm_eps", 1e-6),
    rope_theta=rope.theta,
    rope_scaling=rope.scaling,
    qkv_bias=bias,
    out_bias=out_bias,
    ffw_bias=ffw_bias,
    qk_norm=model_type == "qwen3",
    tie_embeddings=keys.get("tie_word_embeddings", False),
    **read_sliding(keys, num_layers, window, slides),
  )


def write(config: ModelConfig, model_type: str) -> dict:
  """The inverse of `read`, for a model that it can describe."""
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
    hidden_act="silu",
    rope_theta=config.rope_theta,
    rope_scaling=write_rope(config.rope_scaling),
    tie_word_embeddings=config.tie_embeddings,
  )
  if model_type in ("llama", "qwen3"):
    values["attention_bias"] = config.qkv_bias
  if model_type == "llama":
    values["mlp_bias"] = config.ffw_bias
  if model_type != "llama":
    values["sliding_window"] = config.sliding_window or None
  if model_type in ("qwen2", "qwen3"):
    values["layer_types"] = write_sliding(config)
    values["use_sliding_window"] = bool(config.sliding_window)
    values["max_window_layers"] = config.num_layers
  return values
