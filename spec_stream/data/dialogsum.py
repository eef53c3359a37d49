"""DialogSum: dialogues and their summaries (Chen et al., 2021).

The release of cylnlp/dialogsum (CC BY-NC-SA 4.0: not for commercial use). Rows
of the test split have three summaries: three examples with the same prompt.
"""

from spec_stream.data import builder, formats, rows

_URL = "https://raw.githubusercontent.com/cylnlp/dialogsum/main/DialogSum_Data/"
_REFERENCES = ("summary1", "summary2", "summary3")
FILES = {
  "train": ("dialogsum.train.jsonl", *builder.jsonl("train")),
  "validation": ("dialogsum.dev.jsonl", *builder.jsonl("validation")),
  "test": ("dialogsum.test.jsonl", *builder.jsonl("test")),
}


class Dialogsum(builder.PairsBuilder):
  """Prompt: a dialogue and "Summary:". Completion: a summary of it."""

  FILES = FILES
  URLS = {split: _URL + names[0] for split, names in FILES.items()}

  def pairs(self, path, name):
    for where, row in rows.read(path, ("dialogue",), name):
      fields = _REFERENCES if _REFERENCES[0] in row else ("summary",)
      for summary in rows.texts(row, fields, where):
        prompt, completion = formats.dialogsum(row["dialogue"], summary)
        yield prompt, prompt, completion
