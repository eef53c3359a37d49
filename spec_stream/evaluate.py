"""Quality of a run's greedy output: ROUGE against the references of its task.

ROUGE-1 and ROUGE-Lsum F1 of the rouge_score package with its stemmer, in
percent, mean over prompts; of several references the best counts, per score.
Rouge-Lsum wants a sentence a line; the package's own splitter needs a download,
so sentences are split after ". " here.
"""

from collections.abc import Callable, Sequence

from spec_stream.decode import Decoder, Generation, collect
from spec_stream.drafters.base import Drafter
from spec_stream.errors import UserError
from spec_stream.models.transformer import Transformer

SCORES = ("rouge1", "rougeLsum")


def decode_all(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  drafter: Drafter,
  *,
  batch: int = 32,
  max_new_tokens: int = 128,
  end_token: int = -1,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generation]:
  """Greedy decoding of many prompts, in their order.

  Prompts of like length share a batch, and the last batch is filled up with
  repeats, so that few shapes compile. on_batch: called with (prompts done,
  prompts in all).
  """
  if batch < 1:
    raise UserError(f"batch={batch} must be 1 or more")
  decoder = Decoder(model, drafter)
  by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batch = min(batch, len(prompts))
  found = {}
  for start in range(0, len(prompts), max(batch, 1)):
    at = by_length[start : start + batch]
    filled = at + at[-1:] * (batch - len(at))
    state = decoder.start(
      [prompts[i] for i in filled],
      max_new_tokens=max_new_tokens,
      end_token=end_token,
    )
    found |= dict(zip(at, collect(decoder.finish(state)), strict=False))
    on_batch(len(found), len(prompts))
  return [found[i] for i in range(len(prompts))]


def rouge(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """Mean F1 in percent, by score; the best of each output's references."""
  from rouge_score.rouge_scorer import RougeScorer

  scorer = RougeScorer(SCORES, use_stemmer=True)
  totals = dict.fromkeys(SCORES, 0.0)
  for output, known in zip(outputs, references, strict=True):
    scores = scorer.score_multi(
      [sentences(r) for r in known], sentences(output)
    )
    for name in SCORES:
      totals[name] += 100 * scores[name].fmeasure
  return {name: total / len(outputs) for name, total in totals.items()}


def sentences(text: str) -> str:
  """One sentence a line."""
  return text.strip().replace(". ", ".\n")
