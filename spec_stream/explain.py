"""Why tokens differ from those of plain decoding, prompt by prompt.

In exact arithmetic they never do. Where numbers are rounded, matrices of
another shape round otherwise, and a draft gives the target another shape. So
plain decoding itself is asked again, through other shapes: in a larger batch,
and beside dead nodes, as many as the draft has. Where it also departs from
itself, no drafter is to blame; where it never does and the margin is wide, one
is.
"""

import math
from collections import Counter
from collections.abc import Sequence

from spec_stream import bench_rows, sampling, text_table, ties
from spec_stream.bench import Measured, Settings
from spec_stream.decode import generate
from spec_stream.detokenize import token_text
from spec_stream.drafters.none import NoDraft
from spec_stream.models.transformer import Transformer


def differences(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  results: Sequence[Measured],
  settings: Settings,
) -> list[dict]:
  """One json-able dict for each prompt that a method decodes otherwise.

  Methods that promise no equal tokens are left out: they sample, and accept by
  another rule than "exact".

  method, tree_nodes, prompt; position: of the first token that differs, among
  the new ones; plain, drafted: the two tokens; margin: how far the worse is
  below the best in one pass over the whole text, whole: that pass's own;
  plain_in_batch, plain_in_tree: whether plain decoding departs from itself, up
  to there, in a batch of one more row, and beside dead nodes.
  """
  by_name = {r.method.name: r for r in results[::-1]}
  seeds = settings.seeds(len(prompts))
  draws = [
    sampling.make(1, **settings.sampling(), seed=int(seed)) for seed in seeds
  ]
  found = []
  for result in results:
    if result.method.expects is None:
      continue
    if not bench_rows.promises(result.drafter, settings):
      continue
    expected = by_name[result.method.expects]
    plain = [g.token_ids for g in expected.generations]
    drafted = [g.token_ids for g in result.generations]
    attach = result.drafter.num_streams > 0
    for d in ties.compare(model, prompts, plain, drafted, draws, attach):

      def departs(drafter, rows, d=d, plain=plain):
        again = generate(
          model,
          [prompts[d.prompt]] * rows,
          drafter,
          **settings.options(seeds[d.prompt]),
        )[0].token_ids
        at = ties.first_difference(plain[d.prompt], again)
        return at is not None and at <= d.position

      wide = NoDraft(attach, dead_nodes=result.drafter.num_nodes - 1)
      tokens = d.tokens or (None, None)
      found.append(
        {
          "method": result.method.name,
          "tree_nodes": result.drafter.num_nodes,
          "prompt": d.prompt,
          "position": d.position,
          "plain": tokens[0],
          "drafted": tokens[1],
          "margin": d.margin if math.isfinite(d.margin) else None,
          "whole": d.whole,
          "plain_in_batch": departs(NoDraft(attach), settings.batch + 1),
          "plain_in_tree": departs(wide, settings.batch),
        }
      )
  return found


def render(found: Sequence[dict], tokenizer) -> str:
  """A table and a line of counts; the words of tokens where they are known."""
  if not found:
    return "No prompt differs from plain decoding, of methods that promise so."
  word = lambda token: (
    "" if token is None else repr(token_text(tokenizer, token))
  )
  yes = lambda x: "yes" if x else "no"
  columns = {
    "method": [f"{d['method']}, {d['tree_nodes']} nodes" for d in found],
    "prompt": [str(d["prompt"]) for d in found],
    "new token": [str(d["position"]) for d in found],
    "plain": [word(d["plain"]) for d in found],
    "drafted": [word(d["drafted"]) for d in found],
    "one pass": [word(d["whole"]) for d in found],
    "margin": [
      f"{d['margin']:.1e}"
      if d["margin"] is not None
      else "one ended"
      if d["plain"] is None
      else "excluded"  # one of the two by a filter
      for d in found
    ],
    "plain departs in a batch": [yes(d["plain_in_batch"]) for d in found],
    "in a tree": [yes(d["plain_in_tree"]) for d in found],
  }
  left = ("method", "plain", "drafted", "one pass")
  own = Counter(d["plain_in_batch"] or d["plain_in_tree"] for d in found)[True]
  return "\n".join(
    [
      text_table.table(columns, left),
      f"In {own} of {len(found)} plain decoding departs from itself as well, "
      "through matrices of other shapes.",
    ]
  )
