"""config.json as published checkpoints have it, keys of version 4.

The number of weights that follows from each must be the published one.
"""

import dataclasses
import json
import math

import pytest
from random_models import in_short

from spec_stream.errors import UserError
from spec_stream.hf import checkpoint
from spec_stream.hf import config as hf_config
from spec_stream.models.config import ModelConfig, StreamConfig

_LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}


def _config(model_type, width, layers, heads, kv_heads, vocab, **rest):
  return dict(
    model_type=model_type,
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    vocab_size=vocab,
    torch_dtype="bfloat16",
    use_cache=True,
    initializer_range=0.02,
    transformers_version="4.40.0",
    **rest,
  )


def _silu(ffw, most, **rest):
  return dict(
    hidden_act="silu",
    intermediate_size=ffw,
    max_position_embeddings=most,
    **rest,
  )


# Name -> (config.json, weights, tied ones once).
PUBLISHED = {
  "Llama-2-7B": (
    _config(
      *("llama", 4096, 32, 32, 32, 32000),
      **_silu(11008, 4096, rms_norm_eps=1e-5, rope_scaling=None),
      pretraining_tp=1,
      tie_word_embeddings=False,
    ),
    6_738_415_616,
  ),
  "Llama-3.1-8B": (
    _config(
      *("llama", 4096, 32, 32, 8, 128256),
      **_silu(14336, 131072, rope_theta=5e5, rope_scaling=_LLAMA3),
      eos_token_id=[128001, 128008, 128009],
      attention_bias=False,
      mlp_bias=False,
    ),
    8_030_261_248,
  ),
  "Mistral-7B-v0.1": (
    _config(
      *("mistral", 4096, 32, 32, 8, 32000),
      **_silu(14336, 32768, sliding_window=4096, rope_theta=10000.0),
    ),
    7_241_732_096,
  ),
  "Qwen2.5-7B": (
    _config(
      *("qwen2", 3584, 28, 28, 4, 152064),
      **_silu(18944, 131072, sliding_window=131072, rope_theta=1e6),
      use_sliding_window=False,
      max_window_layers=28,
      use_mrope=False,
    ),
    7_615_616_512,
  ),
  "Qwen3-8B": (
    _config(
      *("qwen3", 4096, 36, 32, 8, 151936),
      **_silu(12288, 40960, sliding_window=None, rope_theta=1e6),
      head_dim=128,
      attention_bias=False,
      use_sliding_window=False,
      max_window_layers=36,
      tie_word_embeddings=False,
    ),
    8_190_735_360,
  ),
  "phi-2": (
    _config(
      *("phi", 2560, 32, 32, 32, 51200),
      intermediate_size=10240,
      max_position_embeddings=2048,
      hidden_act="gelu_new",
      partial_rotary_factor=0.4,
      layer_norm_eps=1e-5,
      qk_layernorm=False,
      resid_pdrop=0.1,
    ),
    2_779_683_840,
  ),
  "Phi-3-mini-4k": (
    _config(
      *("phi3", 3072, 32, 32, 32, 32064),
      **_silu(8192, 4096, sliding_window=2047, rope_theta=10000.0),
      original_max_position_embeddings=4096,
      attention_bias=False,
      auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
    ),
    3_821_079_552,
  ),
  "opt-1.3b": (
    {
      k: v
      for k, v in _config(
        *("opt", 2048, 24, 32, 32, 50272),
        ffn_dim=8192,
        word_embed_proj_dim=2048,
        max_position_embeddings=2048,
        activation_function="relu",
        do_layer_norm_before=True,
        prefix="</s>",
      ).items()
      if k != "num_key_value_heads"
    },
    1_315_758_080,
  ),
  "gemma-2-2b": (
    _config(
      *("gemma2", 2304, 26, 8, 4, 256000),
      intermediate_size=9216,
      max_position_embeddings=8192,
      hidden_act="gelu_pytorch_tanh",
      hidden_activation="gelu_pytorch_tanh",
      head_dim=256,
      query_pre_attn_scalar=256,
      sliding_window=4096,
      attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
      cache_implementation="hybrid",
    ),
    2_614_341_888,
  ),
  "gemma-3-1b": (
    _config(
      *("gemma3_text", 1152, 26, 4, 1, 262144),
      intermediate_size=6912,
      max_position_embeddings=32768,
      hidden_activation="gelu_pytorch_tanh",
      head_dim=256,
      query_pre_attn_scalar=256,
      sliding_window=512,
      sliding_window_pattern=6,
      rope_theta=1e6,
      rope_local_base_freq=10000,
      attn_logit_softcapping=None,
      final_logit_softcapping=None,
    ),
    999_885_952,
  ),
}


def read(tmp_path, values, **settings):
  (tmp_path / "config.json").write_text(json.dumps(values))
  return hf_config.read_config(tmp_path, **settings)


@pytest.mark.parametrize(
  "name", in_short(PUBLISHED, ("Llama-2-7B", "opt-1.3b", "gemma-2-2b"))
)
def test_the_number_of_weights_is_the_published_one(name, tmp_path):
  values, count = PUBLISHED[name]
  config = read(tmp_path, values)
  found = checkpoint.base_shapes(config)
  assert sum(math.prod(x.shape) for x in found.values()) == count
  assert {x.dtype.name for x in found.values()} == {"bfloat16"}
  table = checkpoint.table_of(tmp_path)
  for path in found:  # each has its row
    checkpoint.entry(table, path)
  streams = read(tmp_path, values, streams=StreamConfig(lora_rank=32))
  assert checkpoint.base_shapes(streams) == found
  # What we write means the same model, in the same family.
  model_type, written = hf_config.describe(config, prefer=values["model_type"])
  assert model_type == values["model_type"]
  again = read(tmp_path, {**written, "torch_dtype": "bfloat16"})
  assert again == config


def test_what_the_published_configs_say(tmp_path):
  get = lambda name: read(tmp_path, PUBLISHED[name][0])
  assert get("Llama-3.1-8B").rope_scaling.kind == "llama3"
  assert get("Mistral-7B-v0.1").sliding_layers == tuple(range(32))
  assert get("Qwen2.5-7B").sliding_layers == ()
  assert get("Qwen2.5-7B").qkv_bias and not get("Qwen3-8B").qkv_bias
  assert get("phi-2").rotary_dim == 32
  gemma = get("gemma-3-1b")
  assert [l for l in range(26) if not gemma.slides(l)] == [5, 11, 17, 23]
  assert gemma.rope_theta == 1e6 and gemma.rope_theta_sliding == 1e4
  assert get("gemma-2-2b").attention_softcap == 50.0
  assert get("gemma-2-2b").sliding_layers == tuple(range(0, 26, 2))


@pytest.mark.parametrize(
  "name, change, words",
  [
    ("Llama-2-7B", {"rope_interleaved": True}, "rope_interleaved=True"),
    ("Llama-2-7B", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("Llama-2-7B", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("Llama-3.1-8B", {"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
    ("Llama-3.1-8B", {"rope_scaling": {**_LLAMA3, "mscale": 2}}, "mscale=2"),
    ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("Qwen2.5-7B", {"is_causal": False}, "is_causal=False"),
    ("phi-2", {"partial_rotary_factor": 0.0}, "must be above 0"),
    ("phi-2", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("opt-1.3b", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt-1.3b", {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512"),
    (
      "gemma-3-1b",
      {
        "rope_parameters": {
          "full_attention": {"rope_type": "default", "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "linear", "factor": 2.0},
        }
      },
      "rope_type='linear'",
    ),
  ],
)
def test_what_is_not_implemented_is_refused_by_name(
  name, change, words, tmp_path
):
  values = {**PUBLISHED[name][0], **change}
  with pytest.raises(UserError, match=words) as error:
    read(tmp_path, values)
  assert "\n" not in str(error.value)


def without(values, *names):
  return {name: x for name, x in values.items() if name not in names}


def test_a_missing_key_is_the_familys_default_and_a_null_is_none(tmp_path):
  mistral = PUBLISHED["Mistral-7B-v0.1"][0]
  names = "sliding_window", "num_key_value_heads"
  config = read(tmp_path, without(mistral, *names))
  assert (config.sliding_window, config.num_kv_heads) == (4096, 8)
  config = read(tmp_path, mistral | dict.fromkeys(names))
  assert (config.sliding_window, config.num_kv_heads) == (0, 32)
  llama = PUBLISHED["Llama-3.1-8B"][0]
  scaling = without(_LLAMA3, "original_max_position_embeddings")
  config = read(tmp_path, llama | {"rope_scaling": scaling})
  most = llama["max_position_embeddings"]
  assert config.rope_scaling.original_positions == most


def test_streams_may_be_as_deep_as_the_model(tmp_path):
  """Deeper than the layers that this project's default model has."""
  read(tmp_path, PUBLISHED["Llama-2-7B"][0])
  streams = dataclasses.asdict(StreamConfig(num_stream_layers=16))
  open_ = dict(max_positions=0, dtype="", param_dtype="", quantize="")
  settings = dict(checkpoint=str(tmp_path), streams=streams, **open_)
  config, _ = hf_config.configure(settings, 1024)
  assert config.insertion_layer == 16
  streams["num_stream_layers"] = 33
  with pytest.raises(UserError, match="is above model.num_layers=32"):
    hf_config.configure(settings, 1024)


def test_float16_weights_stay_and_are_computed_in_float32(tmp_path):
  values = PUBLISHED["Llama-2-7B"][0] | {"torch_dtype": "float16"}
  config = read(tmp_path, values)
  assert (config.param_dtype, config.dtype) == ("float16", "float32")
  with pytest.raises(UserError, match="model.dtype is 'float16'"):
    read(tmp_path, values, dtype="float16")


def test_a_model_of_no_family_cannot_be_described():
  config = ModelConfig(norm="layer", streams=hf_config.NO_STREAMS)
  with pytest.raises(UserError, match="no Hugging Face family .* model.norm"):
    hf_config.describe(config)
  kept = dataclasses.replace(config, norm="rms")
  assert hf_config.describe(kept)[0] == "llama"
