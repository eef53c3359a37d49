"""Exact match of SQL queries after a normalisation of their spelling.

Both texts are cut into tokens by sqlglot, read as SQLite, and the tokens are
compared. What that makes equal:

- letter case of keywords, functions and names: `SELECT Name` = `select name`;
- blanks, line breaks, comments and semicolons at the end;
- quotes that a name does not need: `[city]` = `city`;
- the quotes of a string: "x" = 'x', and `""` within "x" = `"`;
- `!=` = `<>`, and `==` = `=`.

What stays apart: the order of conditions, columns and tables, the letters of a
string ("Paris" and "paris"), numbers (1 and 1.0), aliases, an AS or INNER that
could be left out, and any other rewriting that would give the same rows.

A word in double quotes is a string, as it is throughout sql-create-context,
but a name where only a name can stand: after FROM, JOIN and AS, and beside a
dot. (SQLite itself takes "x" for a column if there is one of that name.)
"""

import functools
import logging
import re
from collections.abc import Sequence

# Goes into results, beside the numbers that it explains.
NORMALISATION = (
  "sqlglot tokens, dialect sqlite: case of keywords, functions and names; "
  "whitespace, comments and final semicolons; redundant quotes of names; 'x' = "
  '"x"; != = <>; == = =. Kept: order of conditions, string literals, numbers, '
  "aliases. If either text is no query to sqlglot, both are compared with "
  "whitespace folded"
)
_OPERATORS = {"!=": "<>", "==": "="}


def exact_match(
  outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
  """How many outputs equal one of their references.

  Returns:
    exact_match: percent of the outputs; unparsed: how many outputs sqlglot
    does not read as a query; unparsed_references: how many references. Where
    either is no query the texts are compared with whitespace folded.
  """
  right = bad_outputs = bad_references = 0
  for output, known in zip(outputs, references, strict=True):
    made, wanted = normalise(output), [normalise(r) for r in known]
    bad_outputs += made is None
    bad_references += wanted.count(None)
    right += any(
      _fold(output) == _fold(text) if None in (made, form) else made == form
      for text, form in zip(known, wanted)
    )
  return {
    "exact_match": 100 * right / len(outputs),
    "unparsed": bad_outputs,
    "unparsed_references": bad_references,
  }


def normalise(text: str) -> str | None:
  """The normal form of a query, or None for what sqlglot reads as none."""
  import sqlglot
  from sqlglot import errors, expressions
  from sqlglot.tokens import TokenType

  dialect = _dialect()
  try:
    statements = sqlglot.parse(text, dialect=dialect)
    tokens = dialect.tokenize(text)
  except (errors.SqlglotError, RecursionError):
    return None
  # Two queries are no query. A comment behind a final semicolon is a Semicolon.
  first, *rest = statements
  ends = (type(None), expressions.Semicolon)
  if not isinstance(first, expressions.Query):
    return None
  if not all(isinstance(x, ends) for x in rest):
    return None
  while tokens[-1].token_type == TokenType.SEMICOLON:
    tokens.pop()
  return " ".join(
    _spell(token, before, after, named)
    for before, token, after, named in zip(
      [None, *tokens],
      tokens,
      [*tokens[1:], None],
      [False, *_before_tables(tokens)],
      strict=False,
    )
  )


def _before_tables(tokens) -> list[bool]:
  """Whether a table follows each token: FROM of a SELECT, not of a function
  such as TRIM(a FROM b), nor of IS DISTINCT FROM."""
  from sqlglot.tokens import TokenType

  selects, found, before = [False], [], None
  for token in tokens:
    kind = token.token_type
    if kind == TokenType.L_PAREN:
      selects.append(False)
    elif kind == TokenType.R_PAREN and len(selects) > 1:
      selects.pop()
    elif kind == TokenType.SELECT:
      selects[-1] = True
    table = kind == TokenType.JOIN
    if kind == TokenType.FROM:
      table = selects[-1] and before != TokenType.DISTINCT
    found.append(table)
    before = kind
  return found


def _spell(token, before, after, named: bool) -> str:
  """One token in its normal form; before, after: its neighbours or None.

  named: it is the name of a table, in whatever quotes.
  """
  from sqlglot.tokens import TokenType

  text, kind = token.text, token.token_type
  beside = [x.token_type for x in (before, after) if x is not None]
  is_name = named or TokenType.DOT in beside
  is_name |= before is not None and before.token_type == TokenType.ALIAS
  if kind == TokenType.STRING and not is_name:
    return "'" + text.replace("'", "''") + "'"
  if kind in (TokenType.STRING, TokenType.IDENTIFIER):
    name = text.lower()
    return name if re.fullmatch(r"[a-z_]\w*", name) else f"`{name}`"
  if kind.name.endswith("_STRING"):  # x'0f'
    return f"{kind.name.lower()} '{text}'"
  # GROUP BY is one token, with the blanks it was written with.
  return _OPERATORS.get(text, _fold(text).lower())


def _fold(text: str) -> str:
  return " ".join(text.split())


@functools.cache
def _dialect():
  """SQLite, but that "x" is a string; SQLite of sqlglot takes it for a name,
  and then a literal could not be told from `x` and [x], which are names."""
  from sqlglot.dialects.sqlite import SQLite

  # It warns of statements that it keeps as they are; they count as unparsed.
  logging.getLogger("sqlglot").setLevel(logging.ERROR)

  class Strings(SQLite):
    class Tokenizer(SQLite.Tokenizer):
      QUOTES = ["'", '"']
      IDENTIFIERS = ["`", ("[", "]")]
      # Doubled, within its own kind of quotes.
      STRING_ESCAPES = ["'", '"']

  return Strings()
