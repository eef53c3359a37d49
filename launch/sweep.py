"""Runs the sweep() of a config, or goes on with one that was stopped.

  launch/sweep.py --config=configs/ablations/stream_count.py \\
    --workdir=runs/stream_count --config.data.manual_dir=DIR
  launch/sweep.py ... --executor=print          what it would run
  launch/sweep.py ... --runs=streams_3          one run and what it needs

Each run is a directory of --workdir: a training, then its benchmarks. What is
done is left alone, what broke is run once more, and what needs a failed run is
skipped. Ctrl-C saves; the same command goes on. --config.a.b=VALUE holds for
each run that does not set the key itself. A table of all benchmarks ends it;
experiments/report.py makes plots of them.
"""

import shlex

from absl import flags
from ml_collections.config_flags import config_flags

import common

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/ with a sweep()."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs are written.")
_EXECUTOR = flags.DEFINE_enum(
  "executor",
  "local",
  ["local", "print"],
  "local: on this machine. print: the commands that are left, for a shell.",
)
_RUNS = flags.DEFINE_list(
  "runs", [], "Names of the runs to do, with those that they need; none: all."
)
_PROCESSES = flags.DEFINE_integer(
  "processes",
  1,
  "With local: runs at a time. Benchmarks beside one another on one device are "
  "slower and noisier; their counts are the same.",
  lower_bound=1,
)
_GPUS = flags.DEFINE_list(
  "gpus", [], "With local: ids of GPUs, for one run at a time on each."
)
_RETRIES = flags.DEFINE_integer(
  "retries", 1, "With local: times that what broke is run again.", lower_bound=0
)
_BENCHMARK = flags.DEFINE_multi_string(
  "benchmark",
  [],
  "A flag for all benchmarks, such as --benchmark=--prompts=8; may be given "
  "several times.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv):
  del argv
  import sweeping
  from spec_stream import sweep

  found = sweeping.read("config", _BENCHMARK.value)
  if _RUNS.value:
    found = sweep.select(found, _RUNS.value)
  if _EXECUTOR.value == "print":
    for task in found:
      for command in sweep.missing(task, _WORKDIR.value):
        print("python", shlex.join(sweep.fill(command, _WORKDIR.value)))
    return 0
  from local import Local

  runs = Local(
    found, _WORKDIR.value, _PROCESSES.value, _GPUS.value, _RETRIES.value
  )
  runs.run()
  print(sweeping.render(found, _WORKDIR.value, runs.state))
  if runs.stopped:
    return 130
  return 0 if set(runs.state.values()) == {"done"} else 1


if __name__ == "__main__":
  common.run(main)
