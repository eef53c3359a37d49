"""Runs on disk: a model with its settings and its tokenizer.

    <workdir>/config.json         model, data and train settings, git commit
    <workdir>/tokenizer.json      or tokenizer/, files of a checkpoint's

and what `storage` writes. `load_run` reads the weights alone, onto whatever
devices there are.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from spec_stream import json_text, manifest, sharding, storage, weights
from spec_stream.errors import UserError, short
from spec_stream.models import config as model_config
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer

# What `export` writes into tokenizer_config.json beside a tokenizer of this
# project, whose prompts are put between <bos> and <sep>.
OWN_TOKENIZER = {"prompt_format": "spec_stream.data.tokenizer"}


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
    raise UserError(f"{path} cannot be read as a tokenizer: {short(e)}") from e
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


def load_weights(workdir, config, step=None, mesh: Mesh | None = None):
  """-> (weights of a ModelConfig by path, step); the last step by default.

  mesh: where to put them; None: the first device.
  """
  found = storage.steps(workdir)
  if not found:
    raise UserError(f"{workdir} holds no complete checkpoint yet")
  step = found[-1] if step is None else step
  if step not in found:
    raise UserError(
      f"{workdir} has no checkpoint of step {step}; it has: "
      f"{', '.join(map(str, found))}"
    )
  target = abstract(config, mesh)
  frozen = storage.read_base(workdir, target)
  target = {path: x for path, x in target.items() if path not in frozen}
  moved = storage.read_weights(workdir, step, target)
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
  kept, where = storage.read_manifest(workdir, step), f"{workdir}, step {step}"
  manifest.check_tokenizer(kept, tokenizer, where)
  manifest.check_model(kept, config["model"], where)
  return Run(weights.to_model(model, values), tokenizer, config, step)


def _with_known(model: ModelConfig, tokenizer) -> ModelConfig:
  """The model whose padding is never drawn: checkpoints pad vocabularies."""
  # An end may lie behind the tokenizer's own: config files may say so.
  known = max(tokenizer.vocab_size, *(1 + end for end in tokenizer.eos_ids), 0)
  padded = known if known < model.vocab_size else 0
  return dataclasses.replace(model, known_tokens=padded)
