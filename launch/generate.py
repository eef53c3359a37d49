"""Decodes prompts with a trained run, or with a Hugging Face checkpoint.

  launch/generate.py --workdir=runs/e2e --prompt='name[The Punter]'
  launch/generate.py --workdir=runs/e2e --prompts_file=prompts.jsonl --json
  launch/generate.py --checkpoint=vicuna --chat --prompt='Why is the sky blue?'

The text is printed as it comes; --show_steps shows what each call of the model
gave. A file of prompts has one JSON object a line: "prompt" or "token_ids", or
the "turns" of a question, whose first one is the prompt; and "seed" if it
should differ from --seed.
"""

import json
import os
import sys
import time

from absl import flags

import common
import drafting

_PROMPT = flags.DEFINE_string("prompt", None, "Text of one prompt.")
_TOKEN_IDS = flags.DEFINE_string(
  "token_ids",
  None,
  "One prompt as token ids ('5 17 3'), as they are: nothing is added. Needs no "
  "tokenizer.",
)
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "A file of prompts, one JSON object a line."
)
_DRAFTER = flags.DEFINE_string(
  "drafter",
  "",
  f"Who drafts: {drafting.DRAFTERS_HELP} Empty: streams or the drafter that "
  "the run was trained with, or none.",
)
_TREE_NODES = flags.DEFINE_integer(
  "tree_nodes",
  0,
  "Nodes of a draft, root included; 0: 16 for best_first, what the shape "
  "implies for others.",
)
_STOP = flags.DEFINE_multi_string(
  "stop",
  [],
  "Text that ends an answer and is not part of it; may be given several times.",
)
_BATCH = flags.DEFINE_integer(
  "batch", 32, "Prompts decoded at once, with --json."
)
_CHAT = flags.DEFINE_bool(
  "chat", False, "Put prompts into the chat template of the tokenizer."
)
_JSON = flags.DEFINE_bool(
  "json",
  False,
  "Print one object a prompt and nothing else: text, token_ids (the new ones), "
  "target_calls, tokens_per_call, lossless.",
)
_SHOW_STEPS = flags.DEFINE_bool(
  "show_steps", False, "Give the tokens of each call a colour of their own."
)
_STATS = flags.DEFINE_bool(
  "stats", True, "End with a line of counts; --nostats prints the text alone."
)
_checkpoint = drafting.define_checkpoint()
_sampling = drafting.define_sampling()


def main(argv):
  del argv
  from spec_stream import checkpoints, requests
  from spec_stream.drafters import registry

  drafting.make(_DRAFTER.value or "streams", _TREE_NODES.value)  # checks first
  settings, source = _sampling(), _checkpoint(alone=True)
  automatic = drafting.is_automatic()
  if automatic and (source["checkpoint"] or _TREE_NODES.value):
    raise common.UserError(
      "--tree=auto goes with --workdir, where it keeps what it measures, and "
      "without --tree_nodes"
    )
  found = requests.read(
    _PROMPT.value,
    _TOKEN_IDS.value,
    _PROMPTS_FILE.value,
    settings.pop("seed"),
    _CHAT.value,
  )
  if _JSON.value and _SHOW_STEPS.value:
    raise common.UserError("--show_steps colours text: leave it or --json out")
  if automatic:  # which decodes prompts of the run's own task
    run = checkpoints.load_run(drafting.WORKDIR.value)
    model, tokenizer = run.model, run.tokenizer
  else:
    model, tokenizer = requests.load(found, drafting.WORKDIR.value, **source)
    run = checkpoints.Run(model, tokenizer, {}, 0)
  name = _DRAFTER.value or registry.default(model.config)
  if not _DRAFTER.value and _TREE_NODES.value and name == "none":
    name = "streams"  # and then it says that there are none
  own, source = drafting.own(name, run, drafting.WORKDIR.value or "")
  if automatic:
    named = {drafting.split(name)[0]: (own, source)}
    drafter = _automatic(run, named, settings, len(found))
  else:
    drafter = drafting.make(name, _TREE_NODES.value)
  settings["own"] = own
  settings["max_new_tokens"] = drafting.MAX_NEW_TOKENS.value
  settings["stop"] = _STOP.value
  settings["end_token"] = -1 if tokenizer is None else tokenizer.eos_ids
  if _JSON.value:
    for answer in requests.answers(
      model, tokenizer, found, drafter, _BATCH.value, **settings
    ):
      print(json.dumps(answer, ensure_ascii=False), flush=True)
    return
  colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
  for i, request in enumerate(found):
    if len(found) > 1:
      print(f"{'' if i == 0 else chr(10)}== {request.words()}")
    _show(model, tokenizer, request, drafter, settings, colours)


def _automatic(run, named, settings, count):
  """The drafter that --tree=auto chooses for `count` requests."""
  from spec_stream import bench

  asked = bench.Settings(
    batch=min(_BATCH.value, count) if _JSON.value else 1,
    max_new_tokens=drafting.MAX_NEW_TOKENS.value,
    **settings,
  )
  _, best = drafting.automatic(run, drafting.WORKDIR.value, named, asked)
  print(f"--tree=auto: {best}", file=sys.stderr)
  return best.drafter


def _show(model, tokenizer, request, drafter, settings, colours):
  """Prints one answer as it comes, then its counts."""
  from spec_stream import requests
  from spec_stream.rules import LOSSY

  begin = time.perf_counter()
  tokens = calls = shown = 0
  steps = requests.pieces(model, tokenizer, request, drafter, **settings)
  for text, count in steps:
    tokens, calls = tokens + count, calls + (count > 0)
    if _SHOW_STEPS.value and text:
      shown += 1  # a call may give no more than half a character
      text = _mark(text, shown, colours)
    print(text, end="", flush=True)
  print()
  if _STATS.value:
    seconds = time.perf_counter() - begin
    print(
      f"{tokens} tokens in {calls} calls, {tokens / calls:.2f} tokens per "
      f"call, {seconds:.1f} s with compilation"
      + f"; accept={drafter.rule} is NOT lossless"
      * (drafter.rule in LOSSY)
    )


def _mark(text, number, colours):
  """Text of one call in one of two colours, or in brackets without any."""
  colour = (36, 33)[number % 2]
  return f"\x1b[{colour}m{text}\x1b[0m" if colours else f"[{text}]"


if __name__ == "__main__":
  common.run(main)
