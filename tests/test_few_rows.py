"""Products of few rows on a CPU by few_rows.cc, against NumPy's and XLA's."""

import types

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

# One that is there and cannot compile it makes these fail.
compiled = pytest.mark.skipif(
  not few_rows.find_compiler(), reason="there is no C++ compiler"
)
product = jax.jit(few_rows.matmul)


def random(rows, inputs, outputs):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(rows, inputs), draw(outputs, inputs)


@compiled
@settings(max_examples=60)
@given(
  rows=st.integers(1, few_rows.MOST_OF_SMALL),
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
@pytest.mark.parametrize(
  "inputs, outputs", [(48, 7), (53, 9), (513, 4), (1100, 40), (2047, 97)]
)
def test_a_row_does_not_depend_on_the_others(inputs, outputs):
  """Not in its last bit."""
  assert few_rows.is_ready()
  x, kernel = random(24, inputs, outputs)
  together = np.asarray(product(x, kernel))
  for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 20):
    alone = product(x[-rows:], kernel)
    np.testing.assert_array_equal(alone, together[-rows:])


@compiled
def test_what_it_serves():
  rows = lambda n, dtype=jnp.float32: jnp.zeros((n, 4), dtype)
  kernel = rows(3)
  assert few_rows.serves(rows(1), kernel)
  large = jnp.zeros((2**16, 4))
  for most, kernel in (
    (few_rows.MOST_OF_SMALL, rows(3)),
    (few_rows.MOST, large),
  ):
    assert few_rows.serves(rows(most), kernel)
    assert not few_rows.serves(rows(most + 1), kernel)
  assert few_rows.serves(rows(few_rows.MOST + 1), large[1:])
  assert not few_rows.serves(rows(1, jnp.bfloat16), kernel)
  assert not few_rows.serves(rows(1), rows(3, jnp.bfloat16))


@compiled
def test_its_flops_are_counted():
  x, kernel = jnp.zeros((3, 8)), jnp.zeros((5, 8))
  product = lambda x, kernel: lora.matmul_out_first(x, kernel, None, "cpu")
  assert roofline.flops(product, x[None], kernel) == 2 * 3 * 8 * 5


@compiled
@pytest.mark.parametrize("name", in_short(("lossless", "shared, main attends")))
def test_tokens(name, monkeypatch):
  """Those of plain decoding by XLA's products; a difference is a near tie."""
  monkeypatch.setattr(few_rows, "MOST", 24)  # on whatever processor
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
    assert Decoder(laid, drafter).by_few_rows(1)
    assert not Decoder(laid, drafter).by_few_rows(4)
    assert not Decoder(here, drafter).by_few_rows(1)
    # One prompt at a time: products of 8 nodes are its, of three times 8 also.
    decoder = Decoder(laid, drafter)
    one = {k: v[:1] if np.ndim(v) else v for k, v in options.items()}
    state = decoder.start(prompts[:1], **one)
    step = decode._step.lower(
      decoder.graph, decoder.weights, decoder.drafter, state
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
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.delenv("CXX", raising=False)
  assert few_rows.find_compiler() == [] and not fresh()
  own = script(tmp_path, "exit 1")
  assert few_rows.find_compiler() == [own]
  for none in ("", "no_such_compiler"):  # the others are not asked
    monkeypatch.setenv("CXX", none)
    assert few_rows.find_compiler() == [] and not fresh()
  monkeypatch.setenv("CXX", "c++ -O1")
  assert few_rows.find_compiler() == ["c++", "-O1"]
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
  made = few_rows.compile_for([compiler], new)
  assert few_rows.compile_for([compiler], new) == made
  assert list(new.iterdir()) == [made] and calls() == 1
  # Other flags, or another processor, make another one.
  assert few_rows.compile_for([compiler, "-O1"], new) != made
  monkeypatch.setattr(few_rows, "_features", lambda: "flags: none")
  assert few_rows.compile_for([compiler], new) != made
  assert calls() == 3


@compiled
def test_where_nothing_can_be_kept(tmp_path):
  """Then it is compiled for the process alone."""
  (tmp_path / "file").write_text("")
  assert few_rows._load(few_rows.find_compiler(), tmp_path / "file" / "new")


def test_sizes_that_are_laid_out(monkeypatch):
  """An eighth of what XLA's products need, where few_rows serves."""
  eighth = jnp.zeros((256, 128))  # 128 KiB
  large = lambda x, dtype="float32": lora.is_large(x, dtype)
  for ready in (True, False):
    monkeypatch.setattr(few_rows, "is_ready", lambda ready=ready: ready)
    assert large(eighth) == ready
    assert not large(eighth, "bfloat16")
    assert not large(eighth.astype(jnp.bfloat16), "bfloat16")
    assert large(jnp.zeros((512, 1024), jnp.bfloat16), "bfloat16")
  monkeypatch.setattr(few_rows, "is_ready", None)  # and none is compiled
  assert not large(eighth[1:])


@pytest.mark.parametrize(
  "capability, count, gain",
  [("9.0", 1, True), ("8.0", 1, False), ("9.0", 2, False)],
)
def test_sizes_that_are_laid_out_on_a_gpu(capability, count, gain, monkeypatch):
  """The small ones, of one device that was measured; none for few_rows."""
  monkeypatch.setattr(few_rows, "is_ready", None)
  device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
  on = lora.platform_names(count * [device])
  for dtype in ("float32", "bfloat16"):
    small, large = (
      jnp.zeros((rows, 2**20), dtype)
      for rows in ((4, 5) if dtype == "float32" else (8, 9))
    )
    assert lora.gains(small, dtype, on) == gain
    assert not lora.gains(large, dtype, on)
