"""Several processes as one program: JAX's own multi-host runtime.

The processes find one another by what their launcher has put into the
environment:

    Cloud TPU VMs, GKE   what the TPU runtime tells
    Slurm                SLURM_NTASKS and its kin, as srun sets them
    anywhere             JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES
                         and JAX_PROCESS_ID

Each of them runs the same commands, reads the same data, and writes to the same
--workdir, which all must see.
"""

import contextlib
import hashlib
import importlib.util
import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from spec_stream.errors import UserError

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_NAMES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join():
  """Joins the other processes of the job, if the environment names any.

  To be called before anything asks JAX for a device. Only the first process
  prints from then on; errors come from each.

  Raises: UserError for half an environment, or if the others do not come.
  """
  settings = _settings(os.environ)
  if settings is None:
    return
  try:
    jax.distributed.initialize(**settings)
  except ValueError as e:
    if settings or "coordinator_address" not in str(e):
      raise
    return  # a machine with TPUs of its own and no others beside it
  except RuntimeError as e:
    where = settings.get("coordinator_address", "the coordinator")
    raise UserError(
      f"the processes did not meet at {where} ({str(e).splitlines()[0]}): "
      f"start all of them, with one {_ADDRESS} that they can reach"
    ) from e
  if jax.process_index():
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _settings(env) -> dict | None:
  """Arguments of `jax.distributed.initialize`; None if this is alone.

  Raises: UserError for half an environment.
  """
  if env.get(_ADDRESS):
    missing = [name for name in _NAMES if not env.get(name, "").isdigit()]
    if missing:
      raise UserError(
        f"{_ADDRESS} is set, so {' and '.join(missing)} must be whole numbers: "
        "how many processes there are, and which of them this is (from 0)"
      )
    if ":" not in env[_ADDRESS]:
      raise UserError(f"{_ADDRESS}={env[_ADDRESS]}: must be HOST:PORT")
    count, index = (int(env[name]) for name in _NAMES)
    if index >= count:
      raise UserError(
        f"JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}"
      )
    return {
      "coordinator_address": env[_ADDRESS],
      "num_processes": count,
      "process_id": index,
    }
  if int(env.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in env:
    return {}
  asked = env.get("JAX_PLATFORMS", "")
  if importlib.util.find_spec("libtpu") and asked in ("", "tpu"):
    return {}
  return None


def check_same(what: str, value: str):
  """Raises: UserError unless all processes have the same text here."""
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(value.encode()).digest()
  try:
    multihost_utils.assert_equal(np.frombuffer(digest, np.uint8), what)
  except (AssertionError, ValueError) as e:
    raise UserError(
      f"the processes do not agree on {what}: all must run the same command on "
      "the same files"
    ) from e


@contextlib.contextmanager
def stop_signals():
  """A function of the number of steps done -> the signal to stop for, or 0.

  SIGINT and SIGTERM are noted, and asked for between steps; a second one acts
  at once. Several processes agree on the step before which all of them stop, at
  the cost of one of them having heard; each must ask after every step. They
  tell of SIGTERM alone: a preemption, or one Ctrl-C for all.
  """
  caught, several = [], jax.process_count() > 1

  def note(number, frame):
    signal.signal(number, before[number])
    if several:  # the runtime listens to SIGTERM, and tells the others
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      caught.append(number)

  def stop(step: int) -> int:
    if several and not caught:
      if multihost_utils.reached_preemption_sync_point(step):
        caught.append(signal.SIGTERM)
    return caught[0] if caught else 0

  numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
  before = {n: signal.signal(n, note) for n in numbers}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
