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
