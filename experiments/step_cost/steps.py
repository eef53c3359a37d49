"""What a verify step costs, in plain steps, and how near both are to the limit.

  python experiments/step_cost/steps.py [--shape=86m] [--nodes=4,8,16]
    [--lengths=100] [--batch=1] [--kept=0] [--one_pass_rows=N] [--xla]
    [--attention=kernel|dense] [--stages] [--out=F.jsonl]

A model of random weights decodes random prompts, plainly and with drafts, in
turns within one process (`spec_stream.bench`): what a step costs does not
depend on what it finds. Beside each step's time the bytes that it must move
(weights, cache), the FLOPs of its products, and the share reached of
what this device reads and multiplies, measured in turns with the steps.
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from spec_stream import (
  UserError,
  bench,
  bench_rows,
  compile_check,
  limits,
  metrics,
  one_pass,
  weights,
)
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models import attention, native
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import for_decoding
from spec_stream.tree import TreeSpec

_STREAMS = StreamConfig(
  num_streams=3, num_stream_layers=2, main_attends_streams=False
)


def _llama(shape: str = "llama2_7b", **changes) -> ModelConfig:
  """A shape of `compile_check` in bfloat16, with streams in four layers."""
  return ModelConfig(
    **{**compile_check.SHAPES[shape], **changes},
    dtype="bfloat16",
    param_dtype="bfloat16",
    streams=dataclasses.replace(_STREAMS, num_stream_layers=4),
  )


_86M = ModelConfig(
  vocab_size=16384,
  width=768,
  num_layers=12,
  num_heads=12,
  num_kv_heads=4,
  head_dim=64,
  ffw_dim=2048,
  streams=_STREAMS,
)
_18M = dataclasses.replace(
  _86M, vocab_size=8192, width=320, num_heads=4, num_kv_heads=2, ffw_dim=1024
)
SHAPES = {
  "18m": _18M,
  "18m_lossless": dataclasses.replace(
    _18M, streams=StreamConfig(5, 4, mode="lossless", lora_rank=32)
  ),
  "86m": _86M,
  "1b": _llama(
    width=2048, num_layers=24, num_heads=16, num_kv_heads=16, ffw_dim=5504
  ),
  "7b": _llama(),
  "8b": _llama("llama3_8b"),  # heads in groups of four
  "tiny": ModelConfig(
    vocab_size=64,
    width=32,
    num_layers=3,
    num_heads=4,
    head_dim=8,
    ffw_dim=64,
    streams=_STREAMS,
  ),
}


ATTENTION = dict(
  default="",
  choices=("kernel", "dense"),
  help="how the cache is read, if not as attention.KERNEL_ON says",
)


def choose_attention(way: str):
  """For models that are made ready after this; way: of `ATTENTION`."""
  if way == "dense":
    attention.KERNEL_ON = ()
  elif way == "kernel":
    attention.KERNEL_ON = tuple(attention.KERNELS)


def attention_way() -> str:
  """For a row: how models on one device read their caches."""
  found = attention.kernels_on(jax.devices()[:1])
  there = found and ("cpu" not in found or native.is_ready())
  return "kernel" if there else "dense"


def random_model(config: ModelConfig):
  """Weights of random values, made shape by shape: of `weights.init` as one
  program a GPU's compiler makes a minute and a half at 7B."""
  normal = jax.jit(
    lambda seed, shape, dtype: (
      0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)
    ),
    static_argnums=(1, 2),
  )
  made = {
    path: normal(seed, x.shape, x.dtype)
    if len(x.shape) > 1
    else jnp.full(x.shape, path.endswith("scale"), x.dtype)
    for seed, (path, x) in enumerate(weights.shapes(config).items())
  }
  return weights.to_model(config, made)


def measure(model, prompts, drafters, settings, with_stages) -> list[dict]:
  """Rows of `bench`, with what `limits` knows of a step."""
  model = for_decoding(model)  # once, not for each method
  methods = bench.plan(model.config, drafters)
  meter = limits.Meter(model.config.dtype)
  results = bench.measure(
    model, prompts, methods, settings, on_batch=meter.sample
  )
  about = {"dataset": "random", "device": jax.devices()[0].device_kind}
  rows = bench_rows.rows(model, prompts, results, settings, about)
  rates = meter.rates()
  limits.add(rows, results, model, prompts, settings, rates, with_stages)
  return rows


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="86m", choices=SHAPES)
  parser.add_argument("--nodes", default="4,8,16", help="of the drafts")
  parser.add_argument("--kept", default="0", help="nodes kept by the pruner")
  parser.add_argument("--lengths", default="100", help="of the prompts")
  parser.add_argument("--batch", type=int, default=1)
  parser.add_argument(
    "--one_pass_rows", type=int, help="of one_pass.most_rows, if not its own"
  )
  parser.add_argument(
    "--xla",
    action="store_true",
    help="XLA's products and attention on a CPU, not this library's kernels",
  )
  parser.add_argument("--attention", **ATTENTION)
  parser.add_argument("--new", type=int, default=48, help="tokens to decode")
  parser.add_argument("--prompts", type=int, default=5)
  parser.add_argument(
    "--stages", action="store_true", help="where the time goes, by named scopes"
  )
  parser.add_argument("--out", default="", help=".jsonl file to add rows to")
  args = parser.parse_args(argv)
  if args.one_pass_rows is not None:
    one_pass.most_rows = lambda *_: args.one_pass_rows
  choose_attention(args.attention)
  if args.xla:
    native.is_ready = lambda: False
  numbers = lambda text: [int(x) for x in text.split(",")]
  config = SHAPES[args.shape]
  model = random_model(config)
  drafters = [
    StreamDraft(TreeSpec("best_first", nodes), prune=Prune(kept))
    for nodes in numbers(args.nodes)
    for kept in numbers(args.kept)
    if kept < nodes
  ]
  settings = bench.Settings(
    batch=args.batch,
    max_new_tokens=args.new,
    grow=not args.stages,  # whose time is that of one program
  )
  rows = []
  rng = np.random.default_rng(0)
  for length in numbers(args.lengths):
    size = (args.prompts * args.batch, length)
    prompts = rng.integers(1, config.vocab_size, size).tolist()
    found = measure(model, prompts, drafters, settings, args.stages)
    about = {"shape": args.shape, "attention": attention_way()}
    found = [row | about for row in found]
    if args.out:
      metrics.append_jsonl(args.out, found)
    rows += found
  print(limits.render(rows))
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f"error: {error}")
