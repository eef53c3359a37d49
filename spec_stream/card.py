"""The model card of an exported run: data, settings, and measured numbers.

Numbers are those that launch/benchmark.py and launch/evaluate.py left in the
run's directory for the very checkpoint that is exported; what was not measured
says so. Paths of the machine are not told.
"""

import pathlib

from spec_stream import (
  evaluate,
  json_text,
  metrics,
  results,
  text_table,
  weights,
)
from spec_stream.checkpoints import Run
from spec_stream.errors import UserError
from spec_stream.hf import config as hf_config
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import num_params

ATTENDS = (
  "its main stream attends to its own streams (eq. 1 of the paper), which no "
  "other library knows: spec_stream decodes this model as it was trained, "
  "transformers loads its weights but leaves that attention out, so its logits "
  "there are not the same"
)
_SETTINGS = {
  "data": "dataset seq_len stream_positions batch_size",
  "train": "objective trainable learning_rate schedule warmup_steps "
  "main_weight stream_weight target weight_decay seed",
  "streams": "mode num_streams num_stream_layers main_attends_streams "
  "stream_id stream_position lora_rank lora_alpha lora_layers prune_rank",
}


def card(run: Run, out, workdir, use: str, notes=()) -> str:
  """README.md of an exported directory.

  Args:
    run: what is exported.
    out: the directory.
    workdir: the run's own, for its numbers; None: none are known.
    use: how the directory is loaded, in Markdown.
    notes: what a reader must know before that, one sentence each.
  """
  model, base = run.model.config, base_name(run.config)
  name = pathlib.Path(out).resolve().name
  added = num_params(run.model, *weights.ADAPTERS)
  total = num_params(run.model) - (
    num_params(run.model.drafter) if run.model.drafter else 0
  )
  about = f"{total:,} weights"
  if added:
    about += f", {added:,} of them streams and adapters"
  about += f"; step {run.step} of launch/train.py"
  if run.config.get("commit"):
    about += f", commit {run.config['commit']}"
  head = ["---", "tags:", "- speculative-streaming", "- spec_stream"]
  head += [f"base_model: {base}"] if base else []
  lines = [*head, "---", f"# {name}", ""]
  lines += [
    "Trained with [Speculative Streaming](https://arxiv.org/abs/2402.11131) by "
    f"spec_stream. {about}.",
    "",
  ]
  lines += [f"**Note:** {note}.\n" for note in notes]
  lines += ["## Use", "", use, "", "## Trained", "", _settings(run, model)]
  lines += ["## Measured", "", _measured(run, workdir)]
  return "\n".join(lines).rstrip() + "\n"


def base_name(config: dict) -> str:
  """What a run began with, without its path; "" for nothing."""
  start = config.get("train", {}).get("init_from", "")
  return pathlib.Path(start).resolve().name if start else ""


def model_type_of(config: dict) -> str:
  """model_type of the checkpoint that a run began with, if through other runs;
  "" without one, or if it is no longer there."""
  seen = set()
  while True:
    start = config.get("train", {}).get("init_from", "")
    if not start or start in seen:
      return ""
    seen.add(start)
    try:
      config = hf_config.read_json(pathlib.Path(start) / "config.json")
    except UserError:
      return ""
    if "model_type" in config:
      return config["model_type"]


def merged_use(config: ModelConfig, own_tokenizer: bool) -> str:
  """How a directory of whole weights is loaded."""
  lines = [
    "    python launch/generate.py --checkpoint=THIS_DIRECTORY --prompt=...",
    "",
    "decodes with its streams, token for token what plain decoding gives; "
    "`transformers` reads the same directory (without `streams.*`) and decodes "
    "plainly.",
  ]
  if not config.streams.num_streams:
    lines[2] = "and `transformers` read it."
  if own_tokenizer:
    lines += [
      "",
      "A prompt is `<bos> prompt <sep>`, and an answer ends with `<eos>`: with "
      "`transformers` put those ids around it yourself.",
    ]
  return "\n".join(lines)


def _settings(run: Run, model: ModelConfig) -> str:
  streams = run.config.get("model", {}).get("streams", {})
  if not model.streams.num_streams:
    streams = {n: x for n, x in streams.items() if n.startswith("lora_")}
  groups = {**run.config, "streams": streams}
  lines = ["| setting | value |", "|---|---|"]
  base = base_name(run.config)
  lines += [f"| started from | {base} |"] if base else []
  lines += [f"| steps | {run.step} |", f"| base weights | {_dtype(model)} |"]
  for group, names in _SETTINGS.items():
    for name in names.split():
      value = groups.get(group, {}).get(name)
      if value not in (None, ""):
        lines.append(f"| {group}.{name} | {value} |")
  return "\n".join([*lines, ""])


def _dtype(model: ModelConfig) -> str:
  return f"{model.param_dtype}, computed in {model.dtype}"


def _measured(run: Run, workdir) -> str:
  parts = []
  if workdir is not None:
    workdir = pathlib.Path(workdir)
    parts = [x for x in (_quality(run, workdir), _speed(run, workdir)) if x]
  return "\n\n".join(parts) or "Neither speed nor quality was measured."


def _quality(run: Run, workdir: pathlib.Path) -> str:
  path = workdir / "quality.json"
  if not path.is_file():
    return "Quality was not measured."
  try:
    found = json_text.parse(path.read_text(encoding="utf-8"))
    if found["step"] != run.step:
      return f"Quality was measured at step {found['step']} only."
    return (
      f"{evaluate.words(found)}; {found['prompts']} {found['split']} prompts "
      f"of {found['dataset']}, greedy, {found['cut']} cut short "
      f"({found['date']})."
    )
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{path} is not as launch/evaluate.py wrote it: {e}") from e


def _speed(run: Run, workdir: pathlib.Path) -> str:
  path = workdir / "results.jsonl"
  if not path.is_file():
    return "Speed was not measured."
  rows = metrics.read_jsonl(path)
  results.check(rows, path)
  rows = [row for row in rows if row.get("step") == run.step]
  if not rows:
    return f"Speed was not measured at step {run.step}."
  newest = results.by_run(rows)[-1]
  first = newest[0]
  table = "\n".join("    " + x for x in text_table.render(newest).splitlines())
  where = ", ".join(
    str(first[name])
    for name in ("device", "dtype", "date")
    if first.get(name) is not None
  )
  return (
    f"{first.get('prompts')} prompts of {first.get('dataset')}, batch "
    f"{first.get('batch')}, temperature {first.get('temperature')} ({where}):"
    f"\n\n{table}"
  )
