"""Finds a fixed tree for streams or Medusa's heads, from a run's own outputs.

  launch/calibrate.py --workdir=runs/medusa --tree_nodes=16 --out=tree.json
  launch/benchmark.py --workdir=runs/medusa --tree=tree.json

Counts on prompts of the validation split how often each candidate of each head
came true, and writes the list of paths that are most often right.
"""

import json
import pathlib

from absl import flags

import common
from spec_stream.drafters import registry

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_DRAFTER = flags.DEFINE_string(
  "drafter", "", "streams or medusa; empty: what the run was trained with."
)
_TREE_NODES = flags.DEFINE_integer("tree_nodes", 16, "Nodes, root included.")
_PROMPTS = flags.DEFINE_integer(
  "prompts", 64, "How many prompts of the split, chosen at random; 0: all."
)
_SPLIT = flags.DEFINE_string(
  "split", "validation", "Split of the prompts: validation or train."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Most tokens to decode for a prompt."
)
_OUT = flags.DEFINE_string("out", None, "Where to write the paths (.json).")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv):
  del argv
  from spec_stream import calibrate, checkpoints, task
  from spec_stream.progress import Progress

  out = pathlib.Path(_OUT.value)
  if out.suffix != ".json" or not out.parent.is_dir():
    raise common.UserError(
      f"--out={out}: give a .json file in a directory that is there"
    )
  if _SPLIT.value == "test":
    raise common.UserError("--split=test is what is measured: use another one")
  if _TREE_NODES.value < 2:
    raise common.UserError(
      f"--tree_nodes={_TREE_NODES.value} must be 2 or more"
    )
  run = checkpoints.load_run(_WORKDIR.value)
  prompts = task.prompts(run, _SPLIT.value, _PROMPTS.value)
  accuracy = calibrate.accuracies(
    run.model,
    [p.token_ids for p in prompts],
    _DRAFTER.value or registry.default(run.model.config),
    min(_TREE_NODES.value - 1, run.model.config.vocab_size),
    max_new_tokens=_MAX_NEW_TOKENS.value,
    end_token=run.tokenizer.eos_ids,
    on_batch=Progress("prompts"),
  )
  paths, expected = calibrate.best_paths(accuracy, _TREE_NODES.value)
  out.write_text(json.dumps(paths) + "\n")
  for j, row in enumerate(accuracy, 1):
    shares = " ".join(f"{x:.1%}" for x in row[:5])
    print(f"{j} ahead: right by rank {shares}")
  print(
    f"{out}: {len(paths) + 1} nodes; {expected:.2f} tokens per call if heads "
    "were right independently of each other"
  )


if __name__ == "__main__":
  common.run(main)
