"""Does a step's cost grow with what is committed, or with the cache's slots?

  python experiments/step_cost/lengths.py [--shape=86m] [--slots=2112]
    [--lengths=100,500,1000,2000] [--nodes=8] [--attention=prefixes]
    [--out=F.jsonl]

Random prompts of each length, in a cache of `--slots` and in one as small as
the length allows, are decoded plainly and with drafts of `--nodes`, in turns
within one process: milliseconds a step, the median of the rounds, with the
prefill left out; and that over the same step's at the largest length.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np
from steps import SHAPES

from spec_stream import UserError, metrics, weights
from spec_stream.decode import Decoder
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models import attention
from spec_stream.models.transformer import for_decoding
from spec_stream.text_table import table
from spec_stream.tree import TreeSpec


def step_ms(decoder, prompt, slots: int, new: int) -> float:
  """Of one decoding, without its prefill."""
  state = decoder.start([prompt], max_new_tokens=new, slots=slots)
  jax.block_until_ready(state)
  begin = time.perf_counter()
  state = jax.block_until_ready(decoder.finish(state))
  seconds = time.perf_counter() - begin
  return 1e3 * seconds / int(state.target_calls[0] - 1)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="86m", choices=SHAPES)
  parser.add_argument("--slots", type=int, default=2112)
  parser.add_argument("--lengths", default="100,500,1000,2000")
  parser.add_argument("--nodes", type=int, default=8, help="of the drafts")
  parser.add_argument("--new", type=int, default=32, help="tokens to decode")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--attention",
    choices=attention.WAYS,
    help="how the cache is read; by default what this platform does",
  )
  parser.add_argument("--out", default="", help=".jsonl file to add rows to")
  args = parser.parse_args(argv)
  platform = jax.devices()[0].platform
  platform = {"gpu": "cuda"}.get(platform, platform)
  if args.attention:
    attention.ON[platform] = args.attention
  config = SHAPES[args.shape]
  model = weights.to_model(config, jax.jit(lambda: weights.init(config, 0))())
  model = for_decoding(model)
  methods = {
    "plain": Decoder(model, NoDraft()),
    f"{args.nodes} nodes": Decoder(
      model, StreamDraft(TreeSpec("best_first", args.nodes))
    ),
  }
  rng, prompts = np.random.default_rng(0), {}
  for length in map(int, args.lengths.split(",")):
    prompts[length] = rng.integers(1, config.vocab_size, length).tolist()
  cases = [
    (length, name, slots)
    for length in prompts
    for name in methods
    for slots in (args.slots, 0)
  ]
  times = {case: [] for case in cases}
  for _ in range(args.rounds + 1):
    for length, name, slots in cases:
      found = step_ms(methods[name], prompts[length], slots, args.new)
      times[length, name, slots].append(found)
  # The first round compiles.
  middle = {case: statistics.median(t[1:]) for case, t in times.items()}
  longest = max(prompts)
  rows = [
    {
      "shape": args.shape,
      "attention": attention.ON.get(platform, "whole"),
      "method": name,
      "length": length,
      "slots": args.slots,
      "step_ms": middle[length, name, args.slots],
      "step_ms_least_slots": middle[length, name, 0],
      "of_longest": middle[length, name, args.slots]
      / middle[longest, name, args.slots],
    }
    for length in prompts
    for name in methods
  ]
  if args.out:
    metrics.append_jsonl(args.out, rows)
  columns = {
    "step": [row["method"] for row in rows],
    "committed": [f"{row['length']:,}" for row in rows],
    f"ms, {args.slots} slots": [f"{row['step_ms']:.1f}" for row in rows],
    "ms, least slots": [f"{row['step_ms_least_slots']:.1f}" for row in rows],
    f"to {longest}": [f"{row['of_longest']:.2f}" for row in rows],
  }
  print(table(columns, ("step",)))
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f"error: {error}")
