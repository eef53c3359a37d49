"""Trains a model with speculative streams, or goes on with a stopped run.

  python launch/train.py --config=configs/e2e_nlg.py --workdir=runs/e2e \\
    [--config.train.steps=2000 --config.mesh.data=-1 ...]

Writes config.json, tokenizer.json, metrics.jsonl and checkpoints/ to --workdir.
Ctrl-C and SIGTERM save a checkpoint (exit codes 130 and 143); the same command
goes on from the last one, on as many devices and hosts as there then are.
"""

import dataclasses

from absl import flags
from ml_collections.config_flags import config_flags

import common

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/; --config.a.b=VALUE changes a key."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is written.")
_PROFILE = flags.DEFINE_bool(
  "profile",
  False,
  "Write a trace of steps 10 to 15 to WORKDIR/profile, for TensorBoard or "
  "Perfetto.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  del argv
  # Slow imports wait until the flags are known to be right.
  from spec_stream import hosts, sharding, weights
  from spec_stream.checkpoints import check_vocabulary
  from spec_stream.train import start
  from spec_stream.train.fit import fit

  hosts.join()
  workdir = _WORKDIR.value
  # All that can be wrong is looked at before the data are.
  model, data, train = start.configure(_CONFIG.value.to_dict())
  mesh = sharding.make_mesh(**_CONFIG.value.mesh)
  sharding.check_batch(mesh, data.batch_size, train.accumulate)
  sharding.weight_shardings(mesh, weights.shapes(model))
  tokenizer = start.prepare_tokenizer(workdir, data, train)
  if _CONFIG.value.model.checkpoint:
    check_vocabulary(tokenizer, model.vocab_size, train.init_from)
  else:
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
  number = fit(workdir, model, data, train, tokenizer, mesh, _PROFILE.value)
  return 128 + number if number else 0


if __name__ == "__main__":
  common.run(main)
