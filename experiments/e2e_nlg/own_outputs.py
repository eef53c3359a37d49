"""E2E-NLG with a run's own greedy outputs as the training split.

  python experiments/e2e_nlg/own_outputs.py RUN OUT

Writes OUT/train.jsonl.gz, one pair for each prompt of the training split, and
copies the validation and test files of the run's data.manual_dir beside it.
Streams that are trained on OUT learn what they are to guess in decoding: the
model's text, not a person's. OUT appears when it is whole.
"""

import gzip
import json
import pathlib
import shutil
import sys

from spec_stream import NoDraft, UserError, evaluate, load_run, task
from spec_stream.data import e2e_nlg
from spec_stream.progress import Progress


def write(workdir: str, out: pathlib.Path, max_new_tokens: int = 128) -> int:
  """Decodes and writes; -> how many outputs ended within max_new_tokens."""
  run = load_run(workdir)
  files = e2e_nlg.find_files(run.config["data"]["manual_dir"])
  prompts = task.prompts(run, "train")
  ends = run.tokenizer.eos_ids
  generations = evaluate.decode_all(
    run.model,
    [p.token_ids for p in prompts],
    NoDraft(),
    max_new_tokens=max_new_tokens,
    end_token=ends,
    on_batch=Progress("prompts"),
  )
  partial = out.with_name(out.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  count = 0
  with gzip.open(partial / "train.jsonl.gz", "wt", encoding="utf-8") as file:
    for prompt, generation in zip(prompts, generations, strict=True):
      if generation.token_ids[-1] not in ends:
        continue  # cut short: not an output to imitate
      text = run.tokenizer.decode(generation.token_ids)
      pair = {"mr": prompt.text, "ref": text}
      file.write(json.dumps(pair, ensure_ascii=False) + "\n")
      count += 1
  for split in ("validation", "test"):
    shutil.copy(files[split], partial)
  partial.rename(out)
  return count


def main(argv: list[str]) -> int:
  if len(argv) != 3:
    print(__doc__, file=sys.stderr)
    return 2
  out = pathlib.Path(argv[2])
  if out.exists():
    print(f"{out} is there already: nothing to do")
    return 0
  try:
    count = write(argv[1], out)
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  print(f"{count} outputs of {argv[1]} in {out}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
