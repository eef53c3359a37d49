"""The rows of results.jsonl: checked, by benchmark, and as lines of a chart."""

import itertools

from spec_stream.charts import NUM_COLOURS, Series
from spec_stream.errors import UserError

_NUMBERS = (
  "tree_nodes prompts tokens target_calls tokens_per_call ms_per_token "
  "ms_to_first_token tokens_per_second speedup speedup_low speedup_high "
  "speedup_request identical extra_params compile_seconds recompiles step_ms "
  "step_cost max_tie_margin noise_low noise_high predicted_speedup "
  "predicted_tokens_per_call predicted_step_cost tokens_per_call_low "
  "tokens_per_call_high"
).split()
_TEXTS = (
  "run_id dataset mode tree accept device dtype jax commit date command "
  "baseline draft_from mismatch"
).split()
_LISTS = ("tokens_per_call_by_position", "accept_by_depth")


def check(rows, path):
  """Refuses rows whose fields are of the wrong kind."""

  def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)

  for number, row in enumerate(rows, 1):
    where = f"{path}, record {number}"
    if not (isinstance(row.get("method"), str) and row["method"].strip()):
      raise UserError(f"{where}: there is no 'method'")
    for name in _TEXTS:
      if not isinstance(row.get(name), str | None):
        raise UserError(f"{where}: {name!r} is no text: {row[name]!r:.40}")
    for name in _NUMBERS:
      if row.get(name) is not None and not is_number(row[name]):
        raise UserError(f"{where}: {name!r} is no number: {row[name]!r:.40}")
    for name in _LISTS:
      values = row.get(name) or []
      if not isinstance(values, list) or not all(
        v is None or is_number(v) for v in values
      ):
        raise UserError(f"{where}: {name!r} is no list of numbers")


def by_run(rows):
  """-> [rows of one benchmark invocation], the newest last.

  Rows of an invocation share a run_id; rows without one stay together.
  """
  runs = {}
  for row in rows:
    key = str(row.get("run_id"))
    runs[key] = [*runs.pop(key, []), row]
  return list(runs.values())


def is_baseline(row):
  return row["method"].split()[0] == "none"


def is_noise(row):
  """Whether this is plain decoding a second time, timed against itself."""
  return "A against A" in row["method"]


def headline(rows):
  """The fastest row of streams, else of any drafter; None without one."""
  drafted = [r for r in rows if not is_baseline(r) and r.get("speedup")]
  own = [r for r in drafted if r["method"].split()[0] == "streams"]
  return max(own or drafted, key=lambda r: r["speedup"], default=None)


# -- lines of a chart ---------------------------------------------------------


def short_names(rows):
  """-> name of each row: the method, and tree or size where it has several."""
  names = []
  for row in rows:
    same = [r for r in rows if r["method"] == row["method"]]
    name = row["method"]
    if len({r.get("tree") for r in same}) > 1:
      name += f" {row.get('tree')}"
      same = [r for r in same if r.get("tree") == row.get("tree")]
    if len({r.get("tree_nodes") for r in same}) > 1:
      name += f", {row.get('tree_nodes')} nodes"
    names.append(name)
  return names


def by_row(rows, field, x_of, limit=7):
  """-> (a Series for each drafter's row with the list `field`, a note).

  x_of: index in the list -> x. Above `limit` rows, each method and tree shows
  its fastest row alone, and the note says so.
  """
  rows = [r for r in rows if r.get(field) and not is_baseline(r)]
  note = ""
  if len(rows) > limit:
    note = "each method and tree at its fastest number of nodes"
    fastest = {}
    for row in sorted(rows, key=lambda r: r.get("speedup") or 0):
      fastest[row["method"], row.get("tree")] = row
    rows = [r for r in rows if any(r is f for f in fastest.values())]
  return [
    Series(name, [x_of(i) for i in range(len(row[field]))], row[field], *style)
    for row, name, style in zip(rows, short_names(rows), _styles())
  ], note


def by_nodes(rows, field):
  """-> a Series for each method and tree, `field` against tree_nodes.

  Plain decoding is the point at one node.
  """
  series, lines = [], {}
  for row in rows:
    if row.get(field) is None or not row.get("tree_nodes"):
      continue
    point = (row["tree_nodes"], row[field])
    if not is_baseline(row):
      lines.setdefault((row["method"], row.get("tree")), []).append(point)
    elif not is_noise(row):
      series.append(Series(row["method"], [point[0]], [point[1]], 0))
  several = [method for method, _ in lines]
  for ((method, tree), points), style in zip(lines.items(), _styles()):
    name = f"{method} {tree}" if several.count(method) > 1 else method
    xs, ys = zip(*sorted(points))
    series.append(Series(name, [*xs], [*ys], *style))
  return series


def _styles():
  """Yields (colour, dashed): all colours but grey, then again with dashes."""
  for dashed in itertools.cycle((False, True)):
    for colour in range(1, NUM_COLOURS):
      yield colour, dashed
