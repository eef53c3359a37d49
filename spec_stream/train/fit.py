"""The training run: start or resume, step, log, save, stop without loss."""

import collections
import contextlib
import dataclasses
import itertools
import math
import time

import jax
import numpy as np
from jax.sharding import Mesh

from spec_stream import checkpoints, hosts, manifest, sharding, storage
from spec_stream.data.pipeline import DataConfig, train_iterator
from spec_stream.errors import UserError
from spec_stream.metrics import MetricWriter
from spec_stream.models.config import ModelConfig
from spec_stream.storage import Saver
from spec_stream.train import config as train_config
from spec_stream.train import meter as meters
from spec_stream.train import start
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig
from spec_stream.train.step import make_step

_IN_FLIGHT = 2  # steps the host runs ahead of the device


def fit(
  workdir: str,
  model: ModelConfig,
  data: DataConfig,
  train: TrainConfig,
  tokenizer,
  mesh: Mesh,
  profile: bool = False,
) -> int:
  """Trains until train.steps, from the last checkpoint of workdir if any.

  profile: write a trace of a few steps to <workdir>/profile.

  Returns 0, or the number of the signal (SIGINT, SIGTERM) that stopped it,
  after a checkpoint.

  Raises:
    UserError: settings contradict each other or those of the run in workdir, a
      checkpoint cannot be read, or the loss is no longer finite.
  """
  model = train_config.resolve(model, train)
  sharding.check_batch(mesh, data.batch_size, train.accumulate)
  train_config.check_segment(train.segment, data.seq_len, data.stream_positions)
  settings = start.describe(model, data, train)
  last = start.check_resume(workdir, settings)
  if last >= train.steps:
    print(f"{workdir} is already trained for {last} steps: nothing to do")
    return 0
  hosts.check_same(
    "the tokenizer and settings", f"{tokenizer.hash()}{settings}"
  )
  base = {}
  if train.init_from and not last:
    base = start.load_base(train.init_from, model, mesh)
    base = start.start_drafter(model, base)
    start.check_streams(train, model, base)
  elif last:
    base = storage.read_base(workdir, checkpoints.abstract(model, mesh))
    start.check_base(workdir, model, train, base)
  teacher, taught = start.load_teacher(train, model, tokenizer, mesh)
  state, shardings = states.init(model, train, mesh, base)
  del base
  if not last and jax.process_index() == 0:
    checkpoints.write_config(workdir, settings)
    checkpoints.write_tokenizer(workdir, tokenizer)
  if not last:
    storage.write_base(workdir, state.frozen)
  source = train_iterator(data, tokenizer)
  with contextlib.ExitStack() as stack:
    stack.callback(getattr(source, "close", lambda: None))
    saver = stack.enter_context(
      Saver(workdir, train.keep, tokenizer.hash(), settings["model"])
    )
    if last:
      kept = storage.read_manifest(workdir, last)
      where = f"{workdir}, step {last},"
      manifest.check_tokenizer(kept, tokenizer, where)
      state = _restore(saver, last, state, source)
      print(f"resuming {workdir} from its checkpoint of step {last}")
    _announce(model, state, mesh)
    first = next(source)
    step = make_step(model, train, mesh, shardings, teacher)
    on_devices = _to_devices(first, mesh)
    meter = _meter(model, train, mesh, shardings, teacher, state, on_devices)
    compiled = _compile(step, state, on_devices, *taught)
    writer = stack.enter_context(
      MetricWriter(
        workdir,
        train.steps,
        start_step=last,
        active=jax.process_index() == 0,
      )
    )
    stop = stack.enter_context(hosts.stop_signals())
    trace = stack.enter_context(
      meters.profiler(f"{workdir}/profile" if profile else "")
    )
    batches = itertools.chain([first], source)
    save = lambda step, state: saver.save(
      step, state.trained, state.opt_state, source
    )
    step = lambda state, batch: compiled(state, batch, *taught)
    at, signal_number = _loop(
      train, meter, step, state, batches, save, writer, stop, trace
    )
    saver.wait()
  if at < train.steps:
    print(f"stopped: step {at} is saved, and the same command goes on from it")
    return signal_number
  print(f"trained {at} steps: {workdir}")
  return 0


def _loop(train, meter, step, state, batches, save, writer, stop, trace):
  """Steps until train.steps or a signal; -> (the last one, which is saved, the
  number of the signal or 0)."""
  flying = collections.deque()  # metrics of dispatched steps
  at, tokens, since = int(state.step), 0, time.monotonic()
  first = saved = logged = at

  def save_here():
    nonlocal saved
    _drain(flying, 0)  # a step that went wrong must not be saved
    if at > saved:
      save(at, state)
    saved = at

  while not (number := stop(at)) and at < train.steps:
    trace(at - first)
    batch = next(batches)
    tokens += int(np.count_nonzero(batch["segment_ids"]))
    state, metrics = step(state, _to_devices(batch, meter.mesh))
    at += 1
    flying.append((at, metrics))
    _drain(flying, _IN_FLIGHT)
    if at % train.log_every == 0 or at == train.steps:
      _drain(flying, 0)
      now = time.monotonic()
      values = {name: float(x) for name, x in metrics.items()}
      used = meter.read(at - logged, tokens, now - since)
      writer.write(at, {**values, **used})
      tokens, since, logged = 0, now, at
    if at % train.save_every == 0:
      save_here()
  save_here()
  return at, number


def _meter(model, train, mesh, shardings, teacher, state, batch):
  """Of the step without recomputation; none beside a teacher, whose products
  are no progress of this model."""
  if teacher is not None:
    return meters.Meter(mesh, None)
  once = dataclasses.replace(train, remat=False, remat_logits=False, segment=0)
  step = make_step(model, once, mesh, shardings)
  return meters.make(mesh, step, state, batch)


def _drain(flying, limit: int):
  """Waits until at most `limit` steps are in flight; their loss is finite."""
  while len(flying) > limit:
    at, metrics = flying.popleft()
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if not math.isfinite(loss + norm):
      raise UserError(
        f"the loss is no longer finite at step {at} (loss {loss}, gradient "
        f"norm {norm}); the last checkpoint is kept: lower "
        "train.learning_rate or train.clip_norm, in a new --workdir"
      )


def _compile(step, *args):
  if any(x.dtype == "int4" for x in args[0].frozen.values()):
    return step  # jax 0.10 gives int4 two layouts, and refuses one of them here
  start = time.monotonic()
  compiled = step.lower(*args).compile()
  print(f"compiled in {time.monotonic() - start:.1f} s", flush=True)
  return compiled


def _to_devices(batch, mesh: Mesh):
  """Each process has the whole batch, and gives its devices their rows."""
  place = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_callback(x.shape, place, x.__getitem__)
    for name, x in batch.items()
  }


def _announce(model: ModelConfig, state, mesh: Mesh):
  size = lambda tree: sum(x.size for x in tree.values())
  trained, frozen = size(state.trained), size(state.frozen)
  shape = " x ".join(f"{name} {n}" for name, n in mesh.shape.items())
  print(
    f"{trained + frozen:,} weights, {trained:,} trained; "
    f"{jax.device_count()} {jax.devices()[0].platform} device(s): {shape}"
  )


def _restore(saver: Saver, step: int, state, source):
  trained, opt_state = saver.restore(
    step, state.trained, state.opt_state, source
  )
  return state.replace(
    step=jax.device_put(np.int32(step), state.step.sharding),
    trained=trained,
    opt_state=opt_state,
  )
