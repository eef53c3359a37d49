"""Conversations in the form of ShareGPT, from files at hand.

    [{"id": "a_0", "conversations": [{"from": "human", "value": "Hi."},
                                     {"from": "gpt", "value": "Hello!"}]}, ...]

as a JSON array or as JSON lines. One file in data.manual_dir is split by a hash
of the id; three are taken as they are.
"""

import re
from collections.abc import Iterator

from spec_stream.data import builder, formats, rows
from spec_stream.errors import UserError

# "from" -> role. The published ShareGPT files have all of these.
ROLES = {
  "system": "system",
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "assistant": "assistant",
  "bing": "assistant",
  "bard": "assistant",
}


class Conversations(builder.PairsBuilder):
  """Prompt: the turns so far. Completion: the assistant's next one."""

  FILES = {
    split: (f"{split}.json", *builder.jsonl(split)) for split in builder.SPLITS
  }
  WHOLE_FILES = ("*.json", "*.jsonl", "*.json.gz", "*.jsonl.gz")

  def pairs(self, path, name):
    for ident, turns in read(path, name):
      # ShareGPT's long conversations come in parts, QWJhYvA_0, QWJhYvA_1, that
      # stay together; another id may count whatever it likes.
      group = re.sub(r"^(\w{7})_\d+$", r"\1", ident)
      for prompt, completion in formats.conversation_pairs(turns):
        yield group, prompt, completion


def read(path: str, name: str = "") -> Iterator[tuple[str, list[formats.Turn]]]:
  """(id, [(role, text), ...]) of a file, role as in `formats.ROLES`."""
  for where, row in rows.read(path, ("id",), name):
    turns = row.get("conversations")
    if not isinstance(turns, list):
      raise UserError(f'{where}: "conversations" must be a list of turns')
    yield (
      row["id"],
      [_turn(x, f"{where}, turn {i}") for i, x in enumerate(turns, 1)],
    )


def _turn(turn, where: str) -> formats.Turn:
  who, text = rows.texts(turn, ("from", "value"), where)
  if who not in ROLES:
    raise UserError(
      f'{where}: "from" must be one of {", ".join(ROLES)}, not "{who:.40}"'
    )
  return ROLES[who], text
