"""What a run starts from: settings, weights of other runs, tokenizer."""

import dataclasses

from jax.sharding import Mesh

from spec_stream import checkpoints, storage, weights
from spec_stream.data.pipeline import DataConfig
from spec_stream.drafters import registry
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint as hf
from spec_stream.hf import config as hf_config
from spec_stream.models import config as model_config
from spec_stream.models import transformer
from spec_stream.models.config import FREE, ModelConfig
from spec_stream.train import state as states
from spec_stream.train.config import TrainConfig, resolve

# A run goes on under other values of these; any other change is another run.
_MAY_CHANGE = {
  "train": {"steps", "log_every", "save_every", "keep"}
  | {"segment", "remat", "remat_logits"},  # bytes and time, not what is learned
  "data": {"data_dir", "manual_dir"},
}


def configure(given: dict) -> tuple[ModelConfig, DataConfig, TrainConfig]:
  """The model that is trained, its data and its training, from the groups
  model, data and train of a config file.

  Raises: UserError if a value is wrong, or two contradict each other.
  """
  data, train = DataConfig(**given["data"]), TrainConfig(**given["train"])
  model, checkpoint = hf_config.configure(given["model"], data.vocab_size)
  if checkpoint:
    if train.init_from:
      raise UserError(
        "give model.checkpoint or train.init_from, not both: each is the base"
      )
    train = dataclasses.replace(train, init_from=checkpoint)
  return resolve(model, train), data, train


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
  last = storage.steps(workdir)
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


def check_base(workdir, model: ModelConfig, train: TrainConfig, base):
  """Raises: UserError where weights that are not trained would start afresh."""
  frozen = set(weights.shapes(model)) - states.trained_paths(model, train)
  missing = sorted(frozen - set(base))
  if missing:
    raise UserError(
      f"{workdir}/base lacks {len(missing)} of the run's frozen weights "
      f"({missing[0]} ...): copy the run's directory as a whole"
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
    if field.name not in FREE and old != new:
      raise UserError(
        f"train.init_from={workdir} has model.{field.name}={old}, here it is "
        f"{new}: the base models must be the same"
      )
  fresh = weights.paths(model, *weights.ADAPTERS)
  if theirs.streams == model.streams:
    old, fresh = run.model, frozenset()
  else:
    old = transformer.merge_lora(run.model)
  fresh |= _fresh_drafter(workdir, theirs, model)
  if theirs.quantize not in ("", model.quantize):
    raise UserError(
      f"train.init_from={workdir} has model.quantize={theirs.quantize}: bits "
      "that are gone do not come back, so use the same"
    )
  if theirs.quantize and theirs.streams != model.streams:
    if theirs.streams.lora_rank and theirs.streams.mode == "shared":
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


def _fresh_drafter(workdir, theirs: ModelConfig, model: ModelConfig):
  """Paths of the drafter's weights that an earlier run does not give; its own
  go on where they are alike, whatever its loss was.

  Raises: UserError if the run has a drafter of that name of another shape.
  """
  own = weights.of_drafter(model)
  if theirs.drafter.name != model.drafter.name:
    return own
  there, here = weights.shapes(theirs), weights.shapes(model)
  if {p: there.get(p) for p in own} != {p: here[p] for p in own}:
    raise UserError(
      f"train.init_from={workdir} has a {theirs.drafter.name} of another "
      f"shape: use its model.drafter.options ({dict(theirs.drafter.options)})"
    )
  return frozenset()


def load_teacher(train: TrainConfig, model: ModelConfig, tokenizer, mesh: Mesh):
  """-> (config, (weights,)) of train.teacher; (None, ()) without one."""
  if not train.teacher:
    return None, ()
  run = checkpoints.load_run(train.teacher, mesh=mesh)
  if run.tokenizer.hash() != tokenizer.hash():
    raise UserError(
      f"train.teacher={train.teacher} has another tokenizer than this run: set "
      "data.tokenizer to the teacher's tokenizer.json"
    )
  if run.model.config.vocab_size != model.vocab_size:
    raise UserError(
      f"train.teacher={train.teacher} has {run.model.config.vocab_size} rows "
      f"of logits, this model {model.vocab_size}: both need one vocabulary"
    )
  return run.model.config, (weights.to_weights(run.model),)


def start_drafter(model: ModelConfig, base):
  """Adds what a new drafter copies from the target, such as its LM head."""
  if not model.drafter.name or weights.of_drafter(model) & set(base):
    return base
  module = registry.trained(model.drafter.name).Module
  return base | module.start(registry.options(model.drafter), base)


def check_streams(train: TrainConfig, model: ModelConfig, base):
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
    if storage.steps(workdir):
      size = checkpoints.read_config(workdir)["model"]["vocab_size"]
      return checkpoints.read_tokenizer(workdir, size)
    return checkpoints.read_hf_tokenizer(train.init_from)
  given = Tokenizer.load(data.tokenizer) if data.tokenizer else None
  for run in (workdir if storage.steps(workdir) else "", train.init_from):
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
