"""A Hugging Face checkpoint, from its directory to a tuned run and back."""

import dataclasses
import json
import pathlib
import shutil

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from spec_stream import checkpoints, export, sharding, storage, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint
from spec_stream.hf import config as hf_config
from spec_stream.models import quant
from spec_stream.models.config import StreamConfig
from spec_stream.train import fit, start
from spec_stream.train.config import resolve
from spec_stream.tree import TreeSpec

pytest.importorskip("torch")
pytest.importorskip("transformers")

STREAMS = StreamConfig(
  num_streams=2,
  num_stream_layers=1,
  mode="lossless",
  lora_rank=4,
  prune_rank=2,
)
TRAIN = dataclasses.replace(tiny.TRAIN, steps=8, trainable="adapters")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """-> (directory, torch model) of a checkpoint with a byte-level tokenizer."""
  import tokenizers as tk

  path = tmp_path_factory.mktemp("hf") / "checkpoint"
  model = hf_models.make("llama", path, vocab_size=320)
  core = tk.Tokenizer(tk.models.BPE())
  core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = tk.decoders.ByteLevel()
  trainer = tk.trainers.BpeTrainer(
    vocab_size=300,  # fewer than the embedding has rows, as is usual
    special_tokens=["<unk>", "<s>", "</s>"],
    initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  core.train_from_iterator((" ".join(pair) for pair in tiny.pairs()), trainer)
  core.save(str(path / "tokenizer.json"))
  names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
  (path / "tokenizer_config.json").write_text(json.dumps(names))
  return path, model


def train(workdir, source, train=TRAIN, **settings):
  """What launch/train.py does with model.checkpoint."""
  data = DataConfig(**tiny.DATA)
  train = dataclasses.replace(train, init_from=str(source))
  model = hf_config.read_config(source, streams=STREAMS, **settings)
  model = resolve(model, train)
  tokenizer = start.prepare_tokenizer(workdir, data, train)
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  return fit.fit(workdir, model, data, train, tokenizer, mesh)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp("runs") / "run")
  with pytest.MonkeyPatch.context() as patch:
    tiny.use_small_data(patch)
    assert train(workdir, source[0]) == 0
  return workdir


def test_the_base_is_the_checkpoint_and_kept_once(source, run):
  base = weights.to_weights(checkpoint.load(source[0]))
  tuned = checkpoints.load_run(run)
  values = weights.to_weights(tuned.model)
  for path, x in base.items():
    assert np.array_equal(x, values[path]), path
  added = weights.adapters(tuned.model.config)
  assert set(values) == set(base) | added
  assert any(np.any(values[p]) for p in added if p.endswith("lora_b"))
  for path, steps in ((f"{run}/base", base), (f"{run}/checkpoints/8", added)):
    directory = path if path.endswith("base") else f"{path}/weights"
    assert set(storage._names(pathlib.Path(directory))) == set(steps)
  assert tuned.tokenizer.eos_ids == (2,)
  assert tuned.tokenizer.decode(tuned.tokenizer.encode("old red")) == "old red"


@pytest.mark.slow
def test_tokens_of_the_tuned_run_are_those_of_transformers(source, run):
  tuned = checkpoints.load_run(run)
  rng = np.random.default_rng(0)
  for count in (3, 17):
    prompt = rng.integers(3, 300, count).tolist()
    want = hf_models.greedy(source[1], prompt, 24)
    for drafter in (NoDraft(), StreamDraft(TreeSpec("best_first", 6))):
      out = generate(tuned.model, [prompt], drafter, max_new_tokens=24)
      assert out[0].token_ids == want


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(
  source, run, tmp_path, monkeypatch
):
  tiny.use_small_data(monkeypatch)
  workdir = str(tmp_path / "run")
  schedule = dataclasses.replace(TRAIN, schedule="constant")
  assert train(workdir, source[0], dataclasses.replace(schedule, steps=4)) == 0
  assert train(workdir, source[0], schedule) == 0
  once = str(tmp_path / "once")
  assert train(once, source[0], schedule) == 0
  a, b = (checkpoints.load_run(path).model for path in (workdir, once))
  a, b = weights.to_weights(a), weights.to_weights(b)
  for path, x in a.items():
    assert np.array_equal(x, b[path]), path


@pytest.mark.parametrize(
  "kind", ["int8", pytest.param("int4", marks=pytest.mark.slow)]
)
def test_a_quantised_base(source, tmp_path, monkeypatch, kind):
  pytest.importorskip("qwix")
  tiny.use_small_data(monkeypatch)
  workdir = str(tmp_path / "run")
  assert train(workdir, source[0], quantize=kind) == 0
  model = checkpoints.load_run(workdir).model
  values = weights.to_weights(model)
  path = "blocks/0/ffw/down/kernel"
  assert values[path].dtype == kind
  exact = np.asarray(weights.to_weights(checkpoint.load(source[0]))[path])
  about = quant.dequantise(values[path], values[path + "_scale"], jnp.float32)
  steps = 127 if kind == "int8" else 7
  error = np.abs(about - exact).max(0) / np.abs(exact).max(0)
  assert 0 < error.max() <= 0.51 / steps
  prompt = np.arange(5, 17).tolist()
  plain, fast = (
    generate(model, [prompt], drafter, max_new_tokens=24)[0].token_ids
    for drafter in (NoDraft(), StreamDraft(TreeSpec("best_first", 6)))
  )
  assert plain == fast
  with pytest.raises(UserError, match=f"a base in {kind}"):
    hf_config.describe(model.config)
  found = checkpoints.load_run(workdir)
  with pytest.raises(UserError, match=f"belong to a base in {kind}"):
    export.streams(found, tmp_path / "streams")
  whole = dataclasses.replace(TRAIN, trainable="all")
  with pytest.raises(UserError, match="quantize=int. is for a frozen base"):
    train(str(tmp_path / "other"), source[0], whole, quantize=kind)


def test_a_run_without_its_base_does_not_go_on(source, run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "base")
  longer = dataclasses.replace(TRAIN, steps=9)
  with pytest.raises(UserError, match="base lacks .* frozen weights"):
    train(str(tmp_path / "run"), source[0], longer)


def test_an_exported_run_goes_on_with_its_streams(source, run, tmp_path):
  tuned = checkpoints.load_run(run)
  export.merge(tuned, tmp_path / "out")
  found = start.load_base(str(tmp_path / "out"), tuned.model.config)
  want = weights.to_weights(tuned.model)
  assert found.keys() == want.keys()
  assert all(np.array_equal(found[path], x) for path, x in want.items())
  other = dataclasses.replace(STREAMS, num_streams=3)
  other = dataclasses.replace(tuned.model.config, streams=other)
  found = start.load_base(str(tmp_path / "out"), other)
  assert set(found) == set(checkpoint.base_shapes(other))  # the rest is fresh


def test_adapters_on_few_bits_are_not_dropped(monkeypatch):
  """They cannot be folded in, so another run of other streams may not begin."""
  pytest.importorskip("qwix")
  streams = StreamConfig(2, 1, lora_rank=2, prune_rank=0)
  config = dataclasses.replace(tiny.MODEL, quantize="int8", streams=streams)
  values = jax.jit(lambda: weights.init(config, 0))()
  found = checkpoints.Run(weights.to_model(config, values), None, {}, 1)
  monkeypatch.setattr(checkpoints, "load_run", lambda *_, **__: found)
  other = dataclasses.replace(streams, num_streams=1)
  other = dataclasses.replace(config, streams=other)
  with pytest.raises(UserError, match="cannot be folded into it"):
    start.load_base("run", other)
  kept = start.load_base("run", config)
  assert any(path.endswith("lora_a") for path in kept)


def test_small_dtypes_are_for_a_frozen_base(source, tmp_path):
  every = dataclasses.replace(TRAIN, trainable="all")
  for dtype in ("bfloat16", "float16"):
    with pytest.raises(UserError, match=f"weights in {dtype} would lose"):
      streams = dataclasses.replace(STREAMS, mode="shared")
      config = hf_config.read_config(
        source[0], streams=streams, param_dtype=dtype
      )
      resolve(config, every)


def test_a_float16_checkpoint(source, tmp_path):
  """Weights keep their bits on the way in and out."""
  source[1].half().save_pretrained(tmp_path / "half")
  source[1].float()
  model = checkpoint.load(tmp_path / "half")
  ours = weights.to_weights(model)
  assert {x.dtype.name for x in ours.values()} == {"float16"}
  table = source[1].get_input_embeddings().weight.detach().numpy()
  assert np.array_equal(ours["embed/table"], table.astype(np.float16))
  settings = {"model": {}, "train": {}}
  export.merge(checkpoints.Run(model, None, settings, 0), tmp_path / "out")
  again = weights.to_weights(checkpoint.load(tmp_path / "out"))
  for path, x in ours.items():
    assert again[path].dtype == x.dtype and np.array_equal(again[path], x)
  prompt = list(range(5, 20))
  want = hf_models.greedy(
    type(source[1]).from_pretrained(tmp_path / "half", dtype="float32"),
    prompt,
    8,
  )
  out = generate(model, [prompt], NoDraft(), max_new_tokens=8)
  assert out[0].token_ids == want


@pytest.mark.slow
def test_bfloat16_base_and_float32_adapters(source, tmp_path, monkeypatch):
  tiny.use_small_data(monkeypatch)
  workdir = str(tmp_path / "run")
  two = dataclasses.replace(TRAIN, steps=2, segment=32, remat=True)
  narrow = dict(dtype="bfloat16", param_dtype="bfloat16")
  assert train(workdir, source[0], two, **narrow) == 0
  model = checkpoints.load_run(workdir).model
  added = weights.adapters(model.config)
  for path, x in weights.to_weights(model).items():
    assert x.dtype == ("float32" if path in added else "bfloat16"), path
  kept = pathlib.Path(f"{workdir}/checkpoints/2/optimizer")
  with storage.ocp.StandardCheckpointer() as reader:
    found = reader.metadata(kept).item_metadata
  moments = {x.dtype.name for x in jax.tree.leaves(found) if x.shape}
  assert moments == {"float32"}


def test_a_fresh_base_leaves_no_older_one_behind(source, tmp_path):
  """A base that an abandoned run left must not enter another run."""
  values = weights.to_weights(checkpoint.load(source[0]))
  storage.write_base(tmp_path, values)
  config = hf_config.read_config(source[0])
  assert storage.read_base(tmp_path, checkpoints.abstract(config))
  storage.write_base(tmp_path, {})
  assert not storage.read_base(tmp_path, checkpoints.abstract(config))
