"""Writes a run as a directory that others load, with a model card.

  launch/export.py --workdir=runs/tuned --out=tuned [--what=merged]

--what=merged: a Hugging Face checkpoint, which `transformers` loads; the
streams' few tensors lie beside the weights, so that generate.py and
benchmark.py --checkpoint=OUT decode with them. --what=streams: those tensors
alone, for the directory of the unchanged base (lossless mode). --what=adapters:
the LoRA adapters in PEFT's format, where PEFT means the same model by them.
"""

import os

from absl import flags

import common

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUT = flags.DEFINE_string("out", None, "The new directory.")
_WHAT = flags.DEFINE_string(
  "what", "merged", "What to write: merged, streams or adapters."
)
_STEP = flags.DEFINE_integer("step", 0, "Checkpoint to export; 0: the last.")
_DTYPE = flags.DEFINE_string(
  "dtype",
  "",
  "With merged: float32, bfloat16 or float16; empty: the run's own.",
)
_SHARD_GB = flags.DEFINE_float(
  "shard_gb", 5.0, "With merged: most gigabytes (10^9 bytes) of a weight file."
)
flags.mark_flags_as_required(["workdir", "out"])


def main(argv):
  del argv
  from spec_stream import checkpoints, export, peft
  from spec_stream.hf import writing

  what = {
    "merged": export.merge,
    "streams": export.streams,
    "adapters": peft.write,
  }
  if _WHAT.value not in what:
    raise common.UserError(
      f"--what={_WHAT.value}: use one of {', '.join(what)}"
    )
  settings = {}
  if _WHAT.value == "merged":
    settings["dtype"] = _DTYPE.value
    settings["shard_bytes"] = int(_SHARD_GB.value * export.GB)
  elif _DTYPE.value or flags.FLAGS["shard_gb"].present:
    raise common.UserError("--dtype and --shard_gb go with --what=merged")
  writing.check(_OUT.value)
  run = checkpoints.load_run(_WORKDIR.value, _STEP.value or None)
  write = what[_WHAT.value]
  for note in write(run, _OUT.value, workdir=_WORKDIR.value, **settings):
    print(f"note: {note}")
  size = sum(e.stat().st_size for e in os.scandir(_OUT.value))
  print(
    f"{len(os.listdir(_OUT.value))} files, {size / 1e6:,.1f} MB: {_OUT.value}"
  )


if __name__ == "__main__":
  common.run(main)
