"""Questions to decode answers to: the form of MT-bench and of Spec-Bench.

    {"question_id": 81, "category": "writing", "turns": ["Compose ...", ...]}

For launchers that decode and time, not for training: there are no answers.
MT-bench is by lm-sys/FastChat (Apache-2.0).
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence

from spec_stream.data import rows
from spec_stream.errors import UserError

_MT_BENCH = [str(number) for number in range(81, 161)]  # ids, in its order


@dataclasses.dataclass(frozen=True)
class Question:
  question_id: str
  category: str
  turns: tuple[str, ...]


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
