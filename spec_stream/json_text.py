"""JSON of files that anyone may have written."""

import json
from typing import Any


def parse(text: str | bytes, **options) -> Any:
  """As `json.loads`, but all that can be wrong is a ValueError.

  Python's own reader goes as deep as the text and ends in a RecursionError.
  """
  try:
    return json.loads(text, **options)
  except RecursionError as e:
    raise ValueError("brackets inside brackets, too deep to be read") from e
