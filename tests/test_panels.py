"""Products on a CPU by panels.cc, against NumPy's and XLA's."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiler import compiled
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_models import (
  CASES,
  as_float32,
  differences,
  in_short,
  random_model,
  random_requests,
)

from spec_stream import decode, roofline
from spec_stream.decode import Decoder, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.models import (
  four_bits,
  lora,
  native,
  panels,
  transformer,
  tree_attention_cpu,
)
from spec_stream.models.layers import Embed, FeedForward


@functools.partial(jax.jit, static_argnames="cpu")
def product(x, kernel, cpu=True):
  """x [R, I] times kernel [O, I]; cpu=False: as elsewhere, by XLA."""
  packed = panels.pack(kernel)
  if cpu:
    return panels.matmul(x, packed, len(kernel))
  return panels.by_xla(x, packed, len(kernel))


def random(rows, inputs, outputs):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(rows, inputs), draw(outputs, inputs)


@compiled
@settings(max_examples=40)
@given(
  rows=st.integers(1, 110),  # in blocks of 48
  inputs=st.integers(1, 1100),  # in pieces of 64 and 128
  outputs=st.integers(1, 80),
)
@example(rows=17, inputs=1040, outputs=33)
@example(rows=1, inputs=1, outputs=1)
@example(rows=97, inputs=256, outputs=64)
def test_product(rows, inputs, outputs):
  assert native.is_ready()
  x, kernel = random(rows, inputs, outputs)
  right = x.astype(np.float64) @ kernel.T.astype(np.float64)
  # The error of a sum of n terms of any sign grows as the root of n.
  for cpu, error in ((True, 4e-6), (False, 2e-5)):
    y, atol = product(x, kernel, cpu), error * inputs**0.5
    np.testing.assert_allclose(y, right, rtol=0, atol=atol)


@compiled
@pytest.mark.parametrize(
  "inputs, outputs, gate",
  [
    (48, 7, ""),
    (53, 9, ""),
    (513, 4, ""),
    (1100, 40, ""),
    (2047, 97, ""),
    *((300, 64, gate) for gate in panels.GATES),
  ],
)
def test_a_row_does_not_depend_on_the_others(inputs, outputs, gate):
  """Not in its last bit."""
  assert native.is_ready()
  x, kernel = random(100, inputs, outputs)
  packed = panels.pack(jnp.asarray(kernel))
  matmul = jax.jit(lambda x: panels.matmul(x, packed, outputs, gate))
  together = np.asarray(matmul(x))
  for rows in (*range(1, 14), 16, 24, 47, 48, 49, 97):
    alone = matmul(x[-rows:])
    np.testing.assert_array_equal(alone, together[-rows:])


@compiled
@settings(max_examples=8)
@given(
  gate=st.sampled_from(sorted(panels.GATES)),
  rows=st.integers(1, 60),
  inputs=st.integers(1, 300),
  pairs=st.integers(1, 4),  # of panels
)
def test_gated(gate, rows, inputs, pairs):
  """f(x W) * x V."""
  assert native.is_ready()
  x, kernel = random(rows, inputs, 2 * pairs * panels.WIDTH)
  packed = panels.pack(panels.in_turn(jnp.asarray(kernel)))
  matmul = jax.jit(panels.matmul, static_argnames=("outputs", "gate"))
  y = matmul(x, packed, outputs=len(kernel), gate=gate)
  first, second = np.split(x.astype(np.float64) @ kernel.T, 2, 1)
  # XLA's own gelu and silu, of float32.
  right = panels.GATES[gate][1](first.astype(np.float32)) * second
  atol = 4e-6 * inputs**0.5 * (1 + np.abs([first, second]).max())
  np.testing.assert_allclose(y, right, rtol=1e-6, atol=atol)
  elsewhere = panels.by_xla(x, packed, len(kernel), gate)
  np.testing.assert_allclose(elsewhere, right, rtol=1e-5, atol=5 * atol)


@compiled
@pytest.mark.parametrize("gate", panels.GATES)
def test_activations(gate):
  """Over all of float32; e^x is 0 below -87, and has x's error times x."""
  assert native.is_ready()
  rng = np.random.default_rng(0)
  x = np.concatenate(
    [np.linspace(-110, 110, 4001), 10 ** rng.uniform(-38, 38, 500)]
  ).astype(np.float32)
  x = np.concatenate([x, -x, np.float32([0, np.inf, np.nan])])[:, None]
  kernel = np.zeros((32, 1), np.float32)
  kernel[0], kernel[16] = 1, 1  # output 0 is f(x) x
  y = panels.matmul(x, panels.pack(panels.in_turn(kernel)), 32, gate)[:, 0]
  with np.errstate(all="ignore"):
    z = x[:, 0].astype(np.float64)
    inner = {"silu": z, "gelu_tanh": 1.5957691216 * (z + 0.044715 * z**3)}[gate]
    right = (z / (1 + np.exp(-inner)) * z).astype(np.float32)
  np.testing.assert_allclose(y, right, rtol=1e-5, atol=2e-34)


@compiled
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_feed_forward(activation, monkeypatch):
  """Laid out it is what it was, its copy in 4 bits nearly; no kernel with what
  is added to its outputs is gated by `panels`."""
  assert native.is_ready()
  monkeypatch.setattr(lora, "_LARGE", 0)
  config = dataclasses.replace(
    tiny.MODEL, activation=activation, ffw_dim=48, gated=True
  )
  ffw = FeedForward(config, lora_rank=0, rngs=nnx.Rngs(0))
  x = jnp.asarray(random(5, config.width, 1)[0])[None]
  laid = nnx.clone(ffw)
  for linear in (laid.gate_up, laid.down):
    linear.lay_out(lora.PANELS)
  assert laid.gate_up.gated == (activation in panels.GATES)
  y = ffw(x, 0)
  np.testing.assert_allclose(laid(x, 0), y, rtol=1e-5, atol=1e-6)
  for linear in (laid.gate_up, laid.down):
    linear.round_to_4_bits()
  assert np.corrcoef(np.ravel(laid(x, 0)), np.ravel(y))[0, 1] > 0.9
  for changes in (dict(ffw_bias=True), dict(ffw_dim=40)):
    other = dataclasses.replace(config, **changes)
    linear = FeedForward(other, lora_rank=0, rngs=nnx.Rngs(0)).gate_up
    linear.lay_out(lora.PANELS)
    assert not linear.gated


@compiled
def test_what_is_not_finite_stays_in_its_row_and_output():
  """Beyond the last output a panel is zeros, which make NaN of infinity."""
  assert native.is_ready()
  x, kernel = random(3, 20, 33)
  x[1, 4], kernel[32, 7] = np.inf, np.nan
  bad = ~np.isfinite(product(x, kernel))
  assert bad[1].all() and bad[:, 32].all() and bad.sum() == 33 + 2


def test_weights_are_taken_back():
  _, kernel = random(1, 5, 70)
  which = np.array([[0, 31, 32], [69, 64, 1]])
  taken = panels.take(panels.pack(jnp.asarray(kernel)), which)
  np.testing.assert_array_equal(taken, kernel[which])


@compiled
def test_its_flops_are_counted():
  x, kernel = jnp.zeros((3, 8)), jnp.zeros((5, 8))
  assert roofline.flops(product, x, kernel) == 2 * 3 * 8 * 5


@compiled
@pytest.mark.parametrize("name", in_short(("lossless", "shared, main attends")))
def test_tokens(name, monkeypatch):
  """Those of plain decoding by XLA's products; a difference is a near tie."""
  config, drafter = CASES[name]
  config, accepted = as_float32(config), 0
  config = dataclasses.replace(config, ffw_dim=32)  # of whole panels
  for seed in range(3):
    model = random_model(config, seed)
    prompts, options = random_requests(seed)
    options |= {"stop": (), "end_token": -1}
    plain = generate(model, prompts, NoDraft(), **options)
    graph, state = nnx.split(model)
    here = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    with monkeypatch.context() as patch:
      patch.setattr(lora, "_LARGE", 0)
      laid = transformer.for_decoding(here)
    assert not Decoder(here, drafter).in_panels()
    decoder = Decoder(laid, drafter)
    assert decoder.in_panels() and laid.blocks[0].ffw.gate_up.gated
    one = {k: v[:1] if np.ndim(v) else v for k, v in options.items()}
    state = decoder.start(prompts[:1], **one)
    step = decode._step.lower(
      decoder.graph, decoder.weights, decoder.drafter, state
    )
    text = step.as_text()
    # Those of a layer, and the LM head.
    assert text.count(f"@{panels.TARGET}(") > 4 * config.num_layers
    assert text.count(f"@{tree_attention_cpu.TARGET}(") >= config.num_layers
    # Copies are of streams in a pass of their own alone.
    assert (f"@{four_bits.TARGET}(" in text) == (name == "lossless")
    fast = generate(laid, prompts, drafter, **options)
    found = differences(model, prompts, plain, fast, options)
    assert all(x.margin < 1e-4 for x in found), list(map(str, found))
    accepted += sum(sum(x.accepts[1:]) for x in fast)
  assert accepted


@compiled
def test_a_tied_table():
  """Of 19 tokens, which fill no pair of panels."""
  assert native.is_ready()
  embed = Embed(tiny.MODEL, rngs=nnx.Rngs(0))
  tokens, width = jnp.array([[0, 18, -1]]), tiny.MODEL.width
  laid = nnx.clone(embed)
  laid.lay_out(lora.PANELS)
  assert laid.table.shape == (2, width, panels.WIDTH)
  np.testing.assert_array_equal(laid(tokens), embed(tokens))
  np.testing.assert_array_equal(laid(tokens)[0, 2], embed(tokens)[0, 0])
  hidden = jnp.asarray(random(4, width, 1)[0])[None]
  logits = embed.decode(hidden)
  assert logits.shape == (1, 4, tiny.MODEL.vocab_size)
  np.testing.assert_allclose(laid.decode(hidden), logits, atol=1e-5)


@compiled
@settings(max_examples=15)
@given(
  rows=st.integers(1, 60),
  inputs=st.integers(1, 1100),  # in pieces of 256 and 512
  outputs=st.integers(1, 80),
)
def test_panels_of_8_bits(rows, inputs, outputs):
  """Products with the integers themselves."""
  assert native.is_ready()
  x, kernel = random(rows, inputs, outputs)
  step = np.abs(kernel).max(1) / 127
  whole = np.round(kernel / step[:, None]).astype(np.int8)
  right = x.astype(np.float64) @ whole.T.astype(np.float64) * step
  for cpu, error in ((True, 4e-6), (False, 2e-5)):
    y, atol = product(x, whole, cpu), error * inputs**0.5
    np.testing.assert_allclose(y * step, right, rtol=0, atol=atol)
  alone = product(x[:1], whole)
  np.testing.assert_array_equal(alone, product(x, whole)[:1])


@compiled
def test_quantised_kernels_lie_in_panels_too(monkeypatch):
  pytest.importorskip("qwix")
  monkeypatch.setattr(lora, "_LARGE", 0)
  config = dataclasses.replace(tiny.MODEL, quantize="int8")
  keys = dict(lora_rank=0, quantize="int8", rngs=nnx.Rngs(0))
  linear = lora.Linear((4, 16), (3, 9), config, **keys)
  assert linear.layout("float32", ("cpu",)) == lora.PANELS
  assert linear.layout("bfloat16", ("cpu",)) == ""
  laid = nnx.clone(linear)
  laid.lay_out(lora.PANELS)
  assert laid.kernel[...].dtype == jnp.int8
  x = jnp.asarray(random(5, 64, 1)[0]).reshape(1, 5, 4, 16)
  np.testing.assert_allclose(laid(x), linear(x), rtol=1e-5, atol=1e-5)


def test_no_other_dtype():
  x, kernel = random(2, 4, 32)
  with pytest.raises(TypeError, match="bfloat16 rows, float32 panels"):
    panels.matmul(x.astype(jnp.bfloat16), panels.pack(kernel), 32)


# -- the compiler --------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
  """A cache folder of its own, and no process that has compiled before."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return native.is_ready.__wrapped__


def script(folder, text):
  path = folder / "c++"
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
  return str(path)


def test_without_a_compiler(fresh, monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.delenv("CXX", raising=False)
  assert native.find_compiler() == [] and not fresh()
  own = script(tmp_path, "exit 1")
  assert native.find_compiler() == [own]
  for none in ("", "no_such_compiler"):  # the others are not asked
    monkeypatch.setenv("CXX", none)
    assert native.find_compiler() == [] and not fresh()
  monkeypatch.setenv("CXX", "c++ -O1")
  assert native.find_compiler() == ["c++", "-O1"]
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
  "text, said",
  [
    ("(echo in file; echo 'error: no such flag') >&2; exit 1", "no such flag"),
    ("exit 3", "exit status 3"),
    ("exit 0", "No such file"),  # and wrote nothing
    ('for x; do touch "$x"; done', "too short"),  # no library
  ],
)
def test_a_compiler_that_cannot(fresh, monkeypatch, tmp_path, text, said):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("CXX", script(tmp_path, text))
  with pytest.warns(UserWarning, match=f"XLA's products.*{said}"):
    assert not fresh()


COPY = 'while [ "$1" != -o ]; do shift; done; echo "$#" >> "$0.log"; touch "$2"'


def test_it_is_compiled_once(monkeypatch, tmp_path):
  new, compiler = tmp_path / "new", script(tmp_path, COPY)
  calls = lambda: len((tmp_path / "c++.log").read_text().splitlines())
  made = native.compile_for([compiler], new)
  once = len(native._SOURCES) + 1  # and linked
  assert native.compile_for([compiler], new) == made
  assert list(new.iterdir()) == [made] and calls() == once
  # Other flags, or another processor, make another one.
  assert native.compile_for([compiler, "-O1"], new) != made
  monkeypatch.setattr(native, "_features", lambda: "flags: none")
  assert native.compile_for([compiler], new) != made
  assert calls() == 3 * once


@compiled
def test_where_nothing_can_be_kept(monkeypatch, tmp_path):
  """Then it is compiled for the process alone."""
  monkeypatch.setattr(native, "_SOURCES", [native._HERE / "four_bits.cc"])
  (tmp_path / "file").write_text("")
  assert native._load(native.find_compiler(), tmp_path / "file" / "new")


def test_sizes_that_are_laid_out(monkeypatch):
  """An eighth of what XLA's products need, where panels serve."""
  eighth = jnp.zeros((256, 128))  # 128 KiB
  layout = lambda x, dtype="float32": lora.layout(x, dtype, ("cpu", "cpu "))
  for ready in (True, False):
    monkeypatch.setattr(native, "is_ready", lambda ready=ready: ready)
    large = jnp.zeros((512, 1024), jnp.bfloat16)
    assert layout(eighth) == ("panels" if ready else "")
    assert layout(large.astype("float32")) == ("panels" if ready else "cpu")
    assert not layout(eighth, "bfloat16")
    assert not layout(eighth.astype(jnp.bfloat16), "bfloat16")
    assert layout(large, "bfloat16") == layout(large, "float32") == "cpu"
  monkeypatch.setattr(native, "is_ready", None)  # and none is compiled
  assert not layout(eighth[1:])


@pytest.mark.parametrize(
  "capability, count, laid",
  [("9.0", 1, "cuda"), ("8.0", 1, ""), ("9.0", 2, "")],
)
def test_sizes_that_are_laid_out_on_a_gpu(capability, count, laid, monkeypatch):
  """The small ones, of one device that was measured; none in panels."""
  monkeypatch.setattr(native, "is_ready", None)
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  on = lora.platform_names(count * [device])
  for dtype in ("float32", "bfloat16"):
    small, large = (
      jnp.zeros((rows, 2**20), dtype)
      for rows in ((4, 5) if dtype == "float32" else (8, 9))
    )
    assert lora.layout(small, dtype, on) == laid
    assert not lora.layout(large, dtype, on)
