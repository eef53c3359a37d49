"""Running text for pretraining: rows with a `text` field, such as books.

Any such files: train, validation and test as JSON lines in data.manual_dir.
"""

from spec_stream.data import builder, formats, rows

# Characters: 200 to 400 tokens of English, by the size of the vocabulary, so
# that a row of data.seq_len=512 holds one whole, and a longer row several.
CHUNK = 1000


class TextCorpus(builder.PairsBuilder):
  """Prompt: nothing. Completion: up to 1000 characters of a text."""

  FILES = {split: builder.jsonl(split) for split in builder.SPLITS}

  def pairs(self, path, name):
    for where, row in rows.read(path, ("text",), name):
      for piece in formats.chunks(row["text"], CHUNK):
        yield where, "", piece
