"""Will a model of Llama-2-7B's shape train and decode on one device of 80 GB?

  python experiments/memory/llama7b.py --out=runs/memory --target=tpu:v5p:2x2x1

Compiles, and never runs, the training step of configs/checkpoint.py (LoRA of
rank 32 and J = 3 streams in the top four layers; the base frozen, in bfloat16)
and the prefill and loop of decoding (batch 1, a tree of 32 nodes). Prints where
the bytes go and appends one JSON object a program to OUT/results.jsonl.

The weights, the optimizer and the cache are counted from their shapes; the
temporaries are the compiler's. The CPU's does much of bfloat16 in float32, so
there they are an upper estimate.
"""

import argparse
import dataclasses
import itertools
import pathlib
import re
import sys
import time

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # for configs

from configs import checkpoint  # noqa: E402
from spec_stream import StreamDraft, TreeSpec, UserError, ahead, metrics  # noqa: E402
from spec_stream.compile_check import SHAPES  # noqa: E402
from spec_stream.models.config import ModelConfig, StreamConfig  # noqa: E402
from spec_stream.text_table import table  # noqa: E402
from spec_stream.train.config import TrainConfig  # noqa: E402

DEVICE = 80e9  # bytes
LLAMA = ModelConfig(
  **SHAPES["llama2_7b"], dtype="bfloat16", param_dtype="bfloat16"
)
# Part -> paths of its weights; the first that matches.
PARTS = {
  "adapters": r".*/lora_[ab]|streams/.*|pruner/.*",
  "base: embedding and head": r"(embed|head)/.*",
  "base: attention": r"blocks/\d+/attention/.*",
  "base: feed-forward": r"blocks/\d+/ffw/.*",
  "base: norms": r".*norm/.*",
}


def configs(mode: str) -> tuple[ModelConfig, TrainConfig]:
  """Llama's shape with the streams and the training of configs/checkpoint.py.

  init_from is named, since adapters need a base; nothing is read from there.
  """
  config = checkpoint.get_config(mode)
  streams = StreamConfig(**config.model.streams)
  train = TrainConfig(**{**config.train, "init_from": "HF_DIR"})
  return dataclasses.replace(LLAMA, streams=streams), train


def weight_parts(weights: dict) -> dict[str, int]:
  """Bytes of {path: array or shape} by part."""
  parts = dict.fromkeys(PARTS, 0)
  for path, x in weights.items():
    part = next(n for n, form in PARTS.items() if re.fullmatch(form, path))
    parts[part] += ahead.num_bytes(x)
  return {name: size for name, size in parts.items() if size}


def training(mode: str, rows: int, seq_len: int, mesh) -> dict[str, dict]:
  """-> {program: parts}. Half of the positions carry streams."""
  model, train = configs(mode)
  places = seq_len // 2
  sizes = dict(rows=rows, seq_len=seq_len, stream_positions=places)
  step, state, batch, _ = ahead.train_step(model, train, mesh, **sizes)
  parts = weight_parts(state.weights)
  parts["optimizer"] = ahead.num_bytes(state.opt_state)
  parts["batch"] = ahead.num_bytes(batch)
  every = rows * (seq_len + places * model.streams.num_streams)
  within = {
    "gradients": ahead.num_bytes(state.trained),
    "block inputs kept": model.streams.num_stream_layers
    * every
    * model.width
    * 2,
    "logits of one stream": rows * places * model.vocab_size * 4,
  }
  name = f"train, {mode}, {rows} x {seq_len}"
  return {name: account(parts, within, ahead.memory(step))}


def decoding(mode: str, slots: int, nodes: int, mesh) -> dict[str, dict]:
  """-> {program: parts} of prefill (half of the slots) and loop."""
  model, _ = configs(mode)
  tree = StreamDraft(TreeSpec("best_first", nodes))
  prefill, loop, weights, state, _ = ahead.decoding(
    model, tree, mesh, slots=slots, prompt=slots // 2
  )
  parts = weight_parts(weights)
  cache = ahead.num_bytes(state.cache)
  logits = lambda rows: {"logits": rows * model.vocab_size * 4}
  first = account(parts, logits(1), ahead.memory(prefill))
  parts["cache"] = cache
  parts["state beside it"] = ahead.num_bytes(state) - cache
  within = logits(nodes)
  return {
    f"prefill, {mode}, {slots // 2} tokens": first,
    f"decode, {mode}, {slots} slots, {nodes} nodes": account(
      parts, within, ahead.memory(loop)
    ),
  }


def account(parts: dict, within: dict, memory: dict) -> dict[str, int]:
  """Bytes that add up to the compiler's total, by part.

  parts: of the arguments, from their shapes; within: what some temporaries
  must be, of which no more is known; memory: see `ahead.memory`.
  """
  parts = dict(parts)
  # XLA pads, and leaves out what a program does not read (below 0).
  parts["padding, unread"] = memory["arguments"] - sum(parts.values())
  parts["outputs not in place"] = memory["outputs"] - memory["aliased"]
  parts["temporaries"] = memory["temporaries"]
  assert sum(parts.values()) == memory["total"]
  return {**parts, **{f"  of them {k}": v for k, v in within.items()}}


def total(parts: dict[str, int]) -> int:
  """Of the parts, without what is within another."""
  return sum(x for name, x in parts.items() if not name.startswith(" "))


def render(programs: dict[str, dict]) -> str:
  """Programs across, parts down, in GB; the sum, and whether it fits."""
  names = dict.fromkeys(n for parts in programs.values() for n in parts)
  columns = {"GB": [*names, "sum", "sum in GiB", "fits 80 GB"]}
  for program, parts in programs.items():
    cells = [f"{parts[n] / 1e9:.3f}" if n in parts else "" for n in names]
    bytes_ = total(parts)
    cells += [f"{bytes_ / 1e9:.2f}", f"{bytes_ / 2**30:.2f}"]
    columns[program] = [*cells, "yes" if bytes_ <= DEVICE else "NO"]
  return table(columns, ("GB",))


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, required=True, help="for results.jsonl")
  add("--target", default="cpu", help=ahead.TARGET_HELP)
  several = dict(nargs="+", help="default: %(default)s")
  programs, modes = ["train", "decode"], ["shared", "lossless"]
  add("--programs", choices=programs, default=programs, **several)
  add("--modes", choices=modes, default=modes, **several)
  add("--rows", type=int, default=[1, 8], **several)
  add("--seq_len", type=int, default=[1024], **several)
  add("--slots", type=int, default=2048, help="of the cache, default 2048")
  add("--nodes", type=int, default=32, help="of the tree, default 32")
  args = parser.parse_args(argv)
  found = {}

  def keep(make, *settings):
    start = time.monotonic()
    programs = make(*settings, mesh)
    seconds = round(time.monotonic() - start, 1)
    for name, parts in programs.items():
      record = dict(target=args.target, jax=jax.__version__, program=name)
      record |= dict(bytes=parts, total=total(parts), compile_seconds=seconds)
      metrics.append_jsonl(args.out / "results.jsonl", [record])
      print(f"{name}: {total(parts) / 1e9:.2f} GB ({seconds} s)", flush=True)
    found.update(programs)

  try:
    mesh = ahead.make_mesh(args.target)
    args.out.mkdir(parents=True, exist_ok=True)
    for mode in args.modes:
      if "decode" in args.programs:
        keep(decoding, mode, args.slots, args.nodes)
      if "train" in args.programs:
        for sizes in itertools.product(args.rows, args.seq_len):
          keep(training, mode, *sizes)
  except (UserError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  print(f"\n{render(found)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
