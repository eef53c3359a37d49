"""Products of few rows on a CPU by few_rows.cc, against NumPy's and XLA's."""

import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
  row,
)

from spec_stream import decode, roofline
from spec_stream.decode import Decoder, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.models import few_rows, lora, transformer

compiled = pytest.mark.skipif(
  few_rows.find_compiler() is None, reason="there is no C++ compiler"
)
product = jax.jit(few_rows.matmul)


def random(rows, inputs, outputs):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(rows, inputs), draw(outputs, inputs)


@compiled
@settings(max_examples=60)
@given(
  rows=st.integers(1, few_rows.MOST),
  inputs=st.integers(1, 1100),  # pieces are of 512
  outputs=st.integers(1, 80),
)
@example(rows=17, inputs=1040, outputs=33)
@example(rows=1, inputs=1, outputs=1)
def test_product(rows, inputs, outputs):
  assert few_rows.is_ready()
  x, kernel = random(rows, inputs, outputs)
  right = x.astype(np.float64) @ kernel.T.astype(np.float64)
  # The error of a sum of n terms of any sign grows as the root of n.
  atol = 4e-6 * inputs**0.5
  np.testing.assert_allclose(product(x, kernel), right, rtol=0, atol=atol)


@compiled
@pytest.mark.parametrize("inputs, outputs", [(48, 7), (1100, 40), (2048, 96)])
def test_a_row_does_not_depend_on_the_others(inputs, outputs):
  """Not in its last bit."""
  assert few_rows.is_ready()
  x, kernel = random(few_rows.MOST, inputs, outputs)
  together = np.asarray(product(x, kernel))
  for rows in (1, 2, 3, 4, 5, 8, 9, 16):
    alone = product(x[-rows:], kernel)
    np.testing.assert_array_equal(alone, together[-rows:])


@compiled
def test_what_it_serves():
  rows = lambda n, dtype=jnp.float32: jnp.zeros((n, 4), dtype)
  kernel = rows(3)
  assert few_rows.serves(rows(1), kernel)
  assert few_rows.serves(rows(few_rows.MOST), kernel)
  assert not few_rows.serves(rows(few_rows.MOST + 1), kernel)
  assert not few_rows.serves(rows(1, jnp.bfloat16), kernel)
  assert not few_rows.serves(rows(1), rows(3, jnp.bfloat16))


@compiled
def test_its_flops_are_counted():
  x, kernel = jnp.zeros((3, 8)), jnp.zeros((5, 8))
  assert roofline.flops(few_rows.matmul, x, kernel) == 2 * 3 * 8 * 5
  both = lambda x, kernel: few_rows.matmul(x, kernel) + x @ kernel.T
  assert roofline.flops(both, x, kernel) == 2 * 2 * 3 * 8 * 5


@compiled
@pytest.mark.parametrize("name", in_short(("lossless", "shared, main attends")))
def test_tokens(name, monkeypatch):
  """Those of plain decoding by XLA's products; a difference is a near tie."""
  config, drafter = CASES[name]
  config, accepted = as_float32(config), 0
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
    assert transformer.uses_few_rows(laid)
    # One prompt at a time: products of 8 nodes are its, of three times 8 also.
    decoder = Decoder(laid, drafter)
    one = {k: v[:1] if np.ndim(v) else v for k, v in options.items()}
    state = decoder.start(prompts[:1], **one)
    step = decode._step.lower(
      decoder.graphdef, decoder.weights, decoder.drafter, state
    )
    calls = step.as_text().count(f"@{few_rows.TARGET}(")
    assert calls >= 4  # of a layer, at least
    fast = [
      generate(laid, prompts[i : i + 1], drafter, **row(options, i))[0]
      for i in range(len(prompts))
    ]
    found = differences(model, prompts, plain, fast, options)
    assert all(x.margin < 1e-4 for x in found), list(map(str, found))
    accepted += sum(sum(x.accepts[1:]) for x in fast)
  assert accepted


# -- the compiler --------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
  """A cache folder of its own, and no process that has compiled before."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return few_rows.is_ready.__wrapped__


def script(folder, text):
  path = folder / "c++"
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(0o755)
  return str(path)


def test_without_a_compiler(fresh, monkeypatch, tmp_path):
  monkeypatch.delenv("CXX", raising=False)
  monkeypatch.setenv("PATH", str(tmp_path))
  assert not fresh()
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
  "text, said",
  [
    ("echo no such flag >&2; exit 1", "no such flag"),
    ("exit 3", "exit 3"),
    ("exit 0", "No such file"),  # and wrote nothing
  ],
)
def test_a_compiler_that_cannot(fresh, monkeypatch, tmp_path, text, said):
  monkeypatch.setenv("CXX", script(tmp_path, text))
  with pytest.warns(UserWarning, match=f"XLA's products.*{said}"):
    assert not fresh()


def test_a_folder_that_cannot_be_written(fresh, monkeypatch, tmp_path):
  (tmp_path / "cache").write_text("a file")
  monkeypatch.setenv("CXX", script(tmp_path, "exit 0"))
  with pytest.warns(UserWarning, match="few_rows.cc"):
    assert not fresh()


@compiled
def test_it_is_compiled_once(monkeypatch, tmp_path):
  compiler, calls, run = few_rows.find_compiler(), [], subprocess.run
  count = lambda *args, **options: calls.append(args) or run(*args, **options)
  monkeypatch.setattr(subprocess, "run", count)
  made = few_rows.compile_for(compiler, tmp_path / "new")
  assert few_rows.compile_for(compiler, tmp_path / "new") == made
  assert list((tmp_path / "new").iterdir()) == [made] and len(calls) == 1
  # Another compiler, or another processor, makes another one.
  other = script(tmp_path, f'exec {compiler} "$@"')
  assert few_rows.compile_for(other, tmp_path / "new") != made
  monkeypatch.setattr(few_rows, "_features", lambda: "flags: none")
  assert few_rows.compile_for(compiler, tmp_path / "new") != made
  assert len(calls) == 3


def test_sizes_that_are_laid_out(monkeypatch):
  """An eighth of what XLA's products need, where few_rows serves."""
  eighth = jnp.zeros((256, 128))  # 128 KiB
  for ready in (True, False):
    monkeypatch.setattr(few_rows, "is_ready", lambda ready=ready: ready)
    assert lora.is_large(eighth) == ready
    assert not lora.is_large(eighth[1:])
    assert not lora.is_large(eighth.astype(jnp.bfloat16))
    assert lora.is_large(jnp.zeros((512, 1024), jnp.bfloat16))
