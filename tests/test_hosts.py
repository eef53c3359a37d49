"""Several processes as one: the numbers, the data and the checkpoints of one.

As a program, `python tests/test_hosts.py WORKDIR SIZES [STEP WHAT]` trains on a
mesh of SIZES (such as 2,2,2). Once STEP is logged, the last process sends
itself the signal WHAT; "save" stands for a SIGKILL while that step is saved,
and with "differ" the last process has settings of its own.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from spec_stream import checkpoints, hosts, storage
from spec_stream.errors import UserError

ROOT = pathlib.Path(tiny.__file__).parent.parent
# In float64: Adam makes steps of full size of a rounding of a tiny gradient.
MODEL = dataclasses.replace(tiny.SMALL, dtype="float64", param_dtype="float64")
TRAIN = dataclasses.replace(tiny.TRAIN, steps=20, save_every=6)


def main(workdir, sizes, last="0", what=""):
  hosts.join()
  jax.config.update("jax_enable_x64", True)
  tiny.use_small_data()
  is_last = jax.process_index() == jax.process_count() - 1

  def kill_at(step, number):
    if is_last and step == int(last):
      os.kill(os.getpid(), number)

  if what == "save":
    save = storage.Saver.save

    def save_and_die(self, step, *args):
      save(self, step, *args)  # returns while it is being written
      kill_at(step, signal.SIGKILL)

    storage.Saver.save = save_and_die
  elif what in ("SIGTERM", "SIGINT"):
    from spec_stream.train import fit

    drain = fit._drain

    def drain_and_signal(flying, limit):
      drain(flying, limit)
      if not limit:
        kill_at(drain_and_signal.at, getattr(signal, what))
        drain_and_signal.at += 1

    drain_and_signal.at = 1
    fit._drain = drain_and_signal
  steps = TRAIN.steps + (what == "differ" and jax.process_index())
  number = tiny.train(
    workdir,
    model=MODEL,
    train=dataclasses.replace(TRAIN, steps=steps),
    sizes=tuple(map(int, sizes.split(","))),
    batch_size=8,
  )
  return 128 + number if number else 0


def start(workdir, sizes, processes, *args, devices=8):
  """The processes of one training, on `devices` virtual devices in all."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} "
    f"--xla_force_host_platform_device_count={devices // processes}"
  )
  if processes > 1:
    env["JAX_COORDINATOR_ADDRESS"] = address
    env["JAX_NUM_PROCESSES"] = str(processes)
  return [
    subprocess.Popen(
      [sys.executable, __file__, str(workdir), sizes, *map(str, args)],
      env={**env, "JAX_PROCESS_ID": str(index)} if processes > 1 else env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(processes)
  ]


def train(workdir, sizes, processes, *args, devices=8, code=0):
  started = start(workdir, sizes, processes, *args, devices=devices)
  done = [process.communicate(timeout=300) for process in started]
  for process, (_, err) in zip(started, done):
    assert process.returncode == code, err[-3000:]
  return done


def close(one, other):
  """Losses of the same steps, to 1e-5."""
  assert one.keys() == other.keys()
  for step in one:
    np.testing.assert_allclose(one[step], other[step], rtol=1e-5, err_msg=step)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """Losses of 20 steps on one device."""
  workdir = tmp_path_factory.mktemp("alone")
  train(workdir, "1,1,1", 1, devices=1)
  losses = tiny.losses(workdir)
  assert sorted(losses) == list(range(1, 21))
  return losses


def weights(workdir):
  """Bits of the last checkpoint's weights, on one device."""
  config = checkpoints.read_config(workdir)
  model = checkpoints.model_config.from_dict(config["model"])
  return checkpoints.load_weights(workdir, model)


@pytest.mark.slow
def test_two_processes_stopped_go_on_as_one(alone, tmp_path, x64):
  """SIGTERM to one stops both after a checkpoint, and one device goes on."""
  done = train(tmp_path, "2,2,2", 2, 8, "SIGTERM", code=143)
  (at,) = storage.steps(tmp_path)[-1:]
  assert 8 <= at < 20
  assert f"step {at} is saved" in done[0][0]
  assert "step" not in done[1][0]  # the first process speaks for all
  close(tiny.losses(tmp_path), {s: x for s, x in alone.items() if s <= at})
  train(tmp_path, "1,1,1", 1, devices=1)
  close(tiny.losses(tmp_path), alone)
  _, step = weights(tmp_path)  # whose digests are those that were saved
  assert step == 20


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["8,1,1", "2,4,1", "2,2,2"])
@pytest.mark.parametrize("processes", [1, 2])
def test_any_mesh_gives_the_losses_of_one_device(
  alone, tmp_path, sizes, processes
):
  train(tmp_path, sizes, processes)
  close(tiny.losses(tmp_path), alone)


@pytest.mark.slow
def test_ctrl_c_in_one_of_two_stops_both(tmp_path):
  train(tmp_path, "2,2,2", 2, 8, "SIGINT", code=143)
  assert 8 <= storage.steps(tmp_path)[-1] < 20


@pytest.mark.slow
def test_processes_that_do_not_agree(tmp_path):
  done = train(tmp_path, "2,2,2", 2, 0, "differ", code=1)
  words = "UserError: the processes do not agree on the tokenizer and settings"
  assert all(words in err for _, err in done)
  assert not storage.steps(tmp_path)


@pytest.mark.slow
def test_killed_while_saving(alone, tmp_path):
  """The last whole checkpoint is gone on from, with the data that follow."""
  started = start(tmp_path, "2,2,2", 2, 12, "save")
  assert started[1].wait(timeout=300) == -signal.SIGKILL
  time.sleep(1)
  started[0].kill()  # it waits for the other one
  for process in started:
    process.communicate()
  (at,) = storage.steps(tmp_path)[-1:]
  assert at in (6, 12)
  done = train(tmp_path, "2,2,2", 2)
  assert f"resuming {tmp_path} from its checkpoint of step {at}" in done[0][0]
  close(tiny.losses(tmp_path), alone)


@pytest.mark.slow
def test_a_checkpoint_moves_to_other_meshes_bit_for_bit(tmp_path, x64):
  """Saved by two processes on 2x2x2: read on one device, and on 1x8x1."""
  train(tmp_path, "2,2,2", 2, 8, "SIGTERM", code=143)
  before, at = weights(tmp_path)
  env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  code = f"""
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from spec_stream import checkpoints, sharding
model = checkpoints.model_config.from_dict(
  checkpoints.read_config({str(tmp_path)!r})["model"])
mesh = sharding.make_mesh(1, 8, 1)
values, step = checkpoints.load_weights({str(tmp_path)!r}, model, mesh=mesh)
np.savez({str(tmp_path / "other.npz")!r}, **values)
assert values["blocks/0/attention/qkv/kernel"].sharding.mesh.size == 8
"""
  subprocess.run([sys.executable, "-c", code], env=env, check=True)
  other = np.load(tmp_path / "other.npz")
  assert set(other) == set(before)
  for path, x in before.items():
    assert np.array_equal(x, other[path]), path


# -- the environment -----------------------------------------------------------


@pytest.mark.parametrize(
  "env, expected",
  [
    ({}, None),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}),
    (
      {"JAX_COORDINATOR_ADDRESS": "h:1"}
      | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
      dict(coordinator_address="h:1", num_processes=2, process_id=1),
    ),
  ],
)
def test_what_the_environment_says(env, expected):
  assert hosts._settings({"JAX_PLATFORMS": "cpu", **env}) == expected


@pytest.mark.parametrize(
  "env, message",
  [
    ({}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers"),
    ({"JAX_NUM_PROCESSES": "2"}, "so JAX_PROCESS_ID must be whole"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be below"),
    (
      {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
      | {"JAX_COORDINATOR_ADDRESS": "host"},
      "must be HOST:PORT",
    ),
  ],
)
def test_half_an_environment_is_refused(env, message):
  with pytest.raises(UserError, match=message):
    hosts._settings({"JAX_COORDINATOR_ADDRESS": "h:1", **env})


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
