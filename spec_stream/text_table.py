"""Rows of results.jsonl as an aligned table for a terminal."""

from collections.abc import Sequence


def _number(name: str, form: str):
  return lambda row: "" if row.get(name) is None else form.format(row[name])


def _speedup(row: dict) -> str:
  if row.get("speedup") is None:
    return ""
  return "{speedup:.2f} [{speedup_low:.2f}, {speedup_high:.2f}]".format(**row)


COLUMNS = {
  "method": lambda row: row["method"],
  "tree": lambda row: row.get("tree") or "",
  "nodes": _number("tree_nodes", "{}"),
  "tokens/call": _number("tokens_per_call", "{:.2f}"),
  "step cost": _number("step_cost", "{:.2f}"),
  "ms/token": _number("ms_per_token", "{:.3g}"),
  "ms to first": _number("ms_to_first_token", "{:.3g}"),
  "tokens/s": _number("tokens_per_second", "{:,.0f}"),
  "speed-up": _speedup,
  "request": _number("speedup_request", "{:.2f}"),
  "identical": _number("identical", "{:.1%}"),
  "margin": _number("max_tie_margin", "{:.0e}"),
  "recompiles": _number("recompiles", "{}"),
}
_LEFT = ("method", "tree")


def render(rows: Sequence[dict]) -> str:
  """The table as text; a column that no row fills is left out."""
  columns = {
    name: cells
    for name, cell in COLUMNS.items()
    if any(cells := [cell(row) for row in rows])
  }
  widths = {n: max(map(len, [n, *cells])) for n, cells in columns.items()}
  side = lambda n, text: (
    text.ljust(widths[n]) if n in _LEFT else text.rjust(widths[n])
  )
  lines = ["  ".join(side(n, n) for n in columns)]
  for i in range(len(rows)):
    lines.append("  ".join(side(n, cells[i]) for n, cells in columns.items()))
  return "\n".join(line.rstrip() for line in lines)
