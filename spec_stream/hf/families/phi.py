"""Phi-1, Phi-1.5, Phi-2: a parallel block, LayerNorm, partial rotary, biases.

Attention and feed-forward read the same normed input and are added together.
"""

from spec_stream.hf.keys import Keys, read_rope, write_rope
from spec_stream.hf.layout import heads, linear, same
from spec_stream.models.config import ModelConfig

MODEL_TYPES = ("phi",)
ARCHITECTURES = {"phi": "PhiForCausalLM"}
_L = "model.layers.{}."
_PARTS = "q_proj k_proj v_proj"

TABLE = {
  "embed/table": same("model.embed_tokens.weight"),
  "blocks/{}/attention_norm/scale": same(_L + "input_layernorm.weight"),
  "blocks/{}/attention_norm/bias": same(_L + "input_layernorm.bias"),
  "blocks/{}/attention/qkv/kernel": heads(_L + "self_attn.{}.weight", _PARTS),
  "blocks/{}/attention/qkv/bias": heads(_L + "self_attn.{}.bias", _PARTS),
  "blocks/{}/attention/out/kernel": linear(_L + "self_attn.dense.weight"),
  "blocks/{}/attention/out/bias": linear(_L + "self_attn.dense.bias"),
  "blocks/{}/ffw/gate_up/kernel": linear(_L + "mlp.fc1.weight"),
  "blocks/{}/ffw/gate_up/bias": linear(_L + "mlp.fc1.bias"),
  "blocks/{}/ffw/down/kernel": linear(_L + "mlp.fc2.weight"),
  "blocks/{}/ffw/down/bias": linear(_L + "mlp.fc2.bias"),
  "final_norm/scale": same("model.final_layernorm.weight"),
  "final_norm/bias": same("model.final_layernorm.bias"),
  "head/kernel": linear("lm_head.weight"),
  "head/bias": linear("lm_head.bias"),
}


def read(keys: Keys, model_type: str) -> dict:
  """Fields of ModelConfig."""
  del model_type
  rope = read_rope(keys, partial=0.5)
  width, num_heads = keys.get("hidden_size"), keys.get("num_attention_heads")
  keys.only("hidden_act", "gelu_new", "gelu_pytorch_tanh")
  keys.only("qk_layernorm", False)
  tied = keys.only("tie_word_embeddings", False)  # the head has a bias
  head_dim = width // num_heads
  return dict(
    vocab_size=keys.get("vocab_size"),
    width=width,
    num_layers=keys.get("num_hidden_layers"),
    num_heads=num_heads,
    num_kv_heads=keys.get("num_key_value_heads", num_heads),
    head_dim=head_dim,
    ffw_dim=keys.get("intermediate_size"),
    max_positions=keys.get("max_position_embeddings", 2048),
    norm="layer",
    norm_eps=keys.get("layer_norm_eps", 1e-5),
    parallel_block=True,
    activation="gelu_tanh",
    gated=False,
    rotary_dim=int(head_dim * rope.partial) % head_dim,
    rope_theta=rope.theta,
    rope_scaling=rope.scaling,
    qkv_bias=True,
    out_bias=True,
    ffw_bias=True,
    head_bias=True,
    tie_embeddings=tied,
  )


def write(config: ModelConfig, model_type: str) -> dict:
  """The inverse of `read`, for a model that it can describe."""
  del model_type
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    intermediate_size=config.ffw_dim,
    max_position_embeddings=config.max_positions,
    layer_norm_eps=config.norm_eps,
    hidden_act="gelu_new",
    partial_rotary_factor=config.turned / config.head_dim,
    rope_theta=config.rope_theta,
    rope_scaling=write_rope(config.rope_scaling),
    tie_word_embeddings=config.tie_embeddings,
  )
