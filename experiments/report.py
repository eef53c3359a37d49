"""Any results.jsonl as CSV, a Markdown table, and plots with intervals.

  experiments/report.py --results=runs/stream_count --out=DIR --x=num_streams \\
    --y=tokens_per_call,speedup [--lines=tree_nodes] [--where=method=streams]

--results: files, or directories, whose results.jsonl below them are all taken.
Of a benchmark that was run twice the newest rows count. Writes DIR/results.csv
(all fields), DIR/results.md (the fields that differ, and what was measured) and
DIR/<y>_by_<x>.png.
"""

import csv
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "launch"))

from absl import flags

import common
from spec_stream import metrics, results

_RESULTS = flags.DEFINE_list(
  "results", None, "Files or directories, separated by commas."
)
_OUT = flags.DEFINE_string("out", None, "Directory of what is written.")
_X = flags.DEFINE_string("x", "", "Field of the horizontal axis; empty: none.")
_Y = flags.DEFINE_list(
  "y", ["tokens_per_call", "speedup"], "Fields to plot, one plot each."
)
_LINES = flags.DEFINE_list(
  "lines",
  ["method", "tree"],
  "Fields whose values are lines of a plot; one of one value is not named.",
)
_WHERE = flags.DEFINE_multi_string(
  "where", [], "FIELD=VALUE of the rows to take; may be given several times."
)
flags.mark_flags_as_required(["results", "out"])

MEASURED = (
  "tokens_per_call step_cost ms_per_token speedup speedup_request identical "
  "extra_params"
).split()
# Measured too, or of a row alone: no settings in which runs differ.
_OWN = {
  *MEASURED,
  *"run_id command date commit tokens target_calls ms_to_first_token".split(),
  *"tokens_per_second compile_seconds recompiles step_ms draft_ms".split(),
  *"draft_share max_tie_margin noise_low noise_high baseline".split(),
  *"mismatch predicted_speedup predicted_tokens_per_call".split(),
  *"predicted_step_cost step draft_length draft_from one_pass".split(),
}


def load(places: list[str]) -> list[dict]:
  """Rows of all files, with `run`, the file's directory below the place, and
  `pruning`.

  Raises: UserError for a place without results.
  """
  rows = []
  for place in map(pathlib.Path, places):
    found = sorted(place.rglob("results.jsonl")) if place.is_dir() else [place]
    if not (found and all(path.is_file() for path in found)):
      raise common.UserError(
        f"--results={place}: no results.jsonl is there; launch/benchmark.py "
        "and launch/sweep.py write them"
      )
    for path in found:
      run = path.parent.relative_to(place) if place.is_dir() else path.parent
      mine = metrics.read_jsonl(path)
      results.check(mine, path)
      newest = {row.get("command"): row.get("run_id") for row in mine}
      rows += [
        {
          "run": path.parent.name if str(run) == "." else str(run),
          "pruning": "pruned" if _is_pruned(row) else "not pruned",
          **row,
        }
        for row in mine
        if row.get("run_id") == newest[row.get("command")]
      ]
  return rows


def _is_pruned(row: dict) -> bool:
  return bool(row.get("kept_nodes") or row.get("prune_threshold"))


def select(rows: list[dict], where: list[str]) -> list[dict]:
  """Rows with these values. Raises: UserError for a field that none has."""
  for condition in where:
    field, _, value = condition.partition("=")
    known = {str(row[field]) for row in rows if field in row}
    if value not in known:
      raise common.UserError(
        f"--where={condition}: no such row; {field} is "
        f"{', '.join(sorted(known)) or 'no field of the results'}"
      )
    rows = [row for row in rows if str(row.get(field)) == value]
  return rows


def varied(rows: list[dict]) -> list[str]:
  """Settings in which rows differ, in the order of the rows' fields."""
  names = dict.fromkeys(name for row in rows for name in row)
  scalar = lambda x: not isinstance(x, (list, dict))
  return [
    name
    for name in names
    if name not in _OWN
    and not name.endswith(("_low", "_high"))
    and all(scalar(row.get(name)) for row in rows)
    and len({row.get(name) for row in rows}) > 1
  ]


def cell(row: dict, name: str) -> str:
  """One number with its interval, as the table has it."""
  value = row.get(name)
  if value is None:
    return ""
  if name == "identical":
    return f"{100 * value:g} %"
  if not isinstance(value, float):
    return f"{value:,}" if name == "extra_params" else str(value)
  low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
  interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
  return f"{value:.2f}{interval}"


def markdown(rows: list[dict]) -> str:
  names = [*varied(rows), *(n for n in MEASURED if any(n in r for r in rows))]
  lines = [names, ["---"] * len(names)]
  lines += [[cell(row, name) for name in names] for row in rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_csv(path: pathlib.Path, rows: list[dict]):
  names = dict.fromkeys(name for row in rows for name in row)
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)


def lines_of(rows: list[dict], x: str, y: str, lines: list[str]) -> dict:
  """{label: [(x, y, low, high)]}; plain decoding is not drawn.

  Raises: UserError for fields that no row has, or that are no numbers.
  """
  number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
  drawn = [row for row in rows if not results.is_baseline(row)]
  for field in (x, y):
    if not any(number(row.get(field)) for row in drawn):
      names = {n for row in drawn for n, v in row.items() if number(v)}
      raise common.UserError(
        f"'{field}' is no number of the results: {', '.join(sorted(names))}"
      )
  told = [f for f in lines if len({row.get(f) for row in drawn}) > 1]
  found = {}
  for row in drawn:
    if number(row.get(x)) and number(row.get(y)):
      label = ", ".join(
        str(value)
        if isinstance(value := row.get(f), str)
        else f"{f.replace('_', ' ')} {value}"
        for f in told
      )
      low, high = row.get(f"{y}_low"), row.get(f"{y}_high")
      known = low is not None and high is not None
      ends = (low, high) if known else (row[y], row[y])
      found.setdefault(label, []).append((row[x], row[y], *ends))
  return {label: sorted(points) for label, points in found.items()}


def plot(path: pathlib.Path, lines: dict, x: str, y: str):
  """A line a label; bars are the 95 % intervals."""
  try:
    import matplotlib
  except ImportError as e:
    raise common.UserError(
      "plots need matplotlib (pip install matplotlib); without --x there are "
      "none"
    ) from e
  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
  for label, points in lines.items():
    xs, ys, lows, highs = map(list, zip(*points))
    spread = [
      [max(v - low, 0) for v, low in zip(ys, lows)],
      [max(high - v, 0) for v, high in zip(ys, highs)],
    ]
    if not any(map(sum, spread)):  # none is known: no bars of no width
      spread = None
    axes.errorbar(
      xs, ys, spread, label=label, marker="o", markersize=4, capsize=3, lw=1.5
    )
  if len(lines) > 1:
    axes.legend(frameon=False, fontsize="small")
  if y.startswith("speedup"):
    axes.axhline(1.0, color="grey", lw=1, ls="--")
  every = sorted({point[0] for points in lines.values() for point in points})
  if len(every) <= 12 and all(isinstance(v, int) for v in every):
    axes.set_xticks(every)
  axes.set_xlabel(x.replace("_", " "))
  axes.set_ylabel(y.replace("_", " "))
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def main(argv):
  del argv
  rows = load(_RESULTS.value)
  rows = [row for row in rows if not results.is_noise(row)]
  rows = select(rows, _WHERE.value)
  if not rows:
    raise common.UserError(f"--results={','.join(_RESULTS.value)}: no rows")
  plots = {}
  if _X.value:  # all that can be wrong comes before anything is written
    for y in _Y.value:
      plots[y] = lines_of(rows, _X.value, y, _LINES.value)
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  for y, lines in plots.items():
    plot(out / f"{y}_by_{_X.value}.png", lines, _X.value, y)
  write_csv(out / "results.csv", rows)
  (out / "results.md").write_text(markdown(rows), encoding="utf-8")
  print(markdown(rows), end="")


if __name__ == "__main__":
  common.run(main)
