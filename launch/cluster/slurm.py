"""A job on GPUs of a Slurm cluster: a process for each GPU.

  launch/cluster/slurm.py --name=e2e --nodes=2 --gpus_per_node=8 \\
    --command='launch/train.py --config=configs/e2e_nlg.py
    --config.mesh.data=16 --config.data.batch_size=64 --workdir=runs/e2e'

Prints the script; --execute gives it to `sbatch`, from the directory that holds
the project and its .venv, which all nodes must see. Slurm warns two minutes
before the end: the training saves, and the job is queued again.
"""

import shlex

import jobs
from absl import flags

import common

_NODES = flags.DEFINE_integer("nodes", 1, "How many nodes.", 1)
_GPUS = flags.DEFINE_integer("gpus_per_node", 1, "GPUs of each node.", 1)
_CPUS = flags.DEFINE_integer("cpus_per_task", 8, "CPU cores of each GPU.", 1)
_MINUTES = flags.DEFINE_integer("minutes", 240, "Limit of the job's time.", 5)
_PARTITION = flags.DEFINE_string("partition", "", "Of the cluster.")
_ACCOUNT = flags.DEFINE_string("account", "", "That the time is counted on.")
_REQUEUE = flags.DEFINE_bool(
  "requeue", True, "Queue the job again when it was stopped before its end."
)


def script(
  name: str,
  command: list[str],
  *,
  nodes: int = 1,
  gpus_per_node: int = 1,
  cpus_per_task: int = 8,
  minutes: int = 240,
  partition: str = "",
  account: str = "",
  requeue: bool = True,
) -> str:
  """The batch script: one task a GPU, which JAX finds from Slurm's settings."""
  options = {
    "job-name": name,
    "nodes": nodes,
    "ntasks-per-node": gpus_per_node,
    "gpus-per-node": gpus_per_node,
    "cpus-per-task": cpus_per_task,
    "time": f"{minutes // 60:02}:{minutes % 60:02}:00",
    "signal": "B:TERM@120",
    "dependency": "singleton",  # one job of a name at a time
    "open-mode": "append",
    "output": f"{name}-%j.log",
  }
  options |= {"partition": partition} if partition else {}
  options |= {"account": account} if account else {}
  lines = ["#!/usr/bin/env bash"]
  lines += [f"#SBATCH --{key}={value}" for key, value in options.items()]
  lines += ["#SBATCH --requeue"] if requeue else []
  again = 'scontrol requeue "$SLURM_JOB_ID"' if requeue else "true"
  # The shell hears of the end first. srun would answer SIGTERM by killing its
  # tasks, so they are told through the controller.
  return "\n".join(
    [
      *lines,
      "set -u",
      'cd "$SLURM_SUBMIT_DIR" || exit 1',
      "stopped=0",
      "trap 'stopped=1; scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
      f"srun --kill-on-bad-exit=1 .venv/bin/python {shlex.join(command)} &",
      "tasks=$!",
      'wait "$tasks"',
      "code=$?",
      'if [ "$stopped" = 1 ]; then',
      '  wait "$tasks"  # until it has saved',
      "  code=$?",
      "fi",
      f'if [ "$code" = 143 ]; then {again}; fi',
      'exit "$code"',
      "",
    ]
  )


def main(argv):
  del argv
  jobs.check_name(jobs.NAME.value)
  devices = _NODES.value * _GPUS.value
  text = script(
    jobs.NAME.value,
    jobs.parse_command(jobs.COMMAND.value, devices, devices, mounted=False),
    nodes=_NODES.value,
    gpus_per_node=_GPUS.value,
    cpus_per_task=_CPUS.value,
    minutes=_MINUTES.value,
    partition=_PARTITION.value,
    account=_ACCOUNT.value,
    requeue=_REQUEUE.value,
  )
  jobs.run("sbatch", ["sbatch"], text)


if __name__ == "__main__":
  common.run(main)
