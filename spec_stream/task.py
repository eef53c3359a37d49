"""Prompts of a run's own task or of a file of questions, and what a result must
say about itself."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import secrets

import jax
import numpy as np

from spec_stream import checkpoints, requests
from spec_stream.checkpoints import Run
from spec_stream.data import chat_prompts
from spec_stream.errors import UserError
from spec_stream.models import config as model_config


@dataclasses.dataclass(frozen=True)
class Prompt:
  """category, turns: of a question; turns holds what its user says."""

  text: str
  token_ids: list[int]
  references: list[str]
  category: str = ""
  turns: tuple[str, ...] = ()


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
    data = run.config["data"]
    config = model_config.make(pipeline.DataConfig, data, "data")
  except (KeyError, TypeError, AttributeError) as e:
    raise UserError(f"config.json of the run names no data set: {e}") from e
  if config.dataset == "text_corpus":
    raise UserError("'text_corpus' has no prompts: it is for pretraining")
  found = {}
  for text, references in pipeline.prompts(config, split):
    ids = tuple(run.tokenizer.encode_prompt(text))
    found.setdefault(ids, Prompt(text, list(ids), references))
  return _choose(list(found.values()), count)


def _choose(found: list[Prompt], count: int) -> list[Prompt]:
  if count < 0:
    raise UserError(f"prompts={count} must be 0 (all) or more")
  if 0 < count < len(found):
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    found = [found[i] for i in sorted(chosen)]
  return found


def choose(
  run: Run,
  split: str,
  count: int,
  file: str = "",
  turns: int = 1,
  chat: bool = False,
  max_new_tokens: int = 128,
) -> tuple[dict, list[Prompt]]:
  """-> (what results say of the prompts, prompts): `prompts`, or `questions`.

  file: of questions, in place of the run's task; "": none. turns: 1, or 2 for
  `second_turns` as well.

  Raises: UserError.
  """
  if turns not in (1, 2):
    raise UserError(f"--turns={turns} must be 1 or 2")
  if not file:
    if chat or turns > 1:
      raise UserError("--chat and --turns go with --questions=FILE")
    found = prompts(run, split, count)
    return about(run) | {"split": split}, found
  name, found = questions(run, file, count, chat)
  if turns == 2:
    found += second_turns(run, found, max_new_tokens, chat)
  return about(run, name) | {"turns": turns, "chat": chat}, found


# -- questions ---------------------------------------------------------------


def questions(
  run: Run, path: str, count: int = 0, chat: bool = False
) -> tuple[str, list[Prompt]]:
  """-> (name, first turns) of a file of questions, as in `data.chat_prompts`.

  count: as in `prompts`. chat: each is put into the tokenizer's chat template;
  else it is plain text, or what `data.formats` makes of it if the run was
  trained on conversations. The name is "mt_bench", or that of another file.

  Raises: UserError for a bad file, or if there is no chat template.
  """
  if not os.path.isfile(path):
    raise UserError(f"--questions={path}: no such file")
  read = list(chat_prompts.read(path))
  found = {}
  for question in read:
    turns = tuple(turn.strip() for turn in question.turns)
    prompt = _ask(run, [("user", turns[0])], chat)
    prompt = dataclasses.replace(
      prompt, category=question.category, turns=turns
    )
    found.setdefault(tuple(prompt.token_ids), prompt)
  return chat_prompts.name(path, read), _choose(list(found.values()), count)


def second_turns(
  run: Run, firsts: list[Prompt], max_new_tokens: int, chat: bool = False
) -> list[Prompt]:
  """The second turns of questions that have one, after what the model itself
  answered to the first (plain and greedy, up to max_new_tokens)."""
  from spec_stream import evaluate
  from spec_stream.drafters.none import NoDraft

  firsts = [first for first in firsts if len(first.turns) > 1]
  if not firsts:
    return []
  answers = evaluate.decode_all(
    run.model,
    [first.token_ids for first in firsts],
    NoDraft(),
    batch=8,
    max_new_tokens=max_new_tokens,
    end_token=run.tokenizer.eos_ids,
  )
  found = {}
  for first, answer in zip(firsts, answers, strict=True):
    said = run.tokenizer.decode(answer.token_ids).strip()
    user = [("user", turn) for turn in first.turns[:2]]
    prompt = _ask(run, [user[0], ("assistant", said), user[1]], chat)
    prompt = dataclasses.replace(prompt, category=first.category)
    found.setdefault(tuple(prompt.token_ids), prompt)
  return list(found.values())


def _ask(run: Run, turns: list[tuple[str, str]], chat: bool) -> Prompt:
  """The prompt for the answer to (role, text) turns."""
  from spec_stream.data import formats

  trained_on = run.config.get("data", {}).get("dataset")
  text = turns[-1][1]
  if chat:
    return Prompt(text, requests.encode_chat(run.tokenizer, turns), [""])
  if len(turns) > 1 or trained_on == "conversations":
    text = formats.conversation(turns)
  return Prompt(text, run.tokenizer.encode_prompt(text), [""])


# -- results -----------------------------------------------------------------


def about(run: Run, dataset: str = "") -> dict:
  """What each result says: data, checkpoint, device, versions, date, and an id
  that the rows of one invocation share.

  dataset: where the prompts are from, if not the run's own.
  """
  now = datetime.datetime.now(datetime.UTC)
  return {
    "run_id": f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
    "dataset": dataset or run.config["data"]["dataset"],
    "step": run.step,
    "device": device_words(),
    "jax": jax.__version__,
    "commit": checkpoints.git_commit(),
    "date": f"{now:%Y-%m-%d %H:%M} UTC",
  }


def check_output(workdir: pathlib.Path, checkpoint: str, file: str):
  """Raises: UserError if results cannot go to `workdir`, or if there would be
  none: a checkpoint has no prompts but those of a `file` of questions."""
  if checkpoint and not file:
    raise UserError(
      "a checkpoint has no task of its own: give --questions=FILE"
    )
  if checkpoint and (workdir / "config.json").exists():
    raise UserError(
      f"--workdir={workdir} is a run of its own: with --checkpoint it is where "
      "the results go, so give another directory"
    )
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is a file: give a directory")


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
