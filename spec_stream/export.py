"""A run as a directory that others load: whole, or what was added to a base.

`merged`, a Hugging Face checkpoint:

    config.json, tokenizer files      as `transformers` wants them
    model.safetensors, or shards      adapters of shared mode folded in
    streams.json, streams.safetensors what plain decoding does not need
    README.md                         the model card

`streams`, of lossless mode: the last three, to be put beside the files of the
base, which is unchanged. LoRA alone, in PEFT's format: see `peft`.

Weights are written one after the other: beside the run's own, the host holds
one.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from spec_stream import card, checkpoints, weights
from spec_stream.checkpoints import Run
from spec_stream.data.tokenizer import SPECIALS, Tokenizer
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint, layout
from spec_stream.hf import config as hf_config
from spec_stream.hf.families import BY_TYPE
from spec_stream.hf.writing import (
  DTYPES,
  check,
  whole,
  write_json,
  write_tensors,
  write_text,
)
from spec_stream.models.config import DrafterConfig, ModelConfig
from spec_stream.models.lora import Linear
from spec_stream.models.transformer import Transformer

GB = 10**9


def merge(
  run: Run,
  out,
  *,
  workdir=None,
  dtype: str = "",
  shard_bytes: int = 5 * GB,
) -> list[str]:
  """Writes the directory `out`, which must not exist yet.

  Args:
    run: of `checkpoints.load_run`; without a tokenizer, none is written.
    out: `checkpoints.load_checkpoint(out)` then gives the weights, streams and
      tokenizer of this run with adapters of shared mode folded in, all to the
      bit.
    workdir: the run's own, for numbers measured there; None: none are known.
    dtype: float32, bfloat16 or float16, of the base weights; "": their own.
    shard_bytes: most bytes of a file, where it holds more than one weight.

  Returns: lines that the user should read.

  Raises:
    UserError: `out` exists, or the model has no Hugging Face form.
  """
  check(out)
  config = _exported(run.model.config, dtype)
  if shard_bytes <= 0:
    raise UserError("--shard_gb must be above 0")
  model_type, values = hf_config.describe(
    config, card.model_type_of(run.config)
  )
  values |= _ids(run.tokenizer, config.vocab_size)
  values |= dict.fromkeys(("dtype", "torch_dtype"), config.param_dtype)
  notes = [card.ATTENDS] if config.streams.attends else []
  if name := run.model.config.drafter.name:
    notes.append(
      f"The weights of {name} are not in the directory: they stay in the run"
    )
  use = card.merged_use(config, isinstance(run.tokenizer, Tokenizer))
  text = card.card(run, out, workdir, use, notes)
  with whole(out) as part:
    table = BY_TYPE[model_type].TABLE
    _write_weights(part, run.model, config, table, shard_bytes)
    _write_streams(part, run.model, config)
    if run.tokenizer is not None:
      _write_tokenizer(part, run.tokenizer, config)
    write_text(part / "README.md", text)
    write_json(part / "config.json", values)
  return notes


def streams(run: Run, out, *, workdir=None) -> list[str]:
  """Writes what lossless mode adds to a base, into the new directory `out`.

  Its files, beside those of the base's Hugging Face directory, make
  `checkpoints.load_checkpoint` give this run, to the bit.

  Args, Returns: as `merge`.

  Raises:
    UserError: `out` exists, or the base is not what the run began with.
  """
  check(out)
  config = run.model.config
  if not config.streams.num_streams or config.streams.mode != "lossless":
    what = f"mode {config.streams.mode}" if config.streams.num_streams else ""
    raise UserError(
      "only lossless mode leaves the base as it was; this run "
      f"({what or 'without streams'}) has other weights than its base: export "
      "it with --what=merged"
    )
  if config.quantize:
    raise UserError(
      f"these streams belong to a base in {config.quantize} (model.quantize), "
      "not to the one that a Hugging Face directory holds"
    )
  base = card.base_name(run.config) or "its base"
  use = (
    f"Put `streams.json` and `streams.safetensors` beside the files of {base} "
    "(its Hugging Face directory, or what --what=merged made of that run):\n\n"
    "    python launch/generate.py --checkpoint=THAT_DIRECTORY --prompt=...\n\n"
    "`transformers` ignores them."
  )
  text = card.card(run, out, workdir, use)
  with whole(out) as part:
    _write_streams(part, run.model, config)
    write_text(part / "README.md", text)
  return []


def _exported(config: ModelConfig, dtype: str) -> ModelConfig:
  """The model that the directory will hold."""
  dtype = dtype or config.param_dtype
  if dtype not in DTYPES:
    raise UserError(f"--dtype={dtype}: use one of {', '.join(DTYPES)}")
  streams = config.streams
  if streams.mode == "shared":
    streams = dataclasses.replace(streams, lora_rank=0)
  if not streams.num_streams:
    streams = hf_config.NO_STREAMS
  return dataclasses.replace(
    config, param_dtype=dtype, streams=streams, drafter=DrafterConfig()
  )


# -- weights -----------------------------------------------------------------


def leaf(model: Transformer, path: str) -> np.ndarray:
  """One weight on the host, adapters of shared mode folded in."""
  *parents, name = path.split("/")
  module = model
  for part in parents:
    module = module[int(part)] if part.isdigit() else getattr(module, part)
  shared = model.config.streams.mode == "shared"
  if shared and name == "kernel" and isinstance(module, Linear):
    module = nnx.clone(module)
    module.merge()
  return np.asarray(getattr(module, name)[...])


def _write_weights(part, model, config, table, shard_bytes: int):
  shards, room = [], 0
  for path, x in checkpoint.base_shapes(config).items():
    size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
    if not shards or size > room:
      shards.append({})
      room = shard_bytes
    shards[-1][path] = x
    room -= size
  index, total = {}, 0
  for number, shard in enumerate(shards, 1):
    shapes = {}
    for path, x in shard.items():
      row, layer = checkpoint.entry(table, path)
      for name, shape in zip(
        row.names(layer), layout.shapes(row, config, path, x.shape)
      ):
        shapes[name] = jax.ShapeDtypeStruct(shape, x.dtype)
      total += math.prod(x.shape) * np.dtype(x.dtype).itemsize
    file = "model.safetensors"
    if len(shards) > 1:
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    index |= dict.fromkeys(shapes, file)
    tensors = _tensors(model, config, table, shard)
    write_tensors(part / file, shapes, tensors)
  if len(shards) > 1:
    values = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(part / checkpoint.INDEX, values)


def _tensors(model, config, table, paths) -> Iterator[np.ndarray]:
  for path in paths:
    row = checkpoint.entry(table, path)[0]
    yield from layout.unpack(row, config, path, leaf(model, path))


def _write_streams(part, model, config: ModelConfig):
  """Streams, pruner and the adapters of lossless mode, by their own paths."""
  if not config.streams.num_streams:
    return
  added = weights.paths(config, *weights.ADAPTERS)
  shapes = {p: x for p, x in weights.shapes(config).items() if p in added}
  values = (leaf(model, path) for path in shapes)
  write_tensors(part / "streams.safetensors", shapes, values)
  streams = dataclasses.asdict(config.streams)
  write_json(part / "streams.json", {"format": 1, "streams": streams})


# -- tokenizer ---------------------------------------------------------------


def _ids(tokenizer, vocab_size: int) -> dict:
  """Special ids for config.json; null rather than a family's default."""
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  if tokenizer is None:
    return dict.fromkeys(names)
  ends = list(tokenizer.eos_ids)
  ends = ends[0] if len(ends) == 1 else ends or None
  pad = tokenizer.pad_id if tokenizer.pad_id < vocab_size else None
  return dict(zip(names, (tokenizer.bos_id, ends, pad), strict=True))


def _write_tokenizer(part: pathlib.Path, tokenizer, config: ModelConfig):
  if not isinstance(tokenizer, Tokenizer):
    tokenizer.save(part)
    return
  tokenizer.save(str(part / "tokenizer.json"))
  names = {f"{token[1:-1]}_token": token for token in SPECIALS}
  write_json(
    part / "tokenizer_config.json",
    {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **names,
      "clean_up_tokenization_spaces": False,
      "model_max_length": config.max_positions,
      **checkpoints.OWN_TOKENIZER,
    },
  )
