"""OPT: learned positions (two spare rows first), LayerNorm, biases, ReLU.

The 350M model, which norms after each layer and projects its embeddings, is
refused by name.
"""

from spec_stream.hf.keys import Keys
from spec_stream.hf.layout import heads, linear, same
from spec_stream.models.config import ModelConfig

MODEL_TYPES = ("opt",)
ARCHITECTURES = {"opt": "OPTForCausalLM"}
_D = "model.decoder."
_L = _D + "layers.{}."
_PARTS = "q_proj k_proj v_proj"
_NORM = _L + "self_attn_layer_norm."

TABLE = {
  "embed/table": same(_D + "embed_tokens.weight"),
  "positions/table": same(_D + "embed_positions.weight"),
  "blocks/{}/attention_norm/scale": same(_NORM + "weight"),
  "blocks/{}/attention_norm/bias": same(_NORM + "bias"),
  "blocks/{}/attention/qkv/kernel": heads(_L + "self_attn.{}.weight", _PARTS),
  "blocks/{}/attention/qkv/bias": heads(_L + "self_attn.{}.bias", _PARTS),
  "blocks/{}/attention/out/kernel": linear(_L + "self_attn.out_proj.weight"),
  "blocks/{}/attention/out/bias": linear(_L + "self_attn.out_proj.bias"),
  "blocks/{}/ffw_norm/scale": same(_L + "final_layer_norm.weight"),
  "blocks/{}/ffw_norm/bias": same(_L + "final_layer_norm.bias"),
  "blocks/{}/ffw/gate_up/kernel": linear(_L + "fc1.weight"),
  "blocks/{}/ffw/gate_up/bias": linear(_L + "fc1.bias"),
  "blocks/{}/ffw/down/kernel": linear(_L + "fc2.weight"),
  "blocks/{}/ffw/down/bias": linear(_L + "fc2.bias"),
  "final_norm/scale": same(_D + "final_layer_norm.weight"),
  "final_norm/bias": same(_D + "final_layer_norm.bias"),
  "head/kernel": linear("lm_head.weight"),
}


def read(keys: Keys, model_type: str) -> dict:
  """Fields of ModelConfig."""
  del model_type
  width, num_heads = keys.get("hidden_size"), keys.get("num_attention_heads")
  keys.only("do_layer_norm_before", True)
  keys.only("word_embed_proj_dim", width)
  keys.only("enable_bias", True)
  keys.only("layer_norm_elementwise_affine", True)
  keys.only("_remove_final_layer_norm", False)
  activation = keys.only("activation_function", "relu", "gelu")
  return dict(
    vocab_size=keys.get("vocab_size"),
    width=width,
    num_layers=keys.get("num_hidden_layers"),
    num_heads=num_heads,
    num_kv_heads=num_heads,
    head_dim=width // num_heads,
    ffw_dim=keys.get("ffn_dim"),
    max_positions=keys.get("max_position_embeddings", 2048),
    norm="layer",
    norm_eps=1e-5,
    activation=activation,
    gated=False,
    positions="learned",
    position_offset=2,
    qkv_bias=True,
    out_bias=True,
    ffw_bias=True,
    tie_embeddings=keys.get("tie_word_embeddings", True),
  )


def write(config: ModelConfig, model_type: str) -> dict:
  """The inverse of `read`, for a model that it can describe."""
  del model_type
  return dict(
    vocab_size=config.vocab_size,
    hidden_size=config.width,
    word_embed_proj_dim=config.width,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    ffn_dim=config.ffw_dim,
    max_position_embeddings=config.max_positions,
    activation_function=config.activation,
    do_layer_norm_before=True,
    tie_word_embeddings=config.tie_embeddings,
  )
