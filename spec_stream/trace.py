"""One prompt, call by call, as a report draws it (trace.json)."""

import dataclasses
import math
from collections.abc import Sequence

from spec_stream.bench import Measured, Settings
from spec_stream.checkpoints import Run
from spec_stream.decode import stream
from spec_stream.detokenize import token_text
from spec_stream.drafters.base import Drafter
from spec_stream.models.transformer import Transformer
from spec_stream.rules import LOSSY
from spec_stream.task import Prompt


def of_largest(
  run: Run,
  prompts: Sequence[Prompt],
  results: Sequence[Measured],
  settings: Settings,
) -> dict | None:
  """`record` of the largest tree that was measured, on a prompt whose output
  has the median length; None where nothing drafted."""
  result = max(results, key=lambda r: r.drafter.num_nodes)
  if result.drafter.num_nodes == 1:
    return None
  length = lambda i: len(result.generations[i].token_ids)
  which = sorted(range(len(prompts)), key=length)[len(prompts) // 2]
  seed = int(settings.seeds(len(prompts))[which])
  settings = dataclasses.replace(settings, seed=seed)
  prompt = prompts[which]
  drafter, own = result.drafter, result.method.own
  return record(run.model, run.tokenizer, prompt, drafter, settings, own)


def record(
  model: Transformer,
  tokenizer,
  prompt: Prompt,
  drafter: Drafter,
  settings: Settings,
  own=None,
) -> dict:
  """Decodes one prompt and keeps each draft and what was accepted of it."""
  tokens, steps = [], []
  text = lambda token: token_text(tokenizer, int(token))
  options = settings.options(settings.seed)
  for step in stream(model, prompt.token_ids, drafter, own, **options):
    tokens += step.token_ids
    if step.tree is None:
      continue  # prefill verifies no draft
    # An accepted node whose token was cut (end token, limit) is not shown so.
    accepted = set(step.path[: len(step.token_ids) + 1])
    nodes = [
      {
        "text": text(token) if token >= 0 else "",
        "parent": int(parent),
        "depth": int(depth),
        "log_prob": float(log_prob) if math.isfinite(log_prob) else None,
        "accepted": i in accepted,
      }
      for i, (token, parent, depth, log_prob) in enumerate(
        zip(
          step.tree.tokens,
          step.tree.parents,
          step.tree.depth,
          step.tree.log_prob,
        )
      )
    ]
    steps.append(
      {
        "root": nodes[0]["text"],
        "nodes": nodes,
        "emitted": [text(token) for token in step.token_ids],
      }
    )
  return {
    "prompt": prompt.text,
    "text": tokenizer.decode(tokens),
    "method": drafter.name,
    "accept": drafter.rule,
    "lossless": drafter.rule not in LOSSY,
    "tree": drafter.tree.kind if hasattr(drafter, "tree") else "none",
    "steps": steps,
  }
