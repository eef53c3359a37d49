"""Quality of a run's greedy output: the scores of its task.

ROUGE-1 and ROUGE-Lsum F1 of the rouge_score package with its stemmer, in
percent, mean over prompts; of several references the best counts, per score.
Rouge-Lsum wants a sentence a line; the package's own splitter needs a download,
so sentences are split after ". " here. Of SQL also the share of exact matches
(`spec_stream.sql`).
"""

from collections.abc import Callable, Sequence

from spec_stream import sql
from spec_stream.checkpoints import Run
from spec_stream.decode import Decoder, Generation, collect, tokens_per_call
from spec_stream.drafters.base import Drafter
from spec_stream.errors import UserError
from spec_stream.models.transformer import Transformer
from spec_stream.task import Prompt

SCORES = ("rouge1", "rougeLsum")
ROUND = 4


def decode_all(
  model: Transformer,
  prompts: Sequence[Sequence[int]],
  drafter: Drafter,
  *,
  batch: int = 32,
  max_new_tokens: int = 128,
  end_token: int | Sequence[int] = -1,
  own=None,
  on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Generation]:
  """Greedy decoding of many prompts, in their order.

  Rows that are done go on with the next prompt, in rounds of ROUND prompts a
  row. Prompts of like length share a round, and the last one is filled up with
  repeats, so that few shapes compile. own: see `Decoder`. on_batch: called with
  (prompts done, prompts in all).
  """
  if batch < 1:
    raise UserError(f"batch={batch} must be 1 or more")
  decoder = Decoder(model, drafter, own)
  decoder.check(prompts, max_new_tokens)  # the longest is decoded last
  by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batch = min(batch, len(prompts))
  size = min(batch * ROUND, len(prompts))
  found = {}
  for start in range(0, len(prompts), max(size, 1)):
    at = by_length[start : start + size]
    filled = at + at[-1:] * (size - len(at))
    served = decoder.serve(
      [prompts[i] for i in filled],
      batch,
      max_new_tokens=max_new_tokens,
      end_token=end_token,
    )
    found |= dict(zip(at, collect(served), strict=False))
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


def sql_scores(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict:
  """Exact match, what did not parse, and ROUGE; what "exact" means beside."""
  return {
    **sql.exact_match(outputs, references),
    **rouge(outputs, references),
    "normalisation": sql.NORMALISATION,
  }


# Data set -> its scores, or why it has none.
SCORERS = {
  "restaurants": rouge,
  "e2e_nlg": rouge,
  "dialogsum": rouge,
  "conversations": rouge,
  "sql_create_context": sql_scores,
  "text_corpus": "it is running text, with no prompts to answer",
}


def scorer(dataset: str) -> Callable[[Sequence, Sequence], dict]:
  """The scores of a task, (outputs, references) -> dict; see `score`."""
  found = SCORERS.get(dataset, "it is unknown here")
  if callable(found):
    return found
  have = ", ".join(name for name, x in SCORERS.items() if callable(x))
  raise UserError(f"no quality of '{dataset}': {found}; use one of {have}")


def score(
  dataset: str, outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict:
  """Scores of texts on a task, by name; percent but for counts.

  Raises:
    UserError: a data set without references, or no outputs at all.
  """
  scores = scorer(dataset)
  if not outputs:
    raise UserError(f"no outputs of '{dataset}' to score")
  return scores(outputs, references)


def quality(
  run: Run,
  dataset: str,
  prompts: Sequence[Prompt],
  drafter: Drafter,
  **settings,
) -> tuple[list[str], dict]:
  """-> (texts, what a run's answers are worth, json-able): scores, tokens per
  call, and how many answers were cut short.

  settings: batch, max_new_tokens, own and on_batch of `decode_all`.
  """
  ends = run.tokenizer.eos_ids
  ids = [p.token_ids for p in prompts]
  made = decode_all(run.model, ids, drafter, end_token=ends, **settings)
  outputs = [run.tokenizer.decode(g.token_ids) for g in made]
  return outputs, {
    **score(dataset, outputs, [p.references for p in prompts]),
    "prompts": len(prompts),
    "cut": sum(g.token_ids[-1] not in ends for g in made),
    "tokens_per_call": tokens_per_call(made),
    "references": "best of several, per score",
  }


def words(scores: dict) -> str:
  """The scores for a person, in one line."""
  said = []
  if "exact_match" in scores:
    said.append(
      f"exact match {scores['exact_match']:.2f} percent (SQL as normalised; "
      f"{scores['unparsed']} outputs and {scores['unparsed_references']} "
      "references are no SQL)"
    )
  said.append(
    f"ROUGE-1 {scores['rouge1']:.2f}  ROUGE-Lsum {scores['rougeLsum']:.2f}"
    "  (F1 in percent, stemmed, best of a prompt's references)"
  )
  return "  ".join(said)
