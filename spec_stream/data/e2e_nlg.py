"""E2E-NLG: restaurant attributes to text (Novikova et al., 2017).

The original release of tuetschek/e2e-dataset (CC BY-SA 4.0), one example per
reference. Text is unchanged but for blanks at both ends.
"""

import csv
import gzip
import json
import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from spec_stream.data.source import pairs_info
from spec_stream.errors import UserError

_URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
# Split -> names it may have in a manual_dir, the original one first.
FILES = {
  "train": ("trainset.csv", "train.jsonl.gz", "train.jsonl"),
  "validation": ("devset.csv", "validation.jsonl.gz", "validation.jsonl"),
  "test": ("testset_w_refs.csv", "test.jsonl.gz", "test.jsonl"),
}


class E2eNlg(tfds.core.GeneratorBasedBuilder):
  """Prompt: the meaning representation. Completion: its reference.

  files: path of each split, of a release at hand; without it, downloads.
  """

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, files: dict[str, str] | None = None, **settings):
    self._files = files
    super().__init__(**settings)

  def _info(self):
    return pairs_info(self)

  def _split_generators(self, dl_manager):
    paths = self._files
    if not paths:
      try:
        names = {split: _URL + names[0] for split, names in FILES.items()}
        paths = dl_manager.download(names)
      except Exception as e:  # TFDS raises what its HTTP library raises
        raise UserError(
          f"cannot download E2E-NLG ({type(e).__name__}): put its files into a "
          "directory and name it with --config.data.manual_dir=DIR"
        ) from e
    return {
      split: self._generate_examples(os.fspath(path), FILES[split][0])
      for split, path in paths.items()
    }

  def _generate_examples(self, path: str, original: str):
    for i, (meaning, text) in enumerate(read_pairs(path, original)):
      yield i, {"prompt": meaning.strip(), "completion": text.strip()}


def find_files(directory: str) -> dict[str, str]:
  """Path of each split in a manual_dir, or a UserError."""
  if not os.path.isdir(directory):
    raise UserError(f"data.manual_dir: no directory {directory}")
  found = {}
  for split, names in FILES.items():
    paths = [os.path.join(directory, name) for name in names]
    paths = [path for path in paths if os.path.isfile(path)]
    if not paths:
      raise UserError(
        f"data.manual_dir: {directory} has none of {', '.join(names)}"
      )
    found[split] = paths[0]
  return found


def read_pairs(path: str, name: str = "") -> Iterator[tuple[str, str]]:
  """(mr, ref) of a CSV or JSON-lines file; a bad line is a UserError."""
  opened = gzip.open if path.endswith(".gz") else open
  # A download has a hashed name: `name` is the one it had.
  is_json = ".jsonl" in (path if path.endswith((".gz", ".jsonl")) else name)
  shown = path if os.path.basename(path) == name or is_json else name or path
  pair = None
  with opened(path, "rt", encoding="utf-8", newline="") as lines:
    try:
      for pair in (_json if is_json else _csv)(lines, shown):
        yield pair
    except (UnicodeDecodeError, EOFError, OSError) as e:
      raise UserError(f"{shown} cannot be read: {e}") from e
  if pair is None:
    raise UserError(f"{shown} holds no example")


def _json(lines, path: str):
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      pair = row["mr"], row["ref"]
      if not all(isinstance(text, str) for text in pair):
        raise ValueError("mr and ref must be text")
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{path}, line {number}: not a JSON object with mr and ref ({e})"
      ) from e
    yield pair


def _csv(lines, path: str):
  reader = csv.reader(lines, strict=True)
  try:
    if next(reader, None) != ["mr", "ref"]:
      raise UserError(f"{path}, line 1: the header must be mr,ref")
    for row in reader:
      if len(row) != 2:
        raise UserError(
          f"{path}, line {reader.line_num}: {len(row)} columns, not 2 (mr, ref)"
        )
      yield row[0], row[1]
  except csv.Error as e:
    raise UserError(f"{path}, line {reader.line_num}: {e}") from e
