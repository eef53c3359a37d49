"""E2E-NLG: restaurant attributes to text (Novikova et al., 2017).

The original release of tuetschek/e2e-dataset (CC BY-SA 4.0), one example per
reference. Text is unchanged but for blanks at both ends.
"""

from spec_stream.data import builder, formats, rows

_URL = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/"
FILES = {
  "train": ("trainset.csv", *builder.jsonl("train")),
  "validation": ("devset.csv", *builder.jsonl("validation")),
  "test": ("testset_w_refs.csv", *builder.jsonl("test")),
}


class E2eNlg(builder.PairsBuilder):
  """Prompt: the meaning representation. Completion: its reference."""

  FILES = FILES
  URLS = {split: _URL + names[0] for split, names in FILES.items()}

  def pairs(self, path, name):
    for _, row in rows.read(path, ("mr", "ref"), name):
      prompt, completion = formats.e2e(row["mr"], row["ref"])
      yield prompt, prompt, completion


def find_files(directory: str) -> dict[str, str]:
  """Path of each split in a manual_dir, or a UserError."""
  return builder.find_files(E2eNlg, directory)
