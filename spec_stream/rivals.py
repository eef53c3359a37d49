"""The weights of a benchmark's drafters, for one and the same target.

A drafter with weights is trained in a run of its own, beside a target that it
leaves as it is. To compare several, each is taken from its run and put beside
the target of another, which must be the same to the bit.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from spec_stream import checkpoints, weights
from spec_stream.checkpoints import Run
from spec_stream.drafters import registry
from spec_stream.errors import UserError
from spec_stream.models.transformer import merge_lora


def find(name: str, directory: str, run: Run, workdir) -> str:
  """Where the weights of a drafter are: the directory that was given, or
  <workdir>/drafters/<name>; "" if it has none or they are the run's own."""
  if directory:
    return directory
  drafter, beside = registry.get(name), pathlib.Path(workdir, "drafters", name)
  has_weights = drafter.Module is not None or name == "draft_model"
  if not has_weights or run.model.config.drafter.name == name:
    return ""
  return str(beside) if beside.is_dir() else ""


def load(name: str, directory: str, run: Run):
  """The drafter's own weights from a run of `launch/train.py`.

  Raises: UserError if that run has none, or was trained beside another target
  or with another tokenizer.
  """
  drafter = registry.get(name)
  if drafter.Module is None and name != "draft_model":
    raise UserError(f"{name}={directory}: {name} has no weights to load")
  other = checkpoints.load_run(directory)
  if run.tokenizer and other.tokenizer.hash() != run.tokenizer.hash():
    raise UserError(
      f"{name}={directory} has another tokenizer than the target: drafts would "
      "be words of another language"
    )
  if name == "draft_model":
    return other.model
  theirs = other.model.config.drafter.name
  if theirs != name:
    raise UserError(
      f"{name}={directory} was trained "
      + (f"with {theirs}" if theirs else "without a drafter")
      + f", not {name} (model.drafter.name)"
    )
  _check_target(name, directory, run, other)
  return other.model.drafter


def load_all(asked: Mapping[str, str], run: Run, workdir) -> dict:
  """{name: (weights, directory)} of the drafters that have weights elsewhere.

  asked: name -> directory, "" where none was given.
  """
  found = {}
  for name, directory in asked.items():
    directory = find(name, directory, run, workdir)
    if directory:
      found[name] = load(name, directory, run), directory
  return found


def _check_target(name: str, directory: str, run: Run, other: Run):
  """Raises: UserError unless both runs decode plainly alike, to the bit."""
  config, mine = run.model.config, weights.to_weights(merge_lora(run.model))
  theirs = weights.to_weights(merge_lora(other.model))
  beside = set(mine) - weights.adapters(config)
  if config.streams.mode == "shared":  # what was not folded in counts as well
    beside |= {p for p in mine if "/lora_" in p}
  if config.streams.attends:  # then they are part of plain decoding
    beside |= {p for p in mine if p.startswith("streams/")}
  for path in sorted(beside):
    there = theirs.get(path)
    if there is None or not np.array_equal(mine[path], there):
      raise UserError(
        f"{name}={directory} was trained beside another target: its {path} is "
        "not that of this run"
      )
