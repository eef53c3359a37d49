"""Scores a run's greedy output on its task: ROUGE, and of SQL exact match.

  launch/evaluate.py --workdir=runs/e2e [--prompts=200 --drafter=streams]

Each prompt of the split is decoded once and scored against all its references;
the best one counts. Prints the scores and two samples, and writes
<workdir>/quality.json.
"""

import pathlib

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
  "Who drafts: none, or streams (the same text, but for ties).",
)
_TREE_NODES = flags.DEFINE_integer(
  "tree_nodes", 0, "Nodes of a draft, root included; 0: the shape's own."
)
_BATCH = flags.DEFINE_integer("batch", 32, "Prompts decoded at once.")


def main(argv):
  del argv
  from spec_stream import checkpoints, evaluate, task
  from spec_stream.progress import Progress

  drafter = drafting.make(_DRAFTER.value, _TREE_NODES.value)
  run = checkpoints.load_run(drafting.WORKDIR.value)
  chosen = task.prompts(run, _SPLIT.value, _PROMPTS.value)
  dataset = run.config["data"]["dataset"]
  evaluate.scorer(dataset)  # refuses before the decoding, not after it
  generations = evaluate.decode_all(
    run.model,
    [p.token_ids for p in chosen],
    drafter,
    batch=_BATCH.value,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    end_token=run.tokenizer.eos_ids,
    on_batch=Progress("prompts"),
  )
  outputs = [run.tokenizer.decode(g.token_ids) for g in generations]
  scores = evaluate.score(dataset, outputs, [p.references for p in chosen])
  calls = sum(g.target_calls for g in generations)
  cut = sum(g.token_ids[-1] not in run.tokenizer.eos_ids for g in generations)
  quality = {
    **scores,
    "prompts": len(chosen),
    "cut": cut,
    "tokens_per_call": sum(len(g.token_ids) for g in generations) / calls,
    "references": "best of several, per score",
    **task.about(run),
    "split": _SPLIT.value,
    "drafter": drafter.name,
    "tree": drafting.TREE.value if drafter.name == "streams" else None,
    "temperature": 0.0,
    "max_new_tokens": drafting.MAX_NEW_TOKENS.value,
  }
  for prompt, output in list(zip(chosen, outputs))[:2]:
    print(f"prompt     {prompt.text}")
    print(f"output     {output.strip()}")
    print(f"reference  {prompt.references[0].strip()}\n")
  print(
    f"{evaluate.words(scores)}; {len(chosen)} {_SPLIT.value} prompts, {cut} of "
    "them cut short by --max_new_tokens"
  )
  path = pathlib.Path(drafting.WORKDIR.value) / "quality.json"
  task.write_json(path, quality)


if __name__ == "__main__":
  common.run(main)
