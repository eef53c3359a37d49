"""Memory of compiled programs, and the tables of experiments/memory."""

import dataclasses
import importlib
import math
import pathlib

import pytest
import tiny

from spec_stream import StreamDraft, TreeSpec, ahead, weights
from spec_stream.models.config import StreamConfig

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "memory"


@pytest.fixture
def script(monkeypatch):
  """Imports a script of the folder, which finds its neighbours as when run."""
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


@pytest.mark.slow
def test_segments_make_the_memory_of_attention_linear(script):
  training = script("training")
  mesh = ahead.make_mesh("cpu")

  def growth(segment, *lengths):
    run = lambda n: training.measure(1, n, segment, mesh, model=tiny.SMALL)
    return training.growth({n: run(n)["temporaries"] for n in lengths})

  assert max(growth(32, 256, 512, 1024)) < 2.1
  assert growth(0, 512, 1024)[0] > 3


def test_parts_add_up_to_the_published_number_of_weights(script):
  llama7b = script("llama7b")
  plain = dataclasses.replace(llama7b.LLAMA, streams=StreamConfig(0, 0))
  parts = llama7b.weight_parts(weights.shapes(plain))
  assert sum(parts.values()) == 2 * 6_738_415_616  # bfloat16


@pytest.mark.parametrize("mode", ["shared", "lossless"])
def test_adapters_are_apart_from_the_base(script, mode):
  llama7b = script("llama7b")
  model, train = llama7b.configs(mode)
  parts = llama7b.weight_parts(weights.shapes(model))
  rank, width, ffw, layers = 32, 4096, 11008, 4
  # qkv, out, gate_up, down: each has its inputs and its outputs `rank` times.
  sides = (4 + 2) * width + (1 + 2 * ffw / width) * width + ffw
  lora = layers * rank * (sides + width)
  streams, pruner = 3 * width, 2 * 8 * width
  assert parts.pop("adapters") == 4 * (lora + streams + pruner)  # float32
  assert sum(parts.values()) == 2 * 6_738_415_616
  assert train.trainable == "adapters" and train.segment == 128


def test_account_adds_up_and_says_what_does_not_fit(script):
  llama7b = script("llama7b")
  memory = dict(arguments=110, outputs=60, aliased=50, temporaries=7)
  memory["total"] = 110 + 60 - 50 + 7
  parts = llama7b.account({"weights": 100}, {"logits": 5}, memory)
  assert parts["padding, unread"] == 10
  assert parts["outputs not in place"] == 10
  assert llama7b.total(parts) == memory["total"]  # what is within counts once
  text = llama7b.render({"small": parts, "large": {"weights": 80_000_000_001}})
  assert text.splitlines()[-1].split() == ["fits", "80", "GB", "yes", "NO"]


def test_programs_of_a_small_model(script):
  """The programs' arguments are the weights, the state and the cache."""
  mesh = ahead.make_mesh("cpu")
  drafter = StreamDraft(TreeSpec("best_first", 4))
  prefill, loop, values, state, _ = ahead.decoding(
    tiny.MODEL, drafter, mesh, slots=32, prompt=16
  )
  cache = 2 * math.prod((2, 2, 4, 32)) * 4  # k and v: L, K, H, S; float32
  assert ahead.num_bytes(state.cache.layers) == cache
  found = ahead.memory(loop)
  held = ahead.num_bytes((values, state))
  # What the loop does not read (the pruner, 2 x 2 x 16 x 4 bytes) may be left
  # out; small arrays may be padded.
  assert held - 512 <= found["arguments"] <= held + 1024
  assert found["aliased"] >= cache  # it is donated
  assert ahead.memory(prefill)["outputs"] >= cache


@pytest.mark.parametrize("name", ["training", "llama7b"])
def test_a_wrong_target_is_one_line(script, name, tmp_path, capsys):
  arguments = [f"--out={tmp_path}", "--target=abacus"]
  assert script(name).main(arguments) == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1
