"""The error a user reads."""


class UserError(ValueError):
  """Bad input: one line that says what was wrong and what would be right.

  Launchers print it without a traceback and exit with code 1.
  """
