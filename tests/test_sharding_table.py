"""Every weight of every family, and where it lies: a table to be read."""

import dataclasses
import importlib.util
import json
import re

import hf_models
import pytest

from spec_stream import sharding, weights
from spec_stream.drafters import registry
from spec_stream.hf.config import read_config
from spec_stream.hf.families import BY_TYPE
from spec_stream.models.config import (
  DrafterConfig,
  ModelConfig,
  StreamConfig,
)

STREAMS = StreamConfig(
  lora_rank=4,
  lora_layers="all",
  map_rank=2,
  correction_rank=2,
  prune_rank=2,
)
BIASED = "llama, biases, llama3"
# A weight of any layer (*), the axis that splits each dimension, and who has
# it: * for all families, or those that are named.
FAMILIES = f"""
embed/table                         | fsdp+tensor -    | *
positions/table                     | whole            | opt
blocks/*/attention_norm/scale       | whole            | *
blocks/*/attention_norm/bias        | whole            | phi; opt
blocks/*/attention/qkv/kernel       | fsdp tensor - -  | *
blocks/*/attention/qkv/bias         | tensor - -       | {BIASED}; qwen2; phi; opt
blocks/*/attention/qkv/lora_a       | fsdp -           | *
blocks/*/attention/qkv/lora_b       | - tensor - -     | *
blocks/*/attention/q_norm/scale     | whole            | qwen3; gemma3
blocks/*/attention/k_norm/scale     | whole            | qwen3; gemma3
blocks/*/attention/out/kernel       | tensor - - fsdp  | *
blocks/*/attention/out/bias         | whole            | {BIASED}; phi; opt
blocks/*/attention/out/lora_a       | tensor - - -     | *
blocks/*/attention/out/lora_b       | - fsdp           | *
blocks/*/post_attention_norm/scale  | whole            | gemma2; gemma3
blocks/*/ffw_norm/scale             | whole            | * but phi
blocks/*/ffw_norm/bias              | whole            | opt
blocks/*/ffw/gate_up/kernel         | fsdp - tensor    | *
blocks/*/ffw/gate_up/bias           | - tensor         | {BIASED}; phi; opt
blocks/*/ffw/gate_up/lora_a         | fsdp -           | *
blocks/*/ffw/gate_up/lora_b         | - - tensor       | *
blocks/*/ffw/down/kernel            | tensor fsdp      | *
blocks/*/ffw/down/bias              | whole            | {BIASED}; phi; opt
blocks/*/ffw/down/lora_a            | tensor -         | *
blocks/*/ffw/down/lora_b            | - fsdp           | *
blocks/*/post_ffw_norm/scale        | whole            | gemma2; gemma3
final_norm/scale                    | whole            | *
final_norm/bias                     | whole            | phi; opt
head/kernel                         | fsdp tensor      | llama; {BIASED}; mistral; qwen3; phi; phi3
head/bias                           | tensor           | phi
streams/embed                       | whole            | *
streams/map_a                       | whole            | *
streams/map_b                       | whole            | *
streams/correct_a                   | whole            | *
streams/correct_b                   | whole            | *
pruner/a                            | whole            | *
pruner/b                            | whole            | *
"""  # noqa: E501
# What int8, and drafters, have beside a Llama's.
INT8 = """
blocks/*/attention/qkv/kernel_scale | - tensor - -     | *
blocks/*/attention/out/kernel_scale | - fsdp           | *
blocks/*/ffw/gate_up/kernel_scale   | - - tensor       | *
blocks/*/ffw/down/kernel_scale      | - fsdp           | *
"""
DRAFTERS = """
drafter/block_kernels               | - fsdp tensor    | medusa; redrafter
drafter/block_kernel                | fsdp tensor      | hydra
drafter/block_bias                  | whole            | medusa; hydra; redrafter
drafter/head_kernels                | - fsdp tensor    | medusa; hydra
drafter/head_kernel                 | fsdp tensor      | redrafter
drafter/state_kernel                | fsdp tensor      | redrafter
drafter/state_bias                  | whole            | redrafter
drafter/word_kernel                 | fsdp tensor      | redrafter; eagle
drafter/feature_kernel              | fsdp tensor      | eagle
drafter/fuse_kernel                 | fsdp tensor      | eagle
drafter/block/attention_norm/scale  | whole            | eagle
drafter/block/attention/qkv/kernel  | fsdp tensor - -  | eagle
drafter/block/attention/out/kernel  | tensor - - fsdp  | eagle
drafter/block/ffw_norm/scale        | whole            | eagle
drafter/block/ffw/gate_up/kernel    | fsdp - tensor    | eagle
drafter/block/ffw/down/kernel       | tensor fsdp      | eagle
"""  # noqa: E501
OPTIONS = {"eagle": (("fuse", (0, 1)),)}


def placed(config: ModelConfig) -> dict[str, str]:
  """{a weight, with * for its layer: the axes that split it}."""
  found = {}
  for path, x in weights.shapes(config).items():
    rule = sharding.spec(path)
    axes = ["+".join(a) if isinstance(a, tuple) else a or "-" for a in rule]
    assert not rule or len(rule) == len(x.shape), path
    name = re.sub(r"blocks/\d+", "blocks/*", path)
    text = " ".join(axes) or "whole"
    assert found.setdefault(name, text) == text, path
  return found


def wanted(table: str, name: str) -> dict[str, str]:
  """The lines of a table that are of a family."""
  found = {}
  for line in table.strip().splitlines():
    path, axes, families = (part.strip() for part in line.split("|"))
    every, _, but = families.partition("* but ")
    named = (but if but else families).split("; ")
    if families == "*" or (name in named) != bool(but):
      assert path not in found, line
      found[path] = axes
  return found


@pytest.fixture
def family(tmp_path):
  """-> the model of a family's config.json."""

  def read(name: str) -> ModelConfig:
    kind, own = hf_models.CASES[name]
    text = json.dumps({"model_type": kind, **hf_models.BASE, **own})
    (tmp_path / "config.json").write_text(text)
    return read_config(tmp_path, streams=STREAMS)

  return read


def test_there_is_a_case_of_each_family():
  kinds = {kind for kind, _ in hf_models.CASES.values()}
  modules = {BY_TYPE[kind] for kind in kinds}
  assert modules == set(BY_TYPE.values())


@pytest.mark.parametrize("name", hf_models.CASES)
def test_weights_of_a_family(family, name):
  assert placed(family(name)) == wanted(FAMILIES, name)


@pytest.mark.parametrize(
  "name", [n for n in registry.DRAFTERS if registry.get(n).Module]
)
def test_weights_of_a_drafter(family, name):
  drafter = DrafterConfig(name, OPTIONS.get(name, ()))
  model = dataclasses.replace(family("llama"), drafter=drafter)
  own = wanted(DRAFTERS, name)
  assert placed(model) == wanted(FAMILIES, "llama") | own and own


@pytest.mark.skipif(
  importlib.util.find_spec("qwix") is None, reason="qwix is not installed"
)
def test_weights_of_a_quantised_base(family):
  model = dataclasses.replace(family("llama"), quantize="int8")
  own = wanted(INT8, "llama")
  assert placed(model) == wanted(FAMILIES, "llama") | own
