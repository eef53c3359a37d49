"""One page that shows a run: what was measured, how, and what it looked like.

Reads what lies in a workdir (config.json, metrics.jsonl, results.jsonl,
trace.json) and writes one self-contained HTML file. What is not there is said
on the page, with the command that makes it; what is there and broken is an
error that names the file and the line.
"""

import dataclasses
import datetime
import pathlib

from spec_stream import (
  charts,
  json_text,
  page,
  results,
  results_table,
  trace_view,
  training_curves,
)
from spec_stream.charts import escape
from spec_stream.errors import UserError
from spec_stream.metrics import read_jsonl


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """The files of one run, checked; an absent one is empty or None."""

  workdir: pathlib.Path
  config: dict
  metrics: list
  results: list  # of benchmark invocations, oldest first: lists of rows
  trace: dict | None
  date: str  # of the newest benchmark, or of the newest file there is


def read(workdir):
  """-> RunFiles.

  Raises:
    UserError: no such directory, or a file in it cannot be understood.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise UserError(f"{workdir}: no such run; give the --workdir of a run")

  def lines(name):
    path = workdir / name
    return (path, read_jsonl(path)) if path.exists() else (path, [])

  config = {}
  if (workdir / "config.json").exists():
    from spec_stream import checkpoints

    config = checkpoints.read_config(workdir)
  path, metrics = lines("metrics.jsonl")
  training_curves.check(metrics, path)
  path, rows = lines("results.jsonl")
  results.check(rows, path)
  path, trace = workdir / "trace.json", None
  if path.exists():
    try:
      text = path.read_text(encoding="utf-8")
      trace = json_text.parse(text, parse_constant=lambda _: None)
    except ValueError as error:  # not JSON, or not UTF-8
      raise UserError(f"{path}: not JSON ({error})") from error
    trace_view.check(trace, path)
  runs = results.by_run(rows)
  return RunFiles(workdir, config, metrics, runs, trace, _date(workdir, runs))


def write(workdir, out=None):
  """Writes the page; -> its path (by default <workdir>/report.html)."""
  text = render(read(workdir))
  out = pathlib.Path(out or pathlib.Path(workdir) / "report.html")
  if out.is_dir():
    raise UserError(f"{out} is a directory; --out names the file to write")
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(text, encoding="utf-8")
  return out


def render(run):
  """RunFiles -> the page as text."""
  newest = run.results[-1] if run.results else []
  body = [
    _header(run, newest),
    results_table.tiles(newest),
    _results(run, newest),
    _along(run, newest),
    _trace(run),
    _cost(run, newest),
    training_curves.section(run.metrics, run.workdir),
    '<p class="note">Written by <code>'
    f"{escape(f'launch/report.py --workdir={run.workdir}')}</code></p>",
  ]
  return page.page(f"spec_stream: {run.workdir.name}", "\n".join(body))


# -- reading -----------------------------------------------------------------


def _date(workdir, runs):
  """What the newest rows say, else when the newest file was written (UTC)."""
  said = [row["date"] for row in runs[-1] if row.get("date")] if runs else []
  if said:
    return str(said[-1])
  names = ("results.jsonl", "metrics.jsonl", "trace.json", "config.json")
  for name in names:
    if (workdir / name).exists():
      seconds = (workdir / name).stat().st_mtime
      when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
      return when.strftime("%Y-%m-%d %H:%M UTC")
  return ""


def _size(config):
  """-> words for the size of the model in config.json."""
  try:
    from spec_stream import weights
    from spec_stream.models import config as model_config

    model = model_config.from_dict(config["model"], "config.json: model")
    size = sum(x.size for x in weights.shapes(model).values())
  except (TypeError, KeyError, AttributeError) as error:
    raise UserError(f"config.json describes no model: {error}") from error
  return (
    f"{charts.significant(size / 1e6)} M weights, "
    f"{model.num_layers} layers of width {model.width}"
  )


# -- sections ----------------------------------------------------------------


def _header(run, newest):
  config = run.config
  row = newest[-1] if newest else {}
  model = config.get("model", {})
  streams = model.get("streams", {}) if isinstance(model, dict) else {}
  data = config.get("data", {})
  facts = {
    "data": row.get("dataset") or data.get("dataset"),
    "mode": row.get("mode") or streams.get("mode"),
    "model": _size(config) if model else None,
    "streams": _stream_words(streams),
    "device": row.get("device"),
    "commit of the model": config.get("commit"),
    "commit of the benchmark": row.get("commit"),
    "date": run.date,
  }
  if facts["commit of the model"] == facts["commit of the benchmark"]:
    facts["commit"] = facts.pop("commit of the model")
    del facts["commit of the benchmark"]
  items = "".join(
    f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
    for name, value in facts.items()
    if value not in (None, "")
  )
  return (
    f"<header><h1>{escape(run.workdir.name)}</h1>"
    '<p class="lead">Speculative Streaming: one model drafts a tree of tokens '
    "and verifies it in the same forward pass.</p>"
    f'<dl class="facts">{items}</dl></header>'
  )


def _stream_words(streams):
  if not streams.get("num_streams"):
    return None
  return (
    f"{streams['num_streams']} in the top "
    f"{streams.get('num_stream_layers', '?')} layers"
  )


_SAID = ("dataset", "mode", "device")  # the header has these of the newest


def _results(run, newest):
  if not run.results:
    text = page.missing(
      "no benchmark of this run",
      f"launch/benchmark.py --workdir={run.workdir} --drafters=none,streams",
    )
    return page.section("Results", text)
  older = "".join(
    f"<details><summary>benchmark {escape(rows[0].get('run_id', '?'))}, "
    f"{len(rows)} rows</summary>{results_table.table(rows)}</details>"
    for rows in reversed(run.results[:-1])
  )
  if older:
    older = f"<h3>Older benchmarks of this run</h3>{older}"
  table = results_table.table(newest, _SAID)
  return page.section("Results", table, results_table.notes(newest), older)


def _along(run, newest):
  """Tokens per call along the output, and acceptance by depth."""
  title = "Tokens per call along the output"
  lines, note = results.by_row(
    newest, "tokens_per_call_by_position", lambda i: 8 * i + 3.5
  )
  if not _any_point(lines):
    how = f"launch/benchmark.py --workdir={run.workdir}"
    return page.section(
      title, page.missing("no row says how it went by position", how)
    )
  bins = max(len(s.xs) for s in lines)
  figures = charts.line_chart(
    "Tokens per call by place in the output",
    lines,
    x_label="position in the output (tokens, means over 8)",
    y_label="tokens per call",
    x_ticks=[8 * i for i in range(bins + 1)],
    y_low=1,
    reference=(1, "plain decoding"),
    note=note,
  )
  depths, note = results.by_row(newest, "accept_by_depth", lambda i: i + 1)
  if _any_point(depths):
    figures += charts.line_chart(
      "Acceptance by depth of the tree",
      depths,
      x_label="depth in the tree (tokens after the root)",
      y_label="of the calls accept a token this deep",
      x_ticks=list(range(1, max(len(s.xs) for s in depths) + 1)),
      y_low=0,
      y_high=1,
      y_percent=True,
      note=note,
    )
  return page.section(title, f'<div class="charts">{figures}</div>')


def _trace(run):
  title = "One prompt, call by call"
  if run.trace is None:
    how = f"launch/benchmark.py --workdir={run.workdir}"
    return page.section(title, page.missing("no trace of a prompt", how))
  return page.section(title, trace_view.render(run.trace))


def _cost(run, newest):
  """Step cost and tokens per call against the number of tree nodes."""
  title = "What a larger tree costs, and what it brings"
  cost = results.by_nodes(newest, "step_cost")
  gain = results.by_nodes(newest, "tokens_per_call")
  nodes = sorted({1, *(x for s in cost + gain for x in s.xs)})
  if len(nodes) < 3:
    return page.section(
      title,
      page.missing(
        "trees of more than one size",
        f"launch/benchmark.py --workdir={run.workdir} --tree_nodes=4,8,16",
      ),
    )
  figures = ""
  for words, series, y_label, line in (
    ("Cost of a verify step", cost, "plain steps", "one plain step"),
    ("Tokens per call", gain, "tokens per call", "plain decoding"),
  ):
    if _any_point(series):
      figures += charts.line_chart(
        words,
        series,
        x_label="tree nodes, root included",
        y_label=y_label,
        x_ticks=nodes,
        y_low=1,
        reference=(1, line),
      )
  note = (
    '<p class="note">Decoding gets faster where the tokens per call exceed '
    "the cost of a step: their ratio is the speed-up, but for the time "
    "between steps.</p>"
  )
  return page.section(title, f'<div class="charts">{figures}</div>', note)


def _any_point(series):
  return any(y is not None for s in series for y in s.ys)
