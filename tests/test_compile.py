"""Costs read off programs, and what the decoding loop must not contain."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.experimental import pallas as pl
from random_models import in_short

from spec_stream import (
  NoDraft,
  StreamDraft,
  TreeSpec,
  ahead,
  compile_check,
  hlo,
  one_pass,
  roofline,
  weights,
)
from spec_stream.errors import UserError
from spec_stream.hlo import Traffic
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.models.lora import matmul

ROOT = pathlib.Path(__file__).parent.parent


def test_flops_of_a_kernel_are_those_of_all_its_blocks():
  def kernel(x, y, out):
    out[...] = x[...] @ y[...]

  product = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((6, 7), "float32"),
    grid=(3,),
    in_specs=[
      pl.BlockSpec((2, 5), lambda i: (i, 0)),
      pl.BlockSpec((5, 7), lambda i: (0, 0)),
    ],
    out_specs=pl.BlockSpec((2, 7), lambda i: (i, 0)),
  )
  args = jnp.zeros((6, 5)), jnp.zeros((5, 7))
  assert roofline.flops(product, *args) == 2 * 6 * 5 * 7


def test_flops_are_those_of_the_products():
  a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 7))
  product = lambda a, b: a @ b
  one = 2 * 3 * 4 * 5 * 7
  assert roofline.flops(product, a, b) == one
  assert roofline.flops(jax.jit(product), a, b) == one
  step = lambda total, _: (total + (a @ b).sum(), None)
  scan = lambda: jax.lax.scan(step, 0.0, None, length=6)
  assert roofline.flops(scan) == 6 * one
  chosen = lambda a, b: jax.lax.platform_dependent(
    a, b, tpu=lambda a, b: (a * 2)[:, :, :1] + 0 * b[:, :1], default=product
  )
  assert roofline.flops(chosen, a, b) == one  # not the cheaper one
  either = lambda c: jax.lax.cond(c, lambda: (a @ b).sum(), lambda: 0.0)
  assert roofline.flops(either, True) == one
  # Forward, twice with rematerialisation, and two products of the gradient.
  loss = lambda a: jnp.sum(jnp.sin(jax.checkpoint(product)(a, b)))
  grad = roofline.flops(jax.grad(loss), a)
  again = roofline.flops(
    jax.grad(lambda a: jnp.sum(jax.checkpoint(lambda a: jnp.sin(a @ b))(a))), a
  )
  assert (grad, again) == (2 * one, 3 * one)


def test_flops_of_a_choice_by_platform_are_those_of_the_others():
  x, kernel = jnp.zeros((1, 1, 5)), jnp.zeros((5, 2, 3))
  assert roofline.flops(matmul, x, kernel) == 2 * 5 * 2 * 3


def test_flops_of_a_plain_step_are_two_for_each_weight():
  """Of a model whose embedding is its head; attention is little beside it."""
  model = ModelConfig(
    vocab_size=256,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    ffw_dim=256,
    streams=StreamConfig(0, 1),
  )
  *_, flops = ahead.decoding(
    model, NoDraft(), ahead.make_mesh("cpu"), slots=64, prompt=32
  )
  count = sum(x.size for x in weights.shapes(model).values())
  # Scores and values: 65 slots of 2 layers.
  assert flops == pytest.approx(2 * count + 2 * 2 * 2 * 64 * 65, rel=0.02)


def test_the_longest_part_bounds_a_step():
  chip = roofline.Chip(flops=100.0, bandwidth=10.0, memory=1.0, links=5.0)
  moved = Traffic(30, (("all-reduce", 2, 10),))
  cost = roofline.Cost(100.0, moved, chip)
  assert cost.parts == {"FLOPs": 1.0, "memory": 3.0, "links": 2.0}
  assert (cost.seconds, cost.bound) == (3.0, "memory")


LOOPS = {
  "plain": (NoDraft(), dataclasses.replace(tiny.MODEL, vocab_size=64)),
  "streams": (
    StreamDraft(TreeSpec("best_first", 6)),
    dataclasses.replace(tiny.MODEL, vocab_size=64),
  ),
  "streams after acceptance": (  # which read the cache just after it is written
    StreamDraft(TreeSpec("best_first", 6)),
    dataclasses.replace(
      tiny.MODEL,
      vocab_size=64,
      streams=StreamConfig(2, 1, mode="lossless", lora_rank=2),
    ),
  ),
}


@pytest.mark.parametrize(
  "name", in_short(LOOPS, ("streams", "streams after acceptance"))
)
def test_the_loop_never_leaves_the_device_nor_copies_the_cache(
  monkeypatch, name
):
  monkeypatch.setattr(one_pass, "most_rows", lambda *_: 0)
  drafter, model = LOOPS[name]
  _, loop, _, state, _ = ahead.decoding(
    model, drafter, ahead.make_mesh("cpu"), slots=176, prompt=96
  )
  text = loop.as_text()
  assert hlo.host_transfers(text) == []
  program = hlo.Program(text)
  (body,) = program.loops()
  layers = jax.tree.leaves(state.cache.layers)
  assert layers and all(176 in x.shape for x in layers)
  size = min(map(ahead.num_bytes, layers))
  for name in (body, program.entry):
    assert program.copies(name, size) == []


def test_tensor_parallel_decoding_gathers_no_kernel():
  """Over four devices: what moves is of the size of activations."""
  code = """
from spec_stream import StreamDraft, TreeSpec, ahead, hlo, one_pass, weights
from spec_stream.models.config import ModelConfig, StreamConfig
streams = StreamConfig(2, 1, mode="lossless", lora_rank=8)
model = ModelConfig(vocab_size=64, width=256, num_layers=2, num_heads=8,
  num_kv_heads=4, head_dim=32, ffw_dim=512, streams=streams)
mesh = ahead.make_mesh("cpu", (1, 1, 4))
kernels = [x.size * 4 for path, x in weights.shapes(model).items()
  if path.endswith("kernel")]
drafter = StreamDraft(TreeSpec("best_first", 4))
for most in 12, 11:  # one pass, two
  one_pass.most_rows = lambda *_: most
  _, loop, *_ = ahead.decoding(model, drafter, mesh, slots=96, prompt=32)
  program = hlo.Program(loop.as_text())
  found = [size for inside in program.computations.values()
    for i in inside.values() for _, _, size in hlo.collective(i)]
  print(len(found), max(found), min(kernels))
"""
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", code], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  one, two = (map(int, line.split()) for line in done.stdout.splitlines())
  for count, largest, kernel in (one, two):
    assert count and largest < kernel / 4


@pytest.mark.parametrize(
  "text", ["v5e", "v5e:", "v5e:4", "v7:2x2", "tpu:v5e:2x2"]
)
def test_topologies_that_are_none(text):
  assert compile_check.chip("v5e:4x4") == roofline.CHIPS["v5e"]
  with pytest.raises(UserError, match="use KIND:TOPOLOGY such as v5e:4x4"):
    compile_check.chip(text)


@pytest.mark.slow
def test_published_shapes_have_their_number_of_weights():
  expected = dict(llama2_7b=6_738_415_616, llama3_8b=8_030_261_248)
  expected["llama2_70b"] = 68_976_648_192
  for name, count in expected.items():
    model = ModelConfig(
      **compile_check.SHAPES[name], streams=StreamConfig(0, 1)
    )
    found = sum(x.size for x in weights.shapes(model).values())
    assert found == count, name


def row(**changes):
  memory = {"arguments": 9e9, "temporaries": 8e9, "total": 17e9}
  found = {
    "program": "train 8 x 64",
    "num_streams": 3,
    "fits": True,
    "memory": memory,
    "chip_memory": 16 * 2**30,
    "flops": 2e12,
    "bytes": 3e9,
    "collectives": {"all-gather": [3, 5e6]},
    "host_transfers": 0,
    "cache_copies": 0,
    "roofline_ms": 4.0,
    "bound": "memory",
  }
  return {**found, **changes}


def test_a_program_that_cannot_be_read_has_its_memory_all_the_same():
  compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()

  class Unread:
    memory_analysis = compiled.memory_analysis

    def as_text(self):
      raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK\n failure")

  place = ahead.make_mesh("cpu")
  chip = roofline.CHIPS["v6e"]
  known = compile_check._account(compiled, 1024, place, chip)
  found = compile_check._account(Unread(), 1024, place, chip)
  assert found.pop("unread") == "INTERNAL: RET_CHECK failure"
  assert found.items() <= known.items() and "bytes" in known
  about = {"program": "train 1 x 8", "num_streams": 0}
  last = compile_check.render([about | found]).splitlines()[1].split()
  assert last[-9:] == ["yes", "0.0", "1.00", *"-" * 6]


def test_the_table_and_the_advice():
  rows = [row(num_streams=0), row(flops=3e12)]
  lines = compile_check.render(rows).splitlines()
  assert lines[0].split()[:2] == ["program", "J"]
  assert (
    lines[2].split()[4:]
    == (
      "3 9.00 8.00 17.00 17.2 yes 3,000.0 1.50 3.00 1.00 3, 5 MB 0, 0 4.00 "
      "memory"
    ).split()
  )
  chip = roofline.CHIPS["v5e"]
  large = row(memory={"arguments": 9e9, "temporaries": 9e9, "total": 18e9})
  words = compile_check._advice(large, chip, "set train.remat=True")
  assert words == (
    "train 8 x 64, J=3: 18.0 GB a chip of 17.2 (9.0 of weights and state, 9.0 "
    "of temporaries); set train.remat=True"
  )
  error = RuntimeError(
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 20.1G of 15.75G hbm. Exceeded by"
  )
  found = compile_check._too_large(error, chip, "lower --batch")
  assert not found["fits"]
  assert found["advice"] == (
    "the compiler used 20.1G of 15.75G a chip; lower --batch"
  )
  error = RuntimeError(
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
    "the total memory required for HLO temporaries (33.92G) exceeds available "
    "HBM (15.75G). HLO module: jit__prefill."
  )
  found = compile_check._too_large(error, chip, "lower --batch")
  assert found["advice"].startswith("the compiler used 33.92G of 15.75G a chip")
  with pytest.raises(RuntimeError, match="a bug"):
    compile_check._too_large(RuntimeError("a bug"), chip, "")


def call(*args):
  done = subprocess.run(
    [sys.executable, "launch/compile.py", *args],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_mistakes_are_one_line():
  for args, words in {
    ("--topology=v9:2x2",): "KIND one of v4",
    ("--topology=v5e:2x2", "--shape=gpt"): "--shape=gpt: use one of llama2_7b",
    ("--topology=v5e:2x2", "--programs=run"): "--programs: use train, decode",
  }.items():
    code, out, err = call("--config=configs/e2e_nlg.py", *args)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("error: ") and words in err


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)
def test_a_slice_that_is_not_here(tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")  # libtpu does not know those for a CPU
  args = ("--config=configs/e2e_nlg.py", "--topology=v5e:2x2")
  code, _, err = call(*args, "--config.mesh.fsdp=3")
  assert code == 1 and "does not fit 4 device" in err
  code, out, _ = call(
    *args,
    "--config.mesh.fsdp=4",
    "--config.mesh.data=1",
    "--programs=decode",
    f"--out={tmp_path / 'rows.jsonl'}",
  )
  assert code == 0 and "decode 1 x 2048, 16 nodes" in out
  assert (tmp_path / "rows.jsonl").read_text().count('"fits": true') == 1
