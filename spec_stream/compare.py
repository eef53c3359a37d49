"""Runs side by side on the prompts of one task: quality, calls, speed, weights.

What a comparison is for is that quality of the same model, trained for as many
steps on the same data, with streams and without. `differences` says where that
does not hold, for each two runs of which neither began with the other. Runs of
lossless mode are left out: their text is that of their base.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from spec_stream import (
  checkpoints,
  evaluate,
  metrics,
  results,
  storage,
  text_table,
)
from spec_stream.bench_rows import extra_params
from spec_stream.checkpoints import Run
from spec_stream.decode import tokens_per_call
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.hf import config as hf_config
from spec_stream.models.config import FREE
from spec_stream.rules import LOSSY
from spec_stream.task import Prompt, device_words

# What decides which examples a step sees, and how many.
_SEEN = (
  "dataset manual_dir seq_len stream_positions batch_size packing too_long seed"
).split()
_SCORES = {
  "exact_match": "exact match",
  "rouge1": "ROUGE-1",
  "rougeLsum": "ROUGE-Lsum",
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A run or a Hugging Face directory, before its weights are read."""

  directory: str
  config: dict  # of config.json; {} for a checkpoint
  tokenizer: Any

  @property
  def is_checkpoint(self) -> bool:
    return not self.config

  @property
  def without_weights(self) -> Run:
    """As `load` gives it, but for the model."""
    steps = storage.steps(self.directory)
    step = steps[-1] if steps else 0
    return Run(None, self.tokenizer, self.config, step)

  def load(self, dtype: str) -> Run:
    """dtype: of a checkpoint's weights; a run has its own."""
    if self.is_checkpoint:
      return checkpoints.load_checkpoint(self.directory, dtype=dtype)
    return checkpoints.load_run(self.directory)


def find(directories: Sequence[str]) -> list[Entry]:
  """The entries, of which the first is the run whose task is decoded.

  Raises: UserError for what is no run, or if the tokenizers are not all the
  same: then neither tokens per call nor the prompts could be compared.
  """
  entries = []
  for directory in directories:
    if hf_config.is_checkpoint(directory):
      config, words = {}, checkpoints.read_hf_tokenizer(directory)
    else:
      config = checkpoints.read_config(directory)
      size = config["model"].get("vocab_size")
      words = checkpoints.read_tokenizer(directory, size)
    entries.append(Entry(str(directory), config, words))
  first = entries[0]
  if first.is_checkpoint:
    raise UserError(f"--workdir={first.directory} must be a run, with a task")
  names = [os.path.realpath(entry.directory) for entry in entries]
  for i, entry in enumerate(entries):
    if names[i] in names[:i]:
      raise UserError(f"{entry.directory} is given twice: compare it once")
    if entry.tokenizer.hash() != first.tokenizer.hash():
      raise UserError(
        f"{entry.directory} and {first.directory} have different tokenizers: "
        "only runs of one tokenizer can be compared"
      )
  return entries


def differences(entries: Sequence[Entry]) -> list[str]:
  """Where trained runs differ in steps, data or model, one line each.

  Left out: checkpoints, lossless mode, and two runs of which one began with the
  other.
  """
  trained = [
    entry
    for entry in entries
    if not entry.is_checkpoint and not _keeps_its_base(entry)
  ]
  pairs = [
    (a, b)
    for a, b in itertools.combinations(trained, 2)
    if a not in _began_with(b, entries) and b not in _began_with(a, entries)
  ]
  names = sorted({n for e in trained for n in e.config["model"]} - {*FREE})
  said = []
  for name, value in [
    ("steps", lambda e: e.without_weights.step),
    *[(f"data.{n}", lambda e, n=n: _seen(e, n)) for n in _SEEN],
    *[(f"model.{n}", lambda e, n=n: e.config["model"].get(n)) for n in names],
  ]:
    unlike = [pair for pair in pairs if value(pair[0]) != value(pair[1])]
    if unlike:
      found = [e for e in trained if any(e in pair for pair in unlike)]
      words = ", ".join(f"{e.directory} {value(e)}" for e in found)
      said.append(f"the runs differ in {name}: {words}")
  return said


def _keeps_its_base(entry: Entry) -> bool:
  streams = entry.config["model"].get("streams", {})
  lossless = streams.get("mode") == "lossless" and streams.get("num_streams")
  return bool(lossless) or _train(entry).get("trainable") == "drafter"


def _began_with(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
  """The entries that a run began with, directly or through others."""
  by_name = {os.path.realpath(e.directory): e for e in entries}
  found = []
  while start := _train(entry).get("init_from"):
    entry = by_name.get(os.path.realpath(start))
    if entry is None or entry in found:
      break
    found.append(entry)
  return found


def _train(entry: Entry) -> dict:
  return entry.config.get("train", {})


def _seen(entry: Entry, name: str):
  value = entry.config.get("data", {}).get(name)
  return os.path.realpath(value) if name == "manual_dir" and value else value


def row(
  entry: Entry,
  run: Run,
  prompts: Sequence[Prompt],
  dataset: str,
  split: str,
  drafter: StreamDraft,
  **settings,
) -> dict:
  """What a run does on the prompts: json-able, the scores of the task in it.

  Quality is that of plain decoding. With streams, they decode as well: then
  tokens_per_call is theirs, and `identical` the share of prompts with the same
  tokens (ties of the two most probable tokens may differ).

  Args:
    entry, run: of one directory, `run` being `entry.load`.
    prompts: they are encoded anew by this run's tokenizer.
    dataset: whose scores are taken; split: of the prompts.
    drafter: not yet resolved; used if the run has streams.
    settings: batch and max_new_tokens of `evaluate.decode_all`, and on_batch.
  """
  ids = [run.tokenizer.encode_prompt(p.text) for p in prompts]
  streams = run.model.config.streams
  settings["end_token"] = run.tokenizer.eos_ids
  resolved = drafter.resolve(run.model.config) if streams.num_streams else None
  plain = evaluate.decode_all(run.model, ids, NoDraft(), **settings)
  drafted, measured = plain, {}
  if resolved:
    drafted = evaluate.decode_all(run.model, ids, drafter, **settings)
    about = {"step": run.step, "dataset": dataset, "split": split}
    about |= {"dtype": run.model.config.dtype, "device": device_words()}
    measured = speed(entry, about, resolved)
  same = [a.token_ids == b.token_ids for a, b in zip(plain, drafted)]
  texts = [run.tokenizer.decode(g.token_ids) for g in plain]
  return {
    "name": entry.directory,
    "trained": trained(entry, run),
    "objective": _train(entry).get("objective"),
    "mode": streams.mode if streams.num_streams else None,
    "num_streams": streams.num_streams,
    "steps": run.step,
    **evaluate.score(dataset, texts, [p.references for p in prompts]),
    "tokens_per_call": tokens_per_call(drafted),
    "drafter": resolved.name if resolved else "none",
    "tree": resolved.tree.kind if resolved else None,
    "tree_nodes": resolved.num_nodes if resolved else 1,
    "accept": resolved.rule if resolved else "exact",
    "lossless": resolved is None or resolved.rule not in LOSSY,
    "identical": sum(same) / len(same) if resolved else None,
    "speedup": measured.get("speedup"),
    "speedup_low": measured.get("speedup_low"),
    "speedup_high": measured.get("speedup_high"),
    "speedup_batch": measured.get("batch"),
    "speedup_device": measured.get("device"),
    "speedup_run_id": measured.get("run_id"),
    "extra_params": extra_params(run.model, resolved or NoDraft()),
    "dtype": run.model.config.dtype,
  }


def trained(entry: Entry, run: Run) -> str:
  """How a run was trained, in a few words."""
  if entry.is_checkpoint:
    return "checkpoint"
  streams, train = run.model.config.streams, _train(entry)
  words = ["next token"]
  if streams.num_streams:
    words = [f"{streams.mode}, J={streams.num_streams}"]
  if train.get("trainable") == "adapters":
    rank = streams.lora_rank
    words.append(f"adapters of rank {rank}" if rank else "base frozen")
  return ", ".join(words)


def speed(entry: Entry, about: dict, drafter: StreamDraft) -> dict:
  """The newest row of the run's results.jsonl that measured this: greedy, one
  prompt at a time, this tree. {} if none did, or a tree of listed paths, which
  rows do not tell apart.

  about: further fields that must be the same: step, dataset, device and so on.
  """
  path = pathlib.Path(entry.directory) / "results.jsonl"
  if not path.exists() or drafter.tree.kind == "paths":
    return {}
  rows = metrics.read_jsonl(path)
  results.check(rows, path)
  asked = about | {
    "method": drafter.name,
    "batch": 1,
    "refill": False,
    "tree": drafter.tree.kind,
    "tree_nodes": drafter.num_nodes,
    "tree_width": drafter.tree.width,
    "num_streams": drafter.num_streams,
    "kept_nodes": drafter.prune.kept_nodes,
    "prune_threshold": drafter.prune.threshold,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "accept": drafter.rule,
  }
  # Of rows from before there were such settings.
  old = {"repetition_penalty": 1.0, "refill": False}
  for found in rows[::-1]:
    found = old | found
    if all(found.get(name) == value for name, value in asked.items()):
      return found
  return {}


def evaluate_all(
  entries: Sequence[Entry],
  prompts: Sequence[Prompt],
  split: str,
  drafter: StreamDraft,
  on_batch: Callable[[str], Callable[[int, int], None]],
  **settings,
) -> list[dict]:
  """`row` of each entry, one model in memory at a time.

  on_batch: name of a run -> its progress, called with (done, total).
  """
  first = entries[0].config
  rows = []
  for entry in entries:
    run = entry.load(first["model"].get("dtype", ""))
    progress = on_batch(entry.directory)
    dataset = first["data"]["dataset"]
    settings["on_batch"] = progress
    rows.append(row(entry, run, prompts, dataset, split, drafter, **settings))
    del run
  return rows


def render(rows: Sequence[dict]) -> str:
  """The rows as a table; "-" is what was not measured or does not apply."""
  cell = lambda value, form: "-" if value is None else form.format(value)
  column = lambda name, form: [cell(r.get(name), form) for r in rows]
  columns = {
    "run": column("name", "{}"),
    "trained": column("trained", "{}"),
    "steps": column("steps", "{:,}"),
  }
  for name, title in _SCORES.items():
    if name in rows[0]:
      columns[title] = column(name, "{:.2f}")
  columns |= {
    "nodes": column("tree_nodes", "{}"),
    "tokens/call": column("tokens_per_call", "{:.2f}"),
    "speed-up": column("speedup", "{:.2f}"),
    "identical": column("identical", "{:.1%}"),
    "extra weights": column("extra_params", "{:,}"),
  }
  return text_table.table(columns, ("run", "trained"))
