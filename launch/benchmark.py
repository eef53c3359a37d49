"""Times decoding with drafts against plain decoding of the same weights.

  launch/benchmark.py --workdir=runs/e2e --drafters=none,streams \\
    --tree_nodes=4,8,16 [--prompts=64 --batch=1 --repeats=1]

Plain decoding is always measured, twice: the row "none (A against A)" shows
the noise. Prints a table, adds one object per row to <workdir>/results.jsonl,
and writes <workdir>/trace.json: one prompt, call by call, with the largest
tree. Exit code 1 if tokens depart from plain decoding by more than a tie.
"""

import pathlib
import sys

import common
import drafting
from absl import flags

_DRAFTERS = flags.DEFINE_list(
  "drafters", "none,streams", "Methods to measure: none, streams."
)
_TREE_NODES = flags.DEFINE_list(
  "tree_nodes",
  "0",
  "Nodes of the drafts, root included, one row each; 0: 16 for best_first, "
  "what the shape implies for others.",
)
_BATCH = flags.DEFINE_integer("batch", 1, "Prompts decoded at once.")
_PROMPTS = flags.DEFINE_integer(
  "prompts", 64, "How many prompts of the split, chosen at random; 0: all."
)
_SPLIT = flags.DEFINE_string(
  "split", "test", "Split of the prompts: test, validation or train."
)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Times that all is measured.")
_sampling = drafting.define_sampling()


def main(argv):
  drafters = _make_drafters()
  from spec_stream import bench, bench_rows, checkpoints, metrics, task
  from spec_stream import text_table, trace
  from spec_stream.progress import Progress

  workdir = pathlib.Path(drafting.WORKDIR.value)
  settings = bench.Settings(
    batch=_BATCH.value,
    repeats=_REPEATS.value,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    **_sampling(),
  )
