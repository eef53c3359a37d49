"""Tokens per call by rule of acceptance, tree and temperature.

  python experiments/acceptance/rules.py RUN [PROMPTS]

RUN: of launch/train.py, with streams. PROMPTS: of the test split, default 256.
Prints a table: tokens per call with the ends of a 95 % bootstrap interval over
prompts. Counts alone, so that nothing depends on the machine.
"""

import sys

import numpy as np

from spec_stream import UserError, generate, load_run, task
from spec_stream.bench import Settings
from spec_stream.drafters.streams import StreamDraft
from spec_stream.tree import TreeSpec

TEMPERATURES = (0.3, 0.7, 1.0, 1.3)
TREES = {
  "chain": TreeSpec("chain"),
  "cartesian, width 2": TreeSpec("cartesian", width=2),
  "best first": None,  # of as many nodes as the cartesian one
}
RULES = ("exact", "exact, blind", "rejection", "typical")
LIMIT = 64  # new tokens


class Blind(StreamDraft):
  """Drafts what is most probable, not what is with the target's noise."""

  def guess(self, accepted, logits, level=None):
    return logits


def methods(config) -> dict[tuple[str, str], StreamDraft]:
  """{(tree, rule): drafter}; a best-first tree's shape depends on what it
  guesses, so that its drafts cannot be drawn."""
  length = config.streams.num_streams
  found = {}
  for name, spec in TREES.items():
    spec = spec or TreeSpec("best_first", 2 ** (length + 1) - 1)
    for rule in RULES:
      if spec.kind != "best_first" or rule != "rejection":
        kind = Blind if rule.endswith("blind") else StreamDraft
        drafter = kind(spec, rule=rule.split(",")[0])
        found[name, rule] = drafter.resolve(config)
  return found


def tokens_per_call(model, prompts, drafter, **options) -> tuple[float, ...]:
  """-> (the mean, the ends of its interval)."""
  made = generate(
    model, prompts, drafter, batch=min(32, len(prompts)), **options
  )
  tokens = np.array([len(g.token_ids) for g in made])
  calls = np.array([g.target_calls for g in made])
  at = np.random.default_rng(0).integers(0, len(made), (2000, len(made)))
  means = tokens[at].sum(1) / calls[at].sum(1)
  return tokens.sum() / calls.sum(), *np.percentile(means, [2.5, 97.5])


def main(argv: list[str]) -> int:
  if len(argv) not in (2, 3):
    print(__doc__, file=sys.stderr)
    return 2
  run = load_run(argv[1])
  prompts = task.prompts(run, "test", int(argv[2]) if argv[2:] else 256)
  prompts = [p.token_ids for p in prompts]
  settings = Settings(max_new_tokens=LIMIT, end_token=run.tokenizer.eos_ids)
  options = settings.options(settings.seeds(len(prompts)))
  print(
    "| tree, nodes | accept | "
    + " | ".join(map("T = {}".format, TEMPERATURES))
    + " |"
  )
  print("|---|---" + "|---" * len(TEMPERATURES) + "|")
  for (tree, rule), drafter in methods(run.model.config).items():
    cells = [
      "{:.2f} [{:.2f}, {:.2f}]".format(
        *tokens_per_call(
          run.model, prompts, drafter, **options | {"temperature": at}
        )
      )
      for at in TEMPERATURES
    ]
    words = rule + ", NOT lossless" * (rule == "typical")
    print(
      f"| {tree}, {drafter.num_nodes} | {words} | {' | '.join(cells)} |",
      flush=True,
    )
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv))
  except UserError as error:
    sys.exit(f"error: {error}")
