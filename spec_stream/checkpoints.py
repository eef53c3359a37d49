"""Runs on disk, and the one place that knows orbax.

    <workdir>/config.json         model, data and train settings, git commit
    <workdir>/tokenizer.json      or tokenizer/, files of a checkpoint's
    <workdir>/checkpoints/<step>/ weights, optimizer, data (the iterator), meta
    <workdir>/base/               weights that training does not move, if any
    <workdir>/base.json           their digests

`meta` is a manifest (see `manifest`), which must be that of the run that is
loaded and of the numbers that are read. A checkpoint is
written beside its final name and renamed when complete, so a kill never leaves
half of one. Weights are a flat dict by path (see `weights`): `load_run` reads
them alone, onto whatever devices there are.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import subprocess
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from spec_stream import json_text, manifest, sharding, weights
from spec_stream.errors import UserError
from spec_stream.models import config as model_config
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer
from spec_stream.weights import Weights

# What `export` writes into tokenizer_config.json beside a tokenizer of this
# project, whose prompts are put between <bos> and <sep>.
OWN_TOKENIZER = {"prompt_format": "spec_stream.data.tokenizer"}
_QUIET = ("orbax", "absl", "jax", "array_record", "grain")


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model as `load_run` found it."""

  model: Transformer
  tokenizer: Any  # spec_stream.data.tokenizer.Tokenizer
  config: dict
  step: int


# -- config and tokenizer ----------------------------------------------------


def write_config(workdir, config: dict):
  """Writes <workdir>/config.json, complete or not at all."""
  path = pathlib.Path(workdir) / "config.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(config, indent=2) + "\n")
  temporary.replace(path)


def read_config(workdir) -> dict:
  """The settings of a run. Raises: UserError if there is none or it is torn."""
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise UserError(f"{workdir}: no such directory; give a run's --workdir")
  path = workdir / "config.json"
  if not path.is_file():
    raise UserError(
      f"{workdir} holds no config.json, so it is no run of launch/train.py"
    )
  try:
    config = json_text.parse(path.read_text())
    if not isinstance(config, dict) or "model" not in config:
      raise ValueError("it has no model")
  except ValueError as e:
    raise UserError(f"{path} cannot be read as a run's settings: {e}") from e
  return config


def tokenizer_directory(workdir) -> pathlib.Path:
  """Where a run keeps the tokenizer files of a Hugging Face checkpoint."""
  return pathlib.Path(workdir) / "tokenizer"


def write_tokenizer(workdir, tokenizer):
  """Keeps a tokenizer with a run, of this project's own or of a checkpoint."""
  from spec_stream.data.tokenizer import Tokenizer

  path = pathlib.Path(workdir) / "tokenizer.json"
  # Nor may that of an abandoned run stay.
  shutil.rmtree(tokenizer_directory(workdir), ignore_errors=True)
  path.unlink(missing_ok=True)
  if isinstance(tokenizer, Tokenizer):
    tokenizer.save(str(path))
  else:
    tokenizer.save(tokenizer_directory(workdir))


def check_vocabulary(tokenizer, vocab_size: int, where):
  """Raises: UserError if the tokenizer has tokens that the model has not.

  A model may have more rows: checkpoints pad them.
  """
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f"{where} has {tokenizer.vocab_size} tokens, but the model has "
      f"{vocab_size}: it is not the tokenizer of this model"
    )


def read_tokenizer(workdir, vocab_size: int):
  """The run's tokenizer, which must have the model's vocabulary."""
  from spec_stream.data.tokenizer import Tokenizer

  directory = tokenizer_directory(workdir)
  if directory.is_dir():
    from spec_stream.hf import tokenizer as hf_tokenizer

    tokenizer = hf_tokenizer.load(directory)
    check_vocabulary(tokenizer, vocab_size, directory)
    return tokenizer
  path = pathlib.Path(workdir) / "tokenizer.json"
  if not path.is_file():
    raise UserError(f"{workdir} holds no tokenizer.json: the run is incomplete")
  try:
    tokenizer = Tokenizer.load(str(path))
  except Exception as e:  # the library raises bare Exception
    raise UserError(f"{path} cannot be read as a tokenizer: {_short(e)}") from e
  if tokenizer.vocab_size != vocab_size:
    raise UserError(
      f"{path} has {tokenizer.vocab_size} tokens, but the model has "
      f"{vocab_size}: it is not the tokenizer of this run"
    )
  return tokenizer


def read_hf_tokenizer(directory):
  """The tokenizer of a Hugging Face directory: its own, or this project's if
  the directory was exported with that. Raises: UserError."""
  from spec_stream.data.tokenizer import Tokenizer
  from spec_stream.hf import config as hf_config
  from spec_stream.hf import tokenizer as hf_tokenizer

  settings = pathlib.Path(directory) / "tokenizer_config.json"
  if settings.is_file():
    if OWN_TOKENIZER.items() <= hf_config.read_json(settings).items():
      return Tokenizer.load(str(settings.with_name("tokenizer.json")))
  return hf_tokenizer.load(directory)


def git_commit() -> str | None:
  """Commit of this checkout, with "+" if files differ; None outside git."""

  def git(*words):
    done = subprocess.run(
      ["git", "-C", str(pathlib.Path(__file__).parent), *words],
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip()

  try:
    commit = git("rev-parse", "--short=12", "HEAD")
    return commit + "+" * bool(git("status", "--porcelain", "-uno"))
  except (OSError, subprocess.CalledProcessError):
    return None


# -- checkpoints -------------------------------------------------------------


def _directory(workdir) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / "checkpoints"


def steps(workdir) -> list[int]:
  """Steps of the complete checkpoints, ascending."""
  directory = _directory(workdir)
  if not directory.is_dir():
    return []
  return sorted(
    int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit()
  )


class Saver:
  """Saves in the background and keeps the last `keep` checkpoints.

  with Saver(workdir, keep=2) as saver:
    saver.save(state, iterator)

  tokenizer, model: its hash, and the settings of `to_dict`, for the manifest.
  """

  def __init__(self, workdir, keep: int, tokenizer: str = "", model=None):
    _silence()
    self._about = {"tokenizer": tokenizer, "model": model}
    self._directory = _directory(workdir)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def save(self, step: int, weights: Weights, opt_state, iterator):
    """iterator: the grain iterator as it stands after the batch of `step`."""
    import grain

    self._manager.save(
      step,
      args=ocp.args.Composite(
        weights=ocp.args.StandardSave(weights),
        optimizer=ocp.args.StandardSave(opt_state),
        data=grain.checkpoint.CheckpointSave(iterator),
        meta=ocp.args.JsonSave(
          {
            "step": step,
            **self._about,
            "weights": manifest.shapes(weights),
            "digests": manifest.digests(weights),
            "optimizer": manifest.digests(manifest.leaves(opt_state)),
          }
        ),
      ),
    )

  def restore(self, step: int, weights: Weights, opt_state, iterator):
    """-> (weights, opt_state) like those given, placed as they are.

    The iterator is set in place: all processes saved the same, so any number of
    them reads it. Raises: UserError if it cannot be read.
    """
    with _readable(self._directory / str(step)):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          weights=ocp.args.StandardRestore(_abstract(weights)),
          optimizer=ocp.args.StandardRestore(_abstract(opt_state)),
          meta=ocp.args.JsonRestore(),
        ),
      )
      data = self._directory / str(step) / "data"
      found = next(data.glob("process_0-of-*.json"))
      iterator.set_state(json.loads(found.read_text()))
      kept = manifest.parse(json.dumps(restored.meta))
    where = str(self._directory / str(step))
    opt_state = manifest.leaves(restored.optimizer)
    manifest.check_digests(kept.get("digests"), restored.weights, where)
    manifest.check_digests(
      kept.get("optimizer"), opt_state, where, group="optimizer/"
    )
    return restored.weights, restored.optimizer

  def wait(self):
    """Returns when what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def read_manifest(workdir, step: int) -> dict:
  """What `meta` says; nothing where there is none, as in older checkpoints.

  Raises: UserError if it is damaged.
  """
  path = _directory(workdir) / str(step) / "meta" / "metadata"
  if not path.is_file():
    return {}
  with _readable(path.parent.parent):
    return manifest.parse(path.read_text())


def abstract(config: ModelConfig, mesh: Mesh | None = None) -> dict:
  """Weights by path without values, placed on a mesh or the first device."""
  shapes = weights.shapes(config)
  if mesh is None:
    place = dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
  else:
    place = sharding.weight_shardings(mesh, shapes)
  return {
    path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place[path])
    for path, x in shapes.items()
  }


def _base(workdir) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / "base"


def write_base(workdir, frozen: Weights):
  """Keeps what training does not move, once, beside the checkpoints."""
  digests = _base(workdir).with_suffix(".json")
  digests.unlink(missing_ok=True)
  if not frozen:  # nor may that of an abandoned run stay
    shutil.rmtree(_base(workdir), ignore_errors=True)
    return
  _silence()
  with ocp.StandardCheckpointer() as writer:
    writer.save(_base(workdir), frozen, force=True)
  found = manifest.digests(frozen)
  if jax.process_index() == 0:
    digests.write_text(json.dumps(found) + "\n")


def read_base(workdir, target: dict) -> Weights:
  """What `write_base` kept; nothing if it kept nothing.

  target: abstract weights by path with their shardings, among them these.
  """
  if not _base(workdir).is_dir():
    return {}
  _silence()
  names = _names(_base(workdir))
  with _readable(_base(workdir)), ocp.StandardCheckpointer() as reader:
    found = reader.restore(_base(workdir), {p: target[p] for p in names})
  advice = "copy it from where the run was whole, or train again"
  kept, where = _base_digests(workdir), str(_base(workdir))
  manifest.check_digests(kept, found, where, advice)
  return found


def _base_digests(workdir) -> dict | None:
  path = _base(workdir).with_suffix(".json")
  if not path.is_file():  # of an earlier version
    return None
  try:
    return manifest.parse(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path} is damaged ({e}): remove it, and the weights of "
      f"{_base(workdir)} are read unchecked"
    ) from e


def _names(directory: pathlib.Path) -> list[str]:
  """Paths of the weights in a directory of orbax."""
  with _readable(directory), ocp.StandardCheckpointer() as reader:
    return list(reader.metadata(directory).item_metadata)


def load_weights(workdir, config, step=None, mesh: Mesh | None = None):
  """-> (weights of a ModelConfig by path, step); the last step by default.

  mesh: where to put them; None: the first device.
  """
  found = steps(workdir)
  if not found:
    raise UserError(f"{workdir} holds no complete checkpoint yet")
  step = found[-1] if step is None else step
  if step not in found:
    raise UserError(
      f"{workdir} has no checkpoint of step {step}; it has: "
      f"{', '.join(map(str, found))}"
    )
  target = abstract(config, mesh)
  frozen = read_base(workdir, target)
  target = {path: x for path, x in target.items() if path not in frozen}
  kept = read_manifest(workdir, step)
  directory = _directory(workdir) / str(step)
  manifest.check_shapes(kept, target, str(directory))
  _silence()
  with _readable(directory):
    with ocp.StandardCheckpointer() as reader:
      moved = reader.restore(directory / "weights", target)
  manifest.check_digests(kept.get("digests"), moved, str(directory))
  return {**frozen, **moved}, step


def load_checkpoint(
  directory,
  *,
  dtype: str = "",
  max_positions: int = 0,
  tokenizer: bool = True,
  mesh: Mesh | None = None,
) -> Run:
  """A Hugging Face directory as a run: see `hf.config.read_config`.

  tokenizer: whether to read it; without it, it is None.
  """
  from spec_stream.hf import checkpoint as hf
  from spec_stream.hf import config as hf_config

  model = hf_config.read_config(
    directory, dtype=dtype, param_dtype=dtype, max_positions=max_positions
  )
  words = None
  if tokenizer:
    words = read_hf_tokenizer(directory)
    check_vocabulary(words, model.vocab_size, directory)
    model = _with_known(model, words)
  config = {"model": model_config.to_dict(model)}
  return Run(hf.load(directory, model, mesh), words, config, 0)


def load_run(workdir, step: int | None = None, mesh: Mesh | None = None) -> Run:
  """The model, tokenizer and settings of a run, at a step or the last one.

  Raises: UserError, one line, if any of them is missing or cannot be read.
  """
  config = read_config(workdir)
  where = f"{workdir}/config.json: model"
  model = model_config.from_dict(config["model"], where)
  tokenizer = read_tokenizer(workdir, model.vocab_size)
  model = _with_known(model, tokenizer)
  values, step = load_weights(workdir, model, step, mesh)
  kept, where = read_manifest(workdir, step), f"{workdir}, step {step}"
  manifest.check_tokenizer(kept, tokenizer, where)
  manifest.check_model(kept, config["model"], where)
  return Run(weights.to_model(model, values), tokenizer, config, step)


def _with_known(model: ModelConfig, tokenizer) -> ModelConfig:
  """The model whose padding is never drawn: checkpoints pad vocabularies."""
  # An end may lie behind the tokenizer's own: config files may say so.
  known = max(tokenizer.vocab_size, *(1 + end for end in tokenizer.eos_ids), 0)
  padded = known if known < model.vocab_size else 0
  return dataclasses.replace(model, known_tokens=padded)


def _abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


@contextlib.contextmanager
def _readable(directory: pathlib.Path):
  """Whatever orbax or tensorstore raises becomes one line with the path."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f"the checkpoint {directory} cannot be read ({_short(e)}); remove it to "
      "fall back on an earlier one, or train again in a new --workdir"
    ) from e


def _short(error: Exception, limit: int = 160) -> str:
  text = str(error).split(". See full TensorStore")[0]  # many lines of json
  text = " ".join(text.split()) or type(error).__name__
  return text if len(text) <= limit else text[: limit - 3] + "..."


def _silence():
  for name in _QUIET:
    logging.getLogger(name).setLevel(logging.ERROR)
