"""The error a user reads."""

_LONGEST = 1000  # letters: names in a damaged file may have thousands


class UserError(ValueError):
  """Bad input: one line that says what was wrong and what would be right.

  Launchers print it without a traceback and exit with code 1.
  """

  def __str__(self):
    text = super().__str__()
    if len(text) <= _LONGEST:
      return text
    half = _LONGEST // 2 - 10
    return f"{text[:half]} [...] {text[-half:]}"


def short(error: Exception, limit: int = 160) -> str:
  """What a library says, as a part of a line."""
  text = str(error).split(". See full TensorStore")[0]  # many lines of json
  text = " ".join(text.split()) or type(error).__name__
  return text if len(text) <= limit else text[: limit - 3] + "..."
