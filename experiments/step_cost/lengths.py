"""Does a step's cost grow with what is committed, or with the cache's slots?

  python experiments/step_cost/lengths.py [--shape=86m] [--slots=0,2128]
    [--lengths=100,500,1000,2000] [--nodes=8] [--attention=kernel|dense]
    [--out=F.jsonl]

Random prompts of each length, with room for `--room` new tokens or as many as
the model allows, in caches of each size of `--slots` (0: what decoding gives
them at this length), are decoded plainly and with drafts of `--nodes`, in turns
within one process: milliseconds a step, the median of the rounds, with the
prefill left out; and that over the same step's at the largest length.
"""

import argparse
import statistics
import sys
import time

import jax
import numpy as np
from steps import (
  ATTENTION,
  SHAPES,
  attention_way,
  choose_attention,
  random_model,
)

from spec_stream import UserError, metrics
from spec_stream.decode import Decoder
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models.transformer import for_decoding
from spec_stream.text_table import table
from spec_stream.tree import TreeSpec


def step_ms(decoder, prompt, slots: int, new: int, room: int):
  """-> (milliseconds a step of `new` tokens, slots that each reads). Raises:
  UserError if these are not as asked for."""
  room = min(room, decoder.config.max_positions - len(prompt))
  state = decoder.start([prompt], max_new_tokens=room, slots=slots)
  state = state.replace(limit=state.limit - room + new)
  begun = state.cache.num_slots
  jax.block_until_ready(state)
  begin = time.perf_counter()
  state = jax.block_until_ready(decoder.finish(state))
  seconds = time.perf_counter() - begin
  if slots not in (0, begun) or state.cache.num_slots != begun:
    raise UserError(
      f"--slots={slots}: {len(prompt)} tokens and {new} new ones took a cache "
      f"of {begun}, then {state.cache.num_slots} slots: give a multiple of 16 "
      "that holds both, or fewer new ones"
    )
  return 1e3 * seconds / int(state.target_calls[0] - 1), begun


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--shape", default="86m", choices=SHAPES)
  parser.add_argument("--slots", default="0,2128", help="of the caches")
  parser.add_argument("--lengths", default="100,500,1000,2000")
  parser.add_argument("--nodes", type=int, default=8, help="of the drafts")
  parser.add_argument("--new", type=int, default=32, help="tokens to decode")
  parser.add_argument("--room", type=int, default=1024, help="for new tokens")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--attention", **ATTENTION)
  parser.add_argument("--out", default="", help=".jsonl file to add rows to")
  args = parser.parse_args(argv)
  if args.rounds < 1 or args.new < 2:
    raise UserError("--rounds must be 1 or more, --new 2 or more")
  choose_attention(args.attention)
  config = SHAPES[args.shape]
  model = for_decoding(random_model(config))
  methods = {
    "plain": Decoder(model, NoDraft()),
    f"{args.nodes} nodes": Decoder(
      model, StreamDraft(TreeSpec("best_first", args.nodes))
    ),
  }
  numbers = lambda text: [int(x) for x in text.split(",")]
  rng = np.random.default_rng(0)
  prompts = {
    length: rng.integers(1, config.vocab_size, length).tolist()
    for length in numbers(args.lengths)
  }
  cases = [
    (name, slots, length)
    for name in methods
    for slots in numbers(args.slots)
    for length in prompts
  ]
  times, read = {case: [] for case in cases}, {}
  for _ in range(args.rounds + 1):  # the first compiles
    for name, slots, length in cases:
      case = name, slots, length
      ms, read[case] = step_ms(
        methods[name], prompts[length], slots, args.new, args.room
      )
      times[case].append(ms)
  middle = {case: statistics.median(t[1:]) for case, t in times.items()}
  longest = max(prompts)
  rows = [
    {
      "shape": args.shape,
      "attention": attention_way(),
      "method": name,
      "slots": slots,
      "length": length,
      "read": read[name, slots, length],
      "step_ms": middle[name, slots, length],
      "to_longest": middle[name, slots, length] / middle[name, slots, longest],
    }
    for name, slots, length in cases
  ]
  if args.out:
    metrics.append_jsonl(args.out, rows)
  columns = {
    "step": [row["method"] for row in rows],
    "slots": [f"{row['slots']:,}" if row["slots"] else "" for row in rows],
    "committed": [f"{row['length']:,}" for row in rows],
    "read": [f"{row['read']:,}" for row in rows],
    "ms": [f"{row['step_ms']:.1f}" for row in rows],
    f"to {longest}": [f"{row['to_longest']:.2f}" for row in rows],
  }
  print(table(columns, ("step",)))
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f"error: {error}")
