"""One tokenizer for the pretraining corpus and the three tasks.

  python experiments/paper_tasks/tokenizer.py DATA OUT [--vocab_size=4096]

DATA: a directory with english_novels, e2e_nlg, dialogsum and
sql_create_context_rederived. Trained on a slice of each training split, so that
none of the four languages is spelled out letter by letter.
"""

import argparse
import itertools
import pathlib
import sys

from spec_stream import UserError
from spec_stream.data import source
from spec_stream.data.tokenizer import Tokenizer

# Data set -> (folder, examples): about as much text of each of the four.
CORPORA = {
  "text_corpus": ("english_novels", 8_000),
  "e2e_nlg": ("e2e_nlg", 20_000),
  "dialogsum": ("dialogsum", 6_000),
  "sql_create_context": ("sql_create_context_rederived", 20_000),
}


def texts(data: pathlib.Path, prepared: str):
  """Prompts and completions of every CORPORA slice, evenly spread over it."""
  for name, (folder, count) in CORPORA.items():
    pairs = source.examples(name, prepared, str(data / folder), "train")
    every = max(len(pairs) // count, 1)
    for pair in itertools.islice(pairs, 0, None, every):
      yield from pair


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("data", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--vocab_size", type=int, default=4096)
  parser.add_argument("--data_dir", default="data")
  args = parser.parse_args(argv)
  try:
    made = Tokenizer.train(texts(args.data, args.data_dir), args.vocab_size)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  args.out.parent.mkdir(parents=True, exist_ok=True)
  made.save(str(args.out))
  print(f"{made.vocab_size} tokens: {args.out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
