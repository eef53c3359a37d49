"""Memory of a training step against streams and sequence.

  python experiments/memory/training.py --out=runs/memory

Compiles the library's own training step for a model of 28 M weights: one row a
batch, all weights trained, float32, streams on every position (the most there
can be), blocks and logits computed again in the backward pass; attention in
segments and whole. Runs nothing. One JSON object a compilation is appended to
OUT/results.jsonl; then tables of what the forward pass keeps for the backward
pass, of the compiler's temporaries, and of the growth of these.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time

import jax

from spec_stream import UserError, ahead, metrics
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.text_table import table
from spec_stream.train.config import TrainConfig
from spec_stream.train.losses import LossConfig

MODEL = ModelConfig(
  vocab_size=4096,
  width=512,
  num_layers=8,
  num_heads=8,
  num_kv_heads=8,
  head_dim=64,
  ffw_dim=1408,
  streams=StreamConfig(num_stream_layers=4),
)


def measure(
  streams: int, seq_len: int, segment: int, mesh, remat=True, model=MODEL
) -> dict[str, int]:
  """Bytes of one training step, see `ahead.memory` and `ahead.kept`."""
  model = dataclasses.replace(
    model, streams=dataclasses.replace(model.streams, num_streams=streams)
  )
  sizes = dict(rows=1, seq_len=seq_len, stream_positions=seq_len)
  memory = dict(segment=segment, remat=remat, remat_logits=remat)
  step, _, batch, _ = ahead.train_step(
    model, TrainConfig(**memory), mesh, **sizes
  )
  kept = ahead.kept(model, LossConfig(**memory), batch)
  return {"kept": kept, **ahead.memory(step)}


def growth(bytes_by_length: dict[int, int]) -> list[float]:
  """Ratio of each length's bytes to those of the length before it."""
  found = [bytes_by_length[length] for length in sorted(bytes_by_length)]
  return [new / old for old, new in itertools.pairwise(found)]


def tables(records: list[dict]) -> str:
  """A table for each segment and kind of bytes: sequence down, streams across;
  then the growth of the temporaries from one length to the next."""
  of = {(r["segment"], r["streams"], r["seq_len"]): r for r in records}
  unique = lambda name: sorted({r[name] for r in records})
  lengths, texts = unique("seq_len"), []
  for segment in unique("segment"):
    name = f"segments of {segment}" if segment else "no segments"
    for kind in ("kept", "temporaries", "total"):
      columns = {"sequence": [str(n) for n in lengths]}
      for streams in unique("streams"):
        found = [of.get((segment, streams, n)) for n in lengths]
        columns[f"J={streams}"] = [f"{r[kind] / 1e6:,.0f}" for r in found]
      texts.append(f"{name}, {kind}, MB\n{table(columns)}")
    columns = {"longer": [f"{b}/{a}" for a, b in itertools.pairwise(lengths)]}
    for streams in unique("streams"):
      sizes = {n: of[segment, streams, n]["temporaries"] for n in lengths}
      columns[f"J={streams}"] = [f"{x:.2f}" for x in growth(sizes)]
    if len(lengths) > 1:
      texts.append(f"{name}, temporaries grow by\n{table(columns)}")
  return "\n\n".join(texts)


def numbers(text: str) -> list[int]:
  return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--out", type=pathlib.Path, required=True, help="for results.jsonl")
  lists = dict(type=numbers, metavar="N,N,..")
  add("--streams", default="0,1,3,7", help="default %(default)s", **lists)
  add("--seq_len", default="512,1024,2048", help="default %(default)s", **lists)
  add("--segment", default="0,128", help="0: none; default 0,128", **lists)
  add("--no_remat", action="store_true", help="keep all, compute nothing twice")
  add("--target", default="cpu", help=ahead.TARGET_HELP)
  args = parser.parse_args(argv)
  records = []
  try:
    mesh = ahead.make_mesh(args.target)
    args.out.mkdir(parents=True, exist_ok=True)
    for segment, streams, seq_len in itertools.product(
      args.segment, args.streams, args.seq_len
    ):
      start = time.monotonic()
      record = dict(target=args.target, jax=jax.__version__, segment=segment)
      record |= dict(streams=streams, seq_len=seq_len, remat=not args.no_remat)
      record |= measure(streams, seq_len, segment, mesh, record["remat"])
      record["compile_seconds"] = round(time.monotonic() - start, 1)
      metrics.append_jsonl(args.out / "results.jsonl", [record])
      records.append(record)
      print(
        f"segment {segment}, J={streams}, sequence {seq_len}: temporaries "
        f"{record['temporaries'] / 1e6:,.0f} MB "
        f"({record['compile_seconds']} s to compile)",
        flush=True,
      )
  except (UserError, OSError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  print(f"\n{tables(records)}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
