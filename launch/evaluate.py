"""Scores a run's greedy output on its task: ROUGE, and of SQL exact match.

  launch/evaluate.py --workdir=runs/e2e [--prompts=200 --drafter=streams]
  launch/evaluate.py --workdir=runs/streams --against=runs/base,runs/next_token

Each prompt of the split is decoded once and scored against all its references;
the best one counts. Prints the scores and two samples, and writes
<workdir>/quality.json. With --against it prints one table of all the runs, on
the prompts of the first one's task, and writes <workdir>/comparison.json;
speed-ups are those that launch/benchmark.py measured, or "-".
"""

import pathlib
import sys

from absl import flags

import common
import drafting

_SPLIT = flags.DEFINE_string(
  "split", "test", "Split to score: test, validation or train."
)
_PROMPTS = flags.DEFINE_integer(
  "prompts", 0, "How many prompts of the split, chosen at random; 0: all."
)
_DRAFTER = flags.DEFINE_string(
  "drafter",
  "none",
  f"Who drafts (the same text, but for ties): {drafting.DRAFTERS_HELP}",
)
_TREE_NODES = flags.DEFINE_integer(
  "tree_nodes", 0, "Nodes of a draft, root included; 0: the shape's own."
)
_AGAINST = flags.DEFINE_list(
  "against",
  None,
  "Runs to put beside this one, or Hugging Face directories; each decodes "
  "plainly, and by its streams if it has any.",
)
_BATCH = flags.DEFINE_integer("batch", 32, "Prompts decoded at once.")
flags.mark_flag_as_required("workdir")


def main(argv):
  del argv
  if drafting.TREE.value == "auto":
    raise common.UserError(
      "--tree=auto is of generate.py and benchmark.py: name a tree here"
    )
  if _AGAINST.value:
    return _compare()
  from spec_stream import bench_rows, checkpoints, evaluate, task
  from spec_stream.progress import Progress

  drafter = drafting.make(_DRAFTER.value, _TREE_NODES.value)
  run = checkpoints.load_run(drafting.WORKDIR.value)
  chosen = task.prompts(run, _SPLIT.value, _PROMPTS.value)
  dataset = run.config["data"]["dataset"]
  evaluate.scorer(dataset)  # refuses before the decoding, not after it
  own, _ = drafting.own(_DRAFTER.value, run, drafting.WORKDIR.value)
  outputs, found = evaluate.quality(
    run,
    dataset,
    chosen,
    drafter,
    own=own,
    batch=_BATCH.value,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    on_batch=Progress("prompts"),
  )
  quality = {
    **found,
    **task.about(run),
    "split": _SPLIT.value,
    "drafter": drafter.name,
    **bench_rows.tree_fields(
      drafter.resolve(run.model.config, own or run.model.drafter)
    ),
    "temperature": 0.0,
    "max_new_tokens": drafting.MAX_NEW_TOKENS.value,
  }
  for prompt, output in list(zip(chosen, outputs))[:2]:
    print(f"prompt     {prompt.text}")
    print(f"output     {output.strip()}")
    print(f"reference  {prompt.references[0].strip()}\n")
  print(
    f"{evaluate.words(found)}; {len(chosen)} {_SPLIT.value} prompts, "
    f"{found['cut']} of them cut short by --max_new_tokens"
  )
  path = pathlib.Path(drafting.WORKDIR.value) / "quality.json"
  task.write_json(path, quality)


def _compare():
  from spec_stream import compare, evaluate, task
  from spec_stream.progress import Progress

  if flags.FLAGS["drafter"].present:
    raise common.UserError(
      "--drafter goes without --against, where each run decodes both ways"
    )
  drafter = drafting.make("streams", _TREE_NODES.value)
  entries = compare.find([drafting.WORKDIR.value, *_AGAINST.value])
  for line in compare.differences(entries):
    print(f"warning: {line}", file=sys.stderr)
  run = entries[0].without_weights
  chosen = task.prompts(run, _SPLIT.value, _PROMPTS.value)
  about = task.about(run) | {"split": _SPLIT.value, "prompts": len(chosen)}
  evaluate.scorer(about["dataset"])
  rows = compare.evaluate_all(
    entries,
    chosen,
    _SPLIT.value,
    drafter,
    Progress,
    batch=_BATCH.value,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
  )
  print(compare.render(rows))
  about["max_new_tokens"] = drafting.MAX_NEW_TOKENS.value
  about["warnings"] = compare.differences(entries)
  path = pathlib.Path(drafting.WORKDIR.value) / "comparison.json"
  task.write_json(path, about | {"runs": rows})


if __name__ == "__main__":
  common.run(main)
