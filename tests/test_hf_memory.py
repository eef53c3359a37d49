"""Weights stream leaf by leaf: what the host holds while a checkpoint loads."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

WIDTH, LAYERS, FFW = 512, 8, 2048
# Prints [growth of peak resident memory, bytes placed] of one load.
LOAD = """
import json, sys
import jax, jax.numpy as jnp
from spec_stream import weights
from spec_stream.hf import checkpoint

def peak():
  for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
      return int(line.split()[1]) * 1024

small, large = sys.argv[1:]
checkpoint.load(small)  # imports and first compilations are not the question
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
model = checkpoint.load(large)
placed = sum(x.nbytes for x in weights.to_weights(model).values())
print(json.dumps([peak() - before, placed]))
"""


def write(directory: pathlib.Path, width, layers, ffw, shards):
  """A Llama whose weights are ones in float32, in shards of like size."""
  directory.mkdir()
  config = dict(
    model_type="llama", vocab_size=512, hidden_size=width,
    intermediate_size=ffw, num_hidden_layers=layers, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=64, rms_norm_eps=1e-6,
    rope_theta=1e4, tie_word_embeddings=True,
  )  # fmt: skip
  (directory / "config.json").write_text(json.dumps(config))
  shapes = {"model.embed_tokens.weight": (512, width)}
  shapes["model.norm.weight"] = (width,)
  for layer in range(layers):
    name = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
      shapes[f"{name}{norm}.weight"] = (width,)
    for part in "qkvo":
      shapes[f"{name}self_attn.{part}_proj.weight"] = (width, width)
    for part in ("gate", "up"):
      shapes[f"{name}mlp.{part}_proj.weight"] = (ffw, width)
    shapes[f"{name}mlp.down_proj.weight"] = (width, ffw)
  names, index, sizes = np.array_split(list(shapes), shards), {}, []
  for number, part in enumerate(names):
    file = f"model-{number}.safetensors"
    values = {str(n): np.ones(shapes[n], np.float32) for n in part}
    safetensors.numpy.save_file(values, directory / file)
    sizes.append((directory / file).stat().st_size)
    index |= dict.fromkeys(map(str, part), file)
  index = {"weight_map": index}
  path = directory / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  return max(sizes)


@pytest.mark.skipif(
  not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux"
)
def test_the_host_holds_no_more_than_a_shard_beside_what_is_placed(tmp_path):
  write(tmp_path / "small", 64, 1, 64, 1)
  largest = write(tmp_path / "large", WIDTH, LAYERS, FFW, 4)
  done = subprocess.run(
    [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large"],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  growth, placed = json.loads(done.stdout.splitlines()[-1])
  assert placed > 100e6 and largest > 25e6
  assert growth < placed + 1.3 * largest, (growth, placed, largest)
