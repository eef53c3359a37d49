"""Phi-3, Phi-3.5, Phi-4: fused projections, long-rope, a sliding window."""

from spec_stream.hf.keys import Keys, read_rope, read_sliding, write_rope
from spec_stream.hf.layout import heads, linear, same
from spec_stream.models.config import ModelConfig

MODEL_TYPES = ("phi3",)
ARCHITECTURES = {"phi3": "Phi3ForCausalLM"}
_L = "model.layers.{}."

TABLE = {
  "embed/table": same("model.embed_tokens.weight"),
  "blocks/{}/attention_norm/scale": same(_L + "input_layernorm.weight"),
  "blocks/{}/attention/qkv/kernel": heads(_L + "self_attn.qkv_proj.weight"),
  "blocks/{}/attention/out/kernel": linear(_L + "self_attn.o_proj.weight"),
  "blocks/{}/ffw_norm/scale": same(_L + "post_attention_layernorm.weight"),
  "blocks/{}/ffw/gate_up/kernel": linear(_L + "mlp.gate_up_proj.weight"),
  "blocks/{}/ffw/down/kernel": linear(_L + "mlp.down_proj.weight"),
  "final_norm/scale": same("model.norm.weight"),
  "head/kernel": linear("lm_head.weight"),
}


def read(keys: Keys, model_type: str) -> dict:
  """Fields of ModelConfig."""
  del model_type
  most = keys.get("max_position_embeddings", 4096)
  rope = read_rope(keys, partial=1.0, most=most)
  num_layers = keys.get("num_hidden_layers")
  keys.only("hidden_act", "silu")
  keys.only("attention_bias", False)
  width, num_heads = keys.get("hidden_size"), keys.get("num_attention_heads")
  head_dim = keys.get("head_dim", width // num_heads)
  window = keys.get("sliding_window", 0, int)
  slides = tuple(range(num_layers))
  return dict(
    vocab_size=keys.get("vocab_size"),
    width=width,
    num_layers=num_layers,
    num_heads=num_heads,
    num_kv_heads=keys.get("num_key_value_heads", num_heads),
    head_dim=head_dim,
    ffw_dim=keys.get("intermediate_size"),
    max_positions=most,
    norm_eps=keys.get("rms_norm_eps", 1e-5),
    rotary_dim=int(head_dim * rope.partial) % head_dim,
    rope_theta=rope.theta,
    rope_scaling=rope.scaling,
    tie_embeddings=keys.get("tie_word_embeddings", False),
    **read_sliding(keys, num_layers, window, slides),
  )


def write(config: ModelConfig, model_type: str) -> dict:
  """The inverse of `read`, for a model that it can describe."""
  del model_type
  scaling = config.rope_scaling
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
    partial_rotary_factor=config.turned / config.head_dim,
    rope_theta=config.rope_theta,
    rope_scaling=write_rope(scaling),
    sliding_window=config.sliding_window or None,
    tie_word_embeddings=config.tie_embeddings,
  )
  if scaling.kind == "longrope":
    values["original_max_position_embeddings"] = scaling.original_positions
  return values
