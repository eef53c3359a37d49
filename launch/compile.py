"""Compiles training and decoding for a TPU slice that need not be here.

  launch/compile.py --topology=v5e:4x4 --config=configs/checkpoint.py:shared \\
    --shape=llama2_7b --config.mesh.data=1 --config.mesh.fsdp=16 \\
    [--streams=0,3 --programs=train,decode --config.data.batch_size=16]

Needs `pip install libtpu` and no TPU. Prints what each chip holds, against its
memory; FLOPs, bytes and collectives of a step; and the shortest time that the
chip's published peaks allow for it. A program that does not fit is named, with
the setting that would help, and the exit code is 1. Runs nothing.
"""

import sys
import time

from absl import flags
from ml_collections.config_flags import config_flags

import common

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/; --config.a.b=VALUE changes a key."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Kind and topology of the slice, such as v5e:4x4."
)
_SHAPE = flags.DEFINE_string(
  "shape",
  "",
  "Shape of the base in place of a checkpoint's or the config's: llama2_7b, "
  "llama3_8b, llama2_70b.",
)
_PROGRAMS = flags.DEFINE_list(
  "programs", ["train", "decode"], "Which to compile: train, decode."
)
_STREAMS = flags.DEFINE_list(
  "streams", [], "Numbers of streams to compare, one row each; none: config's."
)
_BATCH = flags.DEFINE_integer("batch", 1, "With decode: rows.", 1)
_SLOTS = flags.DEFINE_integer(
  "slots", 2048, "With decode: cache slots, half of them the prompt's.", 8
)
_NODES = flags.DEFINE_integer(
  "tree_nodes", 16, "With decode: nodes of a draft, root included.", 1
)
_OUT = flags.DEFINE_string("out", "", "A .jsonl file to add the rows to.")
flags.mark_flags_as_required(["config", "topology"])


def main(argv):
  del argv
  from spec_stream import compile_check as check
  from spec_stream import metrics

  chip = check.chip(_TOPOLOGY.value)
  try:
    counts = [int(n) for n in _STREAMS.value] or [None]
  except ValueError:
    raise common.UserError("--streams: whole numbers such as 0,3") from None
  unknown = set(_PROGRAMS.value) - {"train", "decode"}
  if unknown or not _PROGRAMS.value:
    raise common.UserError("--programs: use train, decode or both")
  given = _CONFIG.value.to_dict()
  model, data, train = check.configure(given, _SHAPE.value)
  mesh = check.mesh(_TOPOLOGY.value, given["mesh"])
  rows = []
  for count in counts:
    which = model if count is None else check.with_streams(model, count)
    for program in _PROGRAMS.value:
      start = time.monotonic()
      if program == "train":
        row = check.training(which, data, train, mesh, chip)
      else:
        row = check.decoding(
          which, mesh, chip, _BATCH.value, _SLOTS.value, _NODES.value
        )
      row |= {"topology": _TOPOLOGY.value, "shape": _SHAPE.value}
      row |= {"mesh": dict(mesh.shape)}
      row["compile_seconds"] = round(time.monotonic() - start, 1)
      rows.append(row)
      if _OUT.value:
        metrics.append_jsonl(_OUT.value, [row])
      print(f"{row['program']}, J={row['num_streams']}: compiled", flush=True)
  print(check.render(rows))
  for row in rows:
    if "unread" in row:
      print(
        f"{row['program']}, J={row['num_streams']}: this jaxlib cannot read "
        f"the program that libtpu made, so bytes and collectives are not "
        f"known: {row['unread']}",
        file=sys.stderr,
      )
  bad = [row for row in rows if not row["fits"]]
  for row in bad:
    print(f"DOES NOT FIT: {row['advice']}", file=sys.stderr)
  return 1 if bad else 0


if __name__ == "__main__":
  common.run(main)
