"""What a GPU may do otherwise than a CPU.

JAX_PLATFORMS=cuda,cpu pytest -m gpu
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from test_tree_attention import case, dense, slide

from spec_stream import (
  NoDraft,
  StreamDraft,
  TreeSpec,
  bench,
  bench_rows,
  generate,
  hlo,
  tree,
  weights,
)
from spec_stream.decode import Decoder
from spec_stream.models import attention, lora, tree_attention_gpu
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import causal_mask, for_decoding, forward

pytestmark = pytest.mark.gpu
WIDE = dict(vocab_size=96, width=128, head_dim=32, ffw_dim=256)


def make(**changes):
  config = dataclasses.replace(tiny.MODEL, **{**WIDE, **changes})
  return weights.to_model(config, weights.init(config, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_change_no_token(dtype, temperature):
  model = make(dtype=dtype)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(1, 96, n).tolist() for n in (5, 12, 7, 9)]
  trees = [
    StreamDraft(TreeSpec("best_first", 6)),
    StreamDraft(TreeSpec("cartesian", width=2), prune=Prune(4)),
  ]
  settings = bench.Settings(
    batch=2, max_new_tokens=24, temperature=temperature, seed=3
  )
  methods = bench.plan(model.config, trees)
  results = bench.measure(model, prompts, methods, settings)
  rows = bench_rows.rows(model, prompts, results, settings, {})
  assert not bench_rows.bugs(rows)
  assert all(row["recompiles"] == 0 for row in rows)


def test_logits_are_those_of_a_cpu():
  model = make()
  tokens = np.random.default_rng(1).integers(1, 96, (2, 20)).astype(np.int32)
  at = np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)

  def logits(device):
    with jax.default_device(device), jax.default_matmul_precision("highest"):
      here = for_decoding(jax.device_put(model, device))
      marks.append(here.blocks[0].ffw.down.out_first)
      mask = causal_mask(jax.device_put(np.ones_like(tokens), device))
      out = forward(here, jax.device_put(tokens, device), at, mask)
      return np.asarray(here.logits(out.main))

  marks = []
  ours, theirs = (logits(jax.devices(kind)[0]) for kind in ("gpu", "cpu"))
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  laid = lora.SMALL_ON in lora.platform_names(jax.devices("gpu")[:1])
  assert marks[0] == ("cuda" if laid else "")


SHAPES = [  # dtype, rows, groups, size, window, cap, programs
  ("float32", 12, 4, 64, 0, 0.0, 256),
  ("float32", 16, 4, 128, 0, 5.0, 8),
  ("bfloat16", 1, 1, 128, 0, 0.0, 8),  # two parts of nine blocks
  ("bfloat16", 128, 1, 128, 0, 0.0, 8),  # as many rows as there may be
  ("bfloat16", 32, 4, 128, 200, 0.0, 8),
  ("bfloat16", 12, 3, 64, 0, 0.0, 128),  # no power of two
]


@pytest.mark.parametrize(
  "dtype, rows, groups, size, window, cap, programs", SHAPES
)
def test_the_kernel_is_the_dense_form(
  dtype, rows, groups, size, window, cap, programs
):
  x = case(0, 2, 2, rows, groups, size, 1040, dtype)
  assert tree_attention_gpu.fits(rows, groups, size, 1040, dtype)
  x = slide(x, window) if window else x
  attend = functools.partial(
    tree_attention_gpu.attend, cap=cap, programs=programs
  )
  with jax.default_matmul_precision("highest"):
    found = jax.jit(lambda x: attend(**x))(x)
    exact = jax.tree.map(
      lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, x
    )
    expected = dense(**exact, window=window, cap=cap)
  atol = 0.03 if dtype == "bfloat16" else 1e-4
  np.testing.assert_allclose(np.asarray(found, "float32"), expected, atol=atol)


def test_the_kernel_changes_no_token(monkeypatch):
  model = make(dtype="float32")
  prompts = [[5, 6, 7, 8], [9, 3]]
  options = dict(max_new_tokens=24, seed=3, temperature=[0.0, 0.8])
  monkeypatch.setattr(attention, "KERNEL_ON", ())
  plain = generate(model, prompts, NoDraft(), **options)
  monkeypatch.setattr(attention, "KERNEL_ON", ("cuda",))
  assert attention.kernels_on(jax.devices()[:1]) == ("cuda",)
  draft = StreamDraft(TreeSpec("best_first", 6))
  fast = generate(model, prompts, draft, **options)
  assert [x.token_ids for x in fast] == [x.token_ids for x in plain]


def test_the_largest_of_many():
  rng = np.random.default_rng(0)
  x = np.round(4 * rng.normal(size=(3, 32000))).astype("float32")  # many alike
  values, indices = jax.jit(lambda x: tree.top(x, 31))(x)
  expected = np.argsort(-x, -1, kind="stable")[:, :31]
  np.testing.assert_array_equal(indices, expected)
  np.testing.assert_array_equal(values, np.take_along_axis(x, expected, 1))


@pytest.mark.parametrize("nodes", [1, 6])
def test_the_loop_talks_to_no_host(nodes):
  drafter = StreamDraft(TreeSpec("best_first", 6)) if nodes > 1 else NoDraft()
  decoder = Decoder(make(), drafter)
  state = decoder.start([[5, 6, 7]], max_new_tokens=9)
  text = decoder.lower(state).compile().as_text()
  assert not hlo.host_transfers(text)
