"""The training run: start or resume, step, log, save, stop without loss."""

import collections
import contextlib
import dataclasses
import itertools
import math
import signal
import time

import jax
import numpy as np
from jax.sharding import Mesh

from spec_stream import checkpoints, sharding, weights
from spec_stream.checkpoints import Saver
from spec_stream.data.pipeline import DataConfig, train_iterator
from spec_stream.drafters import registry
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint as hf
from spec_stream.hf import config as hf_config
from spec_stream.metrics import MetricWriter
from spec_stream.models import config as model_config
from spec_stream.models import transformer
from spec_stream.models.config import ModelConfig
from spec_stream.train import config as train_config
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig
from spec_stream.train.step import make_step

# A run goes on under other values of these; any other change is another run.
_MAY_CHANGE = {
  "train": {"steps", "log_every", "save_every", "keep"}
  | {"segment", "remat", "remat_logits"},  # bytes and time, not what is learned
  "data": {"data_dir", "manual_dir"},
}
_IN_FLIGHT = 2  # steps the host runs ahead of the device


def fit(
  workdir: str,
  model: ModelConfig,
  data: DataConfig,
  train: TrainConfig,
  tokenizer,
  mesh: Mesh,
) -> bool:
  """Trains until train.steps, from the last checkpoint of workdir if any.

  Returns False if Ctrl-C (or SIGTERM) stopped it, after a checkpoint.

  Raises:
    UserError: settings contradict each other or those of the run in workdir, a
      checkpoint cannot be read, or the loss is no longer finite.
  """
  model = train_config.resolve(model, train)
  sharding.check_batch(mesh, data.batch_size, train.accumulate)
  train_config.check_segment(train.segment, data.seq_len, data.stream_positions)
  settings = describe(model, data, train)
  last = check_resume(workdir, settings)
  if last >= train.steps:
    print(f"{workdir} is already trained for {last} steps: nothing to do")
    return True
  base = {}
  if train.init_from and not last:
    base = load_base(train.init_from, model, mesh)
    base = _start_drafter(model, base)
    _check_streams(train, model, base)
  elif last:
    base = checkpoints.read_base(workdir, checkpoints.abstract(model, mesh))
    _check_base(workdir, model, train, base)
  state, shardings = states.init(model, train, mesh, base)
  del base
  if not last and jax.process_index() == 0:
    checkpoints.write_config(workdir, settings)
    checkpoints.write_tokenizer(workdir, tokenizer)
  if not last:
    checkpoints.write_base(workdir, state.frozen)
  source = train_iterator(
    data,
    tokenizer,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  with contextlib.ExitStack() as stack:
    stack.callback(getattr(source, "close", lambda: None))
    saver = stack.enter_context(Saver(workdir, train.keep))
    if last:
      state = _restore(saver, last, state, source)
      print(f"resuming {workdir} from its checkpoint of step {last}")
    _announce(model, state, mesh)
    first = next(source)
    step = make_step(model, train, mesh, shardings)
    step = _compile(step, state, _to_devices(first, mesh))
    writer = stack.enter_context(
      MetricWriter(
        workdir,
        train.steps,
        start_step=last,
        active=jax.process_index() == 0,
      )
    )
    stop = stack.enter_context(_signals())
    batches = itertools.chain([first], source)
    save = lambda step, state: saver.save(
      step, state.trained, state.opt_state, source
    )
    at = _loop(train, mesh, step, state, batches, save, writer, stop)
    saver.wait()
  if stop:
    print(f"stopped: step {at} is saved, and the same command goes on from it")
    return False
  print(f"trained {at} steps: {workdir}")
  return True


def _loop(train, mesh, step, state, batches, save, writer, stop) -> int:
  """Steps until train.steps or `stop`; -> the last one, which is saved."""
  flying = collections.deque()  # metrics of dispatched steps
  at, tokens, since = int(state.step), 0, time.monotonic()
  saved = at

  def save_here():
    nonlocal saved
    _drain(flying, 0)  # a step that went wrong must not be saved
    if at > saved:
      save(at, state)
    saved = at

  while at < train.steps and not stop:
    batch = next(batches)
    tokens += int(np.count_nonzero(batch["segment_ids"]))
    state, metrics = step(state, _to_devices(batch, mesh))
    at += 1
    flying.append((at, metrics))
    _drain(flying, _IN_FLIGHT)
    if at % train.log_every == 0 or at == train.steps:
      _drain(flying, 0)
      now = time.monotonic()
      rate = tokens * jax.process_count() / (now - since)
      values = {name: float(x) for name, x in metrics.items()}
      writer.write(at, {**values, "tokens_per_second": rate})
      tokens, since = 0, now
    if at % train.save_every == 0:
      save_here()
  save_here()
  return at


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


def _compile(step, state, batch):
  if any(x.dtype == "int4" for x in state.frozen.values()):
    return step  # jax 0.10 gives int4 two layouts, and refuses one of them here
  start = time.monotonic()
  compiled = step.lower(state, batch).compile()
  print(f"compiled in {time.monotonic() - start:.1f} s", flush=True)
  return compiled


def _to_devices(batch, mesh: Mesh):
  place = sharding.batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(place, x)
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


@contextlib.contextmanager
def _signals():
  """A list that a first SIGINT or SIGTERM fills; a second one acts at once."""
  caught = []

  def note(number, frame):
    caught.append(number)
    signal.signal(number, before[number])

  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {n: signal.signal(n, note) for n in numbers}
  try:
    yield caught
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


# -- start and resume --------------------------------------------------------


def describe(model: ModelConfig, data: DataConfig, train: TrainConfig) -> dict:
  """What config.json holds."""
  return {
    "model": model_config.to_dict(model),
    "data": dataclasses.asdict(data),
    "train": dataclasses.asdict(train),
    "commit": checkpoints.git_commit(),
  }


def check_resume(workdir: str, settings: dict) -> int:
  """Step of the last checkpoint, 0 for a new run.

  Raises: UserError naming the first setting that differs from the run's.
  """
  last = checkpoints.steps(workdir)
  if not last:
    return 0  # nothing that could be lost: new settings replace old ones
  saved = checkpoints.read_config(workdir)
  # A setting that came after the run was made stands at its default there.
  default = describe(ModelConfig(), DataConfig(), TrainConfig())
  for group in ("model", "data", "train"):
    old = _flat(default[group]) | _flat(saved.get(group, {}))
    new = _flat(settings[group])
    for key in sorted(old.keys() | new.keys()):
      if key in _MAY_CHANGE.get(group, ()) or old.get(key) == new.get(key):
        continue
      raise UserError(
        f"{workdir} was trained with {group}.{key}={old.get(key)}, now it is "
        f"{new.get(key)}: use the same, or another --workdir"
      )
  return last[-1]


def _flat(values: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in values.items():
    if isinstance(value, dict):
      flat |= _flat(value, f"{prefix}{key}.")
    else:  # as json gives it back
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def _check_base(workdir, model: ModelConfig, train: TrainConfig, base):
  """Raises: UserError where weights that are not trained would start afresh."""
  frozen = set(weights.shapes(model)) - states.trained_paths(model, train)
  missing = sorted(frozen - set(base))
  if missing:
    raise UserError(
      f"{workdir}/base lacks {len(missing)} of the run's frozen weights "
      f"({missing[0]} ...): copy the run's directory as a whole"
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


def load_base(
  workdir: str, model: ModelConfig, mesh: Mesh | None = None
) -> weights.Weights:
  """Weights of an earlier run: its base, LoRA of shared mode folded in; or of
  a Hugging Face checkpoint.

  If its streams are configured as here, they and the adapters go on as well;
  and so does its drafter.

  Raises: UserError if that run's base model is not this one's.
  """
  if hf_config.is_checkpoint(workdir):
    base = hf.read_weights(workdir, model, mesh)
    return base | hf.read_added(workdir, model, mesh)
  run = checkpoints.load_run(workdir, mesh=mesh)
  theirs = run.model.config
  for field in dataclasses.fields(ModelConfig):
    old, new = getattr(theirs, field.name), getattr(model, field.name)
    free = ("streams", "drafter", "dtype", "param_dtype", "quantize")
    if field.name not in free and old != new:
      raise UserError(
        f"train.init_from={workdir} has model.{field.name}={old}, here it is "
        f"{new}: the base models must be the same"
      )
  fresh = weights.paths(model, *weights.ADAPTERS)
  if theirs.streams == model.streams:
    old, fresh = run.model, frozenset()
  else:
    old = transformer.merge_lora(run.model)
  if theirs.drafter != model.drafter:
    fresh |= weights.of_drafter(model)
  if theirs.quantize not in ("", model.quantize):
    raise UserError(
      f"train.init_from={workdir} has model.quantize={theirs.quantize}: bits "
      "that are gone do not come back, so use the same"
    )
  if theirs.quantize and old.config.streams.lora_rank and fresh:
    if theirs.streams.mode == "shared":
      raise UserError(
        f"train.init_from={workdir} has adapters on a base in "
        f"{theirs.quantize}, which cannot be folded into it: use the same "
        "model.streams, or start from its base"
      )
  base = hf.quantised(weights.to_weights(old), model)
  own = weights.shapes(model)
  return {
    path: x.astype(own[path].dtype)
    for path, x in base.items()
    if path in own and path not in fresh
  }


def _start_drafter(model: ModelConfig, base):
  """Adds what a new drafter copies from the target, such as its LM head."""
  if not model.drafter.name or weights.of_drafter(model) & set(base):
    return base
  module = registry.trained(model.drafter.name).Module
  return base | module.start(model, base)


def _check_streams(train: TrainConfig, model: ModelConfig, base):
  """Raises: UserError if a drafter would be trained beside fresh streams."""
  fresh = weights.paths(model, *weights.ADAPTERS) - set(base)
  if train.trainable == "drafter" and fresh:
    raise UserError(
      f"train.init_from={train.init_from} has no streams or adapters such as "
      "model.streams asks for, and train.trainable=drafter trains none: set "
      "model.streams as there, or train.objective=next_token for a plain target"
    )


def prepare_tokenizer(workdir: str, data: DataConfig, train: TrainConfig):
  """The run's tokenizer: that in workdir, that of init_from (a run or a Hugging
  Face checkpoint), or a new one.

  A new one is trained on the training split. Raises: UserError.
  """
  from spec_stream.data.pipeline import examples
  from spec_stream.data.tokenizer import Tokenizer

  if train.init_from and hf_config.is_checkpoint(train.init_from):
    if checkpoints.steps(workdir):
      size = checkpoints.read_config(workdir)["model"]["vocab_size"]
      return checkpoints.read_tokenizer(workdir, size)
    return checkpoints.read_hf_tokenizer(train.init_from)
  given = Tokenizer.load(data.tokenizer) if data.tokenizer else None
  for run in (workdir if checkpoints.steps(workdir) else "", train.init_from):
    if not run:
      continue
    config = checkpoints.read_config(run)
    own = checkpoints.read_tokenizer(run, config["model"]["vocab_size"])
    if given and given.hash() != own.hash():
      raise UserError(
        f"data.tokenizer={data.tokenizer} is not the tokenizer of {run}, whose "
        "model knows no other: leave data.tokenizer empty"
      )
    size = config.get("data", {}).get("vocab_size")
    if size != data.vocab_size and not given:
      raise UserError(
        f"the tokenizer of {run} was made with data.vocab_size={size}, now it "
        f"is {data.vocab_size}: use the same"
      )
    return own
  if given:
    return given
  texts = (text for pair in examples(data, "train") for text in pair)
  return Tokenizer.train(texts, data.vocab_size)
