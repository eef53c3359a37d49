"""sql-create-context: a question and CREATE TABLE statements to a query.

The release of b-mc2/sql-create-context (CC BY 4.0; from WikiSQL and Spider) is
one file without splits. They follow from a hash of question and context, so
that no such pair occurs in two of them.
"""

from spec_stream.data import builder, formats, rows

_FILE = "sql_create_context_v4.json"
_URL = "https://huggingface.co/datasets/b-mc2/sql-create-context/resolve/main/"


class SqlCreateContext(builder.PairsBuilder):
  """Prompt: tables and a question. Completion: the SQL query."""

  FILES = {split: builder.jsonl(split) for split in builder.SPLITS}
  WHOLE_FILES = (_FILE,)
  URLS = {builder.WHOLE: _URL + _FILE}

  def pairs(self, path, name):
    fields = ("context", "question", "answer")
    for where, row in rows.read(path, fields, name):
      prompt, completion = formats.sql(*rows.texts(row, fields, where))
      yield prompt, prompt, completion
