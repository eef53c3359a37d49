"""Questions to decode answers to: the form of MT-bench and of Spec-Bench.

    {"question_id": 81, "category": "writing", "turns": ["Compose ...", ...]}

Evaluation only, of speed: a `test` split with the first turn of each question
as prompt, and no reference. MT-bench is by lm-sys/FastChat (Apache-2.0).
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

from spec_stream.data import builder, rows, source
from spec_stream.errors import UserError

_URL = (
  "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/"
  "data/mt_bench/question.jsonl"
)
_MT_BENCH = [str(number) for number in range(81, 161)]  # ids, in its order


@dataclasses.dataclass(frozen=True)
class Question:
  question_id: str
  category: str
  turns: tuple[str, ...]


class ChatPrompts(builder.PairsBuilder):
  """Prompt: the first turn of a question. Completion: empty."""

  FILES = {
    "test": ("question.jsonl", "question.jsonl.gz", *builder.jsonl("test"))
  }
  URLS = {"test": _URL}

  def _info(self):
    return source.pairs_info(self, "category")

  def pairs(self, path, name):
    for question in read(path, name):
      yield question.category, question.turns[0].strip(), ""

  def _generate_examples(self, path, name, split=""):
    for i, (category, prompt, completion) in enumerate(self.pairs(path, name)):
      row = {"prompt": prompt, "completion": completion, "category": category}
      yield i, row


def categories(data_dir: str, manual_dir: str = "") -> dict[str, str]:
  """Prompt -> category, of prompts as `pipeline.prompts` gives them."""
  made = source.builder("chat_prompts", data_dir, manual_dir)
  return {
    source.text(row["prompt"]): source.text(row["category"])
    for row in made.as_data_source("test")
  }


def read(path: str, name: str = "") -> Iterator[Question]:
  """Questions of a file, in its order; a bad line is a UserError."""
  for where, row in rows.read(path, ("category",), name):
    yield question(row, where)


def question(row: dict, where: str) -> Question:
  """A row as a question; where: of the row, for the UserError of a bad one."""
  rows.texts(row, ("category",), where)
  turns = row.get("turns")
  if not isinstance(turns, list) or not turns:
    raise UserError(f'{where}: "turns" must be a list of texts')
  for turn in turns:
    if not rows.text(turn, f'{where}: a turn of "turns"').strip():
      raise UserError(f'{where}: a turn of "turns" is empty')
  if row.get("question_id") is None:
    raise UserError(f'{where}: "question_id" is missing')
  return Question(str(row["question_id"]), row["category"], tuple(turns))


def name(path: str, questions: Sequence[Question]) -> str:
  """What results call a file of questions: "mt_bench", whatever the file is
  called, if it holds those 80 questions; else the file's name."""
  if [question.question_id for question in questions] == _MT_BENCH:
    return "mt_bench"
  return os.path.basename(path).removesuffix(".gz").removesuffix(".jsonl")
