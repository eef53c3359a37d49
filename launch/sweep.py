"""Runs the sweep() of a config, or goes on with one that was stopped.

  launch/sweep.py --config=configs/ablations/stream_count.py \\
    --workdir=runs/stream_count --config.data.manual_dir=DIR
  launch/sweep.py ... --executor=print          what it would run
  launch/sweep.py ... --runs=streams_3          one run and what it needs
  launch/sweep.py ... --executor=slurm --job=--partition=gpu --job=--execute

Each run is a directory of --workdir: a training, then its benchmarks. What is
done is left alone, what broke is run once more, and what needs a failed run is
skipped. Ctrl-C saves; the same command goes on. --config.a.b=VALUE holds for
each run that does not set the key itself. A table of all benchmarks ends it;
experiments/report.py makes plots of them.
"""

import hashlib
import shlex
import subprocess
import sys

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
  ["local", "print", "slurm", "jobset"],
  "local: on this machine. print: the commands that are left, for a shell. "
  "slurm, jobset: a job of one GPU, or of a slice with one host, for each run "
  "that is not done; one that waits for another is left to the next call. "
  "Prints the jobs; --job=--execute submits them.",
)
_RUNS = flags.DEFINE_list(
  "runs", [], "Names of the runs to do, with those that they need; none: all."
)
_NEEDS = flags.DEFINE_bool(
  "needs",
  True,
  "Also do what --runs need; --noneeds: refuse if it is not done.",
)
_JOB = flags.DEFINE_multi_string(
  "job",
  [],
  "With slurm and jobset: a flag of launch/cluster/slurm.py or jobset.py, "
  "such as --job=--minutes=600; may be given several times.",
)
_PROCESSES = flags.DEFINE_integer(
  "processes",
  1,
  "With local: runs at a time. Benchmarks beside one another on one device are "
  "slower and noisier; their counts are the same. A TPU serves one alone.",
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

  every = found = sweeping.read("config", _BENCHMARK.value)
  if _RUNS.value:
    found = sweep.select(every, _RUNS.value, _NEEDS.value)
  if _EXECUTOR.value == "print":
    for task in found:
      for command in sweep.missing(task, _WORKDIR.value):
        print("python", shlex.join(sweep.fill(command, _WORKDIR.value)))
    return 0
  if _EXECUTOR.value in ("slurm", "jobset"):
    return _submit(found)
  sweep.check_needs(found, every, _WORKDIR.value)
  from local import Local

  runs = Local(
    found, _WORKDIR.value, _PROCESSES.value, _GPUS.value, _RETRIES.value
  )
  runs.run()
  print(sweeping.render(found, _WORKDIR.value, runs.state))
  if runs.stopped:
    return 128 + runs.stopped
  return 0 if set(runs.state.values()) == {"done"} else 1


def _submit(found) -> int:
  """A job for each run that can start; -> 1 if one could not be submitted.

  --noneeds trusts that needs are done: the job sees the workdir, and refuses.
  """
  import sweeping
  from spec_stream import sweep

  words = ["launch/sweep.py", *sweeping.words("config")]
  words += [f"--workdir={_WORKDIR.value}", f"--retries={_RETRIES.value}"]
  words += [f"--benchmark={flag}" for flag in _BENCHMARK.value]
  codes = []
  for task in found:
    if not sweep.missing(task, _WORKDIR.value):
      continue
    waits = [
      t.name
      for t in found
      if t.name in task.needs and sweep.missing(t, _WORKDIR.value)
    ]
    if waits:
      print(f"# {task.name} waits for {', '.join(waits)}", file=sys.stderr)
      continue
    run = [*words, f"--runs={task.name}", "--noneeds"]
    name = "".join(c if c.isalnum() else "-" for c in task.name.lower())
    which = hashlib.sha256(f"{_WORKDIR.value}/{task.name}".encode())
    name = f"sweep-{name[:24].strip('-')}-{which.hexdigest()[:6]}"
    launcher = common.ROOT / "launch" / "cluster" / f"{_EXECUTOR.value}.py"
    job = [f"--name={name}", f"--command={shlex.join(run)}", *_JOB.value]
    done = subprocess.run([sys.executable, launcher, *job])
    codes.append(done.returncode)
    if done.returncode:
      break  # the next would say the same
  return 1 if any(codes) else 0


if __name__ == "__main__":
  common.run(main)
