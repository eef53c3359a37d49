"""Times decoding with drafts against plain decoding of the same weights.

  launch/benchmark.py --workdir=runs/e2e --drafters=none,streams \\
    --tree_nodes=4,8,16 [--prompts=64 --batch=1 --repeats=1]

Plain decoding is always measured, twice: the row "none (A against A)" shows
the noise. Prints a table, adds one object per row to <workdir>/results.jsonl,
and writes <workdir>/trace.json: one prompt, call by call, with the largest
tree. Exit code 1 if tokens depart from plain decoding by more than a tie.
"""

import dataclasses
import pathlib
import sys

from absl import flags

import common
import drafting

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
  from spec_stream import (
    bench,
    bench_rows,
    checkpoints,
    metrics,
    task,
    text_table,
    trace,
  )
  from spec_stream.progress import Progress

  drafters = _make_drafters()
  settings = bench.Settings(
    batch=_BATCH.value,
    repeats=_REPEATS.value,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    **_sampling(),
  )
  workdir = pathlib.Path(drafting.WORKDIR.value)
  run = checkpoints.load_run(workdir)
  settings = dataclasses.replace(settings, end_token=run.tokenizer.eos_ids)
  methods = bench.plan(run.model.config, drafters)
  chosen = task.prompts(run, _SPLIT.value, _PROMPTS.value)
  prompts = [p.token_ids for p in chosen]
  results = bench.measure(
    run.model,
    prompts,
    methods,
    settings,
    on_warm_up=Progress("compile and warm up"),
    on_batch=Progress("measure"),
  )
  about = {
    **task.about(run),
    "split": _SPLIT.value,
    "command": " ".join(
      [f"launch/{pathlib.Path(argv[0]).name}", *sys.argv[1:]]
    ),
  }
  rows = bench_rows.rows(run.model, prompts, results, settings, about)
  metrics.append_jsonl(workdir / "results.jsonl", rows)
  print(text_table.render(rows))
  print(bench_rows.note(rows))
  shown = trace.of_largest(run, chosen, results, settings)
  if shown:  # something drafted
    task.write_json(workdir / "trace.json", shown)
  wrong = bench_rows.bugs(rows)
  for line in wrong:
    print(f"BUG: {line}", file=sys.stderr)
  return 1 if wrong else 0


def _make_drafters():
  """One drafter for each method and number of nodes; plain ones once."""
  drafting.check_names(_DRAFTERS.value)
  try:
    nodes = [int(n) for n in _TREE_NODES.value]
  except ValueError:
    words = ",".join(_TREE_NODES.value)
    raise common.UserError(
      f"--tree_nodes={words}: must be whole numbers such as 4,8,16"
    ) from None
  nodes = list(dict.fromkeys(nodes)) or [0]
  names = dict.fromkeys(name for name in _DRAFTERS.value if name != "none")
  return [drafting.make(name, n) for name in names for n in nodes]


if __name__ == "__main__":
  common.run(main)
