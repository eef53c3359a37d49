"""Rows of text files: JSON lines, a JSON array, or CSV, each plain or in gzip.

The form follows from the name: .jsonl, .json or .csv, and .gz behind it. What
cannot be read is one line that names the file and the line (in a JSON array,
the item).
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence

from spec_stream import json_text
from spec_stream.errors import UserError

Row = tuple[str, dict]  # (where it stands, fields)


def read(path: str, fields: Sequence[str], name: str = "") -> Iterator[Row]:
  """Each row as (where, fields); where is such as "train.jsonl, line 17".

  fields: those that each row must have, as text; there may be others.
  name: what a download was called, if its path does not say.

  Raises:
    UserError: the first bad line, a file that cannot be read or has no rows.
  """
  shown = name or path
  stem = shown.removesuffix(".gz")
  form = next((x for x in _READERS if stem.endswith(x)), None)
  if form is None:
    raise UserError(f"{shown}: the name must end in .jsonl, .json or .csv")
  opened = gzip.open if shown.endswith(".gz") else open
  found = False
  try:
    with opened(path, "rt", encoding="utf-8", newline="") as file:
      for where, row in _READERS[form](file, shown, fields):
        texts(row, fields, where)
        found = True
        yield where, row
  except (UnicodeDecodeError, EOFError, OSError, zlib.error) as e:
    raise UserError(f"{shown} cannot be read: {e}") from e
  if not found:
    raise UserError(f"{shown} holds no example")


def texts(row: dict, fields: Sequence[str], where: str) -> list[str]:
  """Values of `fields`; one that is missing or no text is a UserError."""
  if not isinstance(row, dict):
    raise UserError(f"{where}: must be a JSON object, not {_words(row)}")
  for field in fields:
    if field not in row:
      raise UserError(
        f'{where}: "{field}" is missing: a row needs {", ".join(fields)}'
      )
    text(row[field], f'{where}: "{field}"')
  return [row[field] for field in fields]


def text(value, where: str) -> str:
  """The value if it is text that can be stored, or a UserError."""
  if not isinstance(value, str):
    raise UserError(f"{where} must be text, not {_words(value)}")
  try:
    value.encode()
  except UnicodeEncodeError as e:  # JSON may hold half of a pair, as "\ud83d"
    raise UserError(f"{where} holds half a character: {e.reason}") from e
  return value


def _json_lines(file, path: str, fields) -> Iterator[Row]:
  for number, line in enumerate(file, 1):
    if line.strip():
      yield f"{path}, line {number}", _parse(line.strip(), path, number)


def _json_array(file, path: str, fields) -> Iterator[Row]:
  items = _parse(file.read(), path)
  if not isinstance(items, list):
    raise UserError(f"{path}: must be a JSON array, not {_words(items)}")
  for number, item in enumerate(items, 1):
    yield f"{path}, item {number}", item


def _parse(source: str, path: str, line: int = 1):
  """JSON that begins in line `line` of the file."""
  try:
    return json_text.parse(source)
  except json.JSONDecodeError as e:
    line += e.lineno - 1
    raise UserError(
      f"{path}, line {line}: not JSON ({e.msg}, column {e.colno})"
    ) from e
  except ValueError as e:  # a number of 5000 digits, [[[[...
    raise UserError(f"{path}, line {line}: not JSON to be read: {e}") from e


def _csv(file, path: str, fields) -> Iterator[Row]:
  reader = csv.reader(file, strict=True)
  try:
    header = next(reader, None) or []
    if not set(fields) <= set(header):
      raise UserError(
        f"{path}, line 1: the header must have {','.join(fields)}, not "
        f"'{','.join(header):.60}'"
      )
    for row in reader:
      where = f"{path}, line {reader.line_num}"
      if not row:
        continue  # a blank line
      if len(row) != len(header):
        raise UserError(
          f"{where}: {len(row)} columns, not {len(header)} "
          f"({', '.join(header)})"
        )
      yield where, dict(zip(header, row))
  except csv.Error as e:
    raise UserError(f"{path}, line {reader.line_num}: {e}") from e


def _words(value) -> str:
  """A value in a message: short, and on one line."""
  shown = json.dumps(value, ensure_ascii=True)
  return shown if len(shown) <= 40 else shown[:40] + "..."


_READERS = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv}
