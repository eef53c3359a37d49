"""The prompts of a run's own task, and what a result must say about itself."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import secrets

import jax
import numpy as np

from spec_stream import checkpoints
from spec_stream.checkpoints import Run
from spec_stream.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
  text: str
  token_ids: list[int]
  references: list[str]


def prompts(run: Run, split: str, count: int = 0) -> list[Prompt]:
  """Prompts of a split, none twice; `count` of them at random, 0 for all.

  The choice is the same in each run: seeded, and a prefix of that of a larger
  count. (The first prompts would not do: data sets come sorted.)

  Raises: UserError for an unknown split, or a data set without prompts.
  """
  from spec_stream.data import pipeline

  splits = ("train", "validation", "test")
  if split not in splits:
    raise UserError(f"unknown split '{split}': use one of {', '.join(splits)}")
  try:
    config = pipeline.DataConfig(**run.config["data"])
  except (KeyError, TypeError) as e:
    raise UserError(f"config.json of the run names no data set: {e}") from e
  if config.dataset == "text_corpus":
    raise UserError("'text_corpus' has no prompts: it is for pretraining")
  found = {}
  for text, references in pipeline.prompts(config, split):
    ids = tuple(run.tokenizer.encode_prompt(text))
    found.setdefault(ids, Prompt(text, list(ids), references))
  found = list(found.values())
  if count < 0:
    raise UserError(f"prompts={count} must be 0 (all) or more")
  if 0 < count < len(found):
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    found = [found[i] for i in sorted(chosen)]
  return found


def about(run: Run) -> dict:
  """What each result says: data, checkpoint, device, versions, date, and an id
  that the rows of one invocation share."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    "run_id": f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
    "dataset": run.config["data"]["dataset"],
    "step": run.step,
    "device": device_words(),
    "jax": jax.__version__,
    "commit": checkpoints.git_commit(),
    "date": f"{now:%Y-%m-%d %H:%M} UTC",
  }


def device_words() -> str:
  """The accelerator, if there is one, and the processor with its cores."""
  device = jax.devices()[0]
  name = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo") as file:
      names = [x.split(":", 1)[1] for x in file if x.startswith("model name")]
    name = " ".join(names[0].split()) if names else name
  except OSError:
    pass  # not Linux
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # not Linux
    cores = os.cpu_count()
  words = f"{device.platform}: {name}, {cores} cores"
  if device.platform != "cpu":
    words = f"{device.device_kind} (host {name}, {cores} cores)"
  return words


def write_json(path: pathlib.Path, value: dict):
  """Replaces the file at once, so that a reader never sees half of it."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
  temporary.replace(path)
