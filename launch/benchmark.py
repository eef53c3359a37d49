"""Times decoding with drafts against plain decoding of the same weights.

  launch/benchmark.py --workdir=runs/e2e --drafters=none,streams \\
    --tree_nodes=4,8,16 [--prompts=64 --batch=1 --repeats=1 --roofline]
  launch/benchmark.py --workdir=runs/base \\
    --drafters=prompt_lookup,medusa=runs/medusa,eagle=runs/eagle
  launch/benchmark.py --checkpoint=vicuna --workdir=runs/vicuna_speed \\
    --questions=question.jsonl --chat --turns=2

With --checkpoint, --workdir is where the results go, and no run.
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
  "drafters",
  None,
  f"Methods to measure: {drafting.DRAFTERS_HELP} Empty: none, and streams or "
  "the drafter that the run was trained with.",
)
_TREE_NODES = flags.DEFINE_list(
  "tree_nodes",
  "0",
  "Nodes of the drafts, root included, one row each; 0: 16 for best_first, "
  "what the shape implies for others.",
)
_BATCH = flags.DEFINE_integer("batch", 1, "Prompts decoded at once.")
_REFILL = flags.DEFINE_bool(
  "refill",
  False,
  "A row that is done goes on with the next prompt, in one compiled loop: "
  "throughput over all prompts, prefills included. Intervals are then over "
  "--repeats.",
)
_PROMPTS = flags.DEFINE_integer(
  "prompts", 64, "How many prompts or questions, chosen at random; 0: all."
)
_SPLIT = flags.DEFINE_string(
  "split", "test", "Split of the prompts: test, validation or train."
)
_QUESTIONS = flags.DEFINE_string(
  "questions",
  "",
  "Prompts from a file of questions, in the form of MT-bench and Spec-Bench "
  "(.jsonl or .jsonl.gz), in place of the run's own task.",
)
_CHAT = flags.DEFINE_bool(
  "chat", False, "Put questions into the chat template of the tokenizer."
)
_TURNS = flags.DEFINE_integer(
  "turns",
  1,
  "Turns of a question to answer, 1 or 2. The second is asked after plain "
  "decoding's own greedy answer to the first.",
)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Times that all is measured.")
_EXPLAIN = flags.DEFINE_bool(
  "explain_differences",
  False,
  "For each prompt whose tokens are not those of plain decoding: where they "
  "part, both tokens, how close they are, and what plain decoding itself gives "
  "there through matrices of other shapes. Writes <workdir>/differences.jsonl.",
)
_ROOFLINE = flags.DEFINE_bool(
  "roofline",
  False,
  "Hold each step against what it must read and multiply, at the rates that "
  "this device is measured at, and say where its time goes (from a profile of "
  "one batch more).",
)
_checkpoint = drafting.define_checkpoint()
_sampling = drafting.define_sampling()
flags.mark_flag_as_required("workdir")


def main(argv):
  import jax

  from spec_stream import (
    bench,
    bench_rows,
    explain,
    limits,
    metrics,
    rivals,
    task,
    text_table,
    trace,
  )
  from spec_stream.drafters import registry
  from spec_stream.progress import Progress

  if _ROOFLINE.value:  # a kept program must have this code's scopes
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
  drafters, asked = drafting.make_all(_DRAFTERS.value or [], _TREE_NODES.value)
  settings = bench.Settings(
    batch=_BATCH.value,
    refill=_REFILL.value,
    repeats=_REPEATS.value,
    grow=not _ROOFLINE.value,  # steps and their stages of one program
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    **_sampling(),
  )
  if _QUESTIONS.value and flags.FLAGS["split"].present:
    raise common.UserError(
      "--split is of a run's task: leave it or --questions"
    )
  if _ROOFLINE.value and settings.refill:
    raise common.UserError(
      "--roofline is of steps, which --refill does not time apart: leave one"
    )
  source, automatic = _checkpoint(), drafting.is_automatic()
  if automatic and source["checkpoint"]:
    raise common.UserError(
      "--tree=auto calibrates on a run's own task: a checkpoint has none"
    )
  if automatic and _SPLIT.value == "validation":
    raise common.UserError(
      "--tree=auto calibrates on --split=validation: measure on another one"
    )
  workdir = pathlib.Path(drafting.WORKDIR.value)
  task.check_output(workdir, source["checkpoint"], _QUESTIONS.value)
  run = drafting.load_run(source)
  settings = dataclasses.replace(settings, end_token=run.tokenizer.eos_ids)
  if not _DRAFTERS.value:
    name = registry.default(run.model.config)
    drafters, asked = drafting.make_all([name], _TREE_NODES.value)
  own = rivals.load_all(asked, run, workdir)
  if automatic and not flags.FLAGS["tree_nodes"].present:
    drafters = []  # the automatic one alone
  methods = bench.plan(run.model.config, drafters, own)
  costs = None
  if automatic:
    named = {name: own.get(name, (None, "")) for name in asked}
    costs, best = drafting.automatic(run, workdir, named, settings)
    print(f"--tree=auto: {best}", file=sys.stderr)
    own_weights, place = named.get(best.drafter.name, (None, ""))
    methods.append(
      bench.Method(
        f"{best.drafter.name} (auto)",
        best.drafter,
        own=own_weights,
        source=place,
      )
    )
  about, chosen = task.choose(
    run,
    _SPLIT.value,
    _PROMPTS.value,
    _QUESTIONS.value,
    _TURNS.value,
    _CHAT.value,
    settings.max_new_tokens,
  )
  prompts = [p.token_ids for p in chosen]
  meter = limits.Meter(run.model.config.dtype) if _ROOFLINE.value else None
  progress = Progress("measure")

  def on_batch(done, total):
    progress(done, total)
    if meter:
      meter.sample()

  results = bench.measure(
    run.model,
    prompts,
    methods,
    settings,
    on_warm_up=Progress("compile and warm up"),
    on_batch=on_batch,
  )
  words = [f"launch/{pathlib.Path(argv[0]).name}", *sys.argv[1:]]
  about["command"] = " ".join(words)
  rows = bench_rows.rows(run.model, prompts, results, settings, about)
  if costs and not settings.refill:  # predictions leave prefills out
    for row, result in zip(rows, results, strict=True):
      row |= costs.fields(result.drafter)
  try:
    if meter:
      rates = meter.rates()
      limits.add(rows, results, run.model, prompts, settings, rates)
  finally:  # what was measured is not lost
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.append_jsonl(workdir / "results.jsonl", rows)
  print(text_table.render(rows))
  if _ROOFLINE.value:
    print(limits.render(rows))
  if _QUESTIONS.value and (drafters or automatic):
    print(text_table.by_category(results, [p.category for p in chosen]))
  print(bench_rows.note(rows))
  if _EXPLAIN.value:
    found = explain.differences(run.model, prompts, results, settings)
    metrics.write_jsonl(workdir / "differences.jsonl", found)
    print(explain.render(found, run.tokenizer))
  shown = trace.of_largest(run, chosen, results, settings)
  if shown:  # something drafted
    task.write_json(workdir / "trace.json", shown)
  wrong = bench_rows.bugs(rows)
  for line in wrong:
    print(f"BUG: {line}", file=sys.stderr)
  return 1 if wrong else 0


if __name__ == "__main__":
  common.run(main)
