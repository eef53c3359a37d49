"""Aligned tables for a terminal, such as that of rows of results.jsonl."""

from collections.abc import Collection, Mapping, Sequence

from spec_stream.bench import Measured


def _number(name: str, form: str):
  return lambda row: "" if row.get(name) is None else form.format(row[name])


def _speedup(row: dict) -> str:
  if row.get("speedup") is None:
    return ""
  if row.get("speedup_low") is None:
    return "{speedup:.2f}".format(**row)
  return "{speedup:.2f} [{speedup_low:.2f}, {speedup_high:.2f}]".format(**row)


COLUMNS = {
  "method": lambda row: row["method"],
  "tree": lambda row: row.get("tree") or "",
  "nodes": _number("tree_nodes", "{}"),
  "tokens/call": _number("tokens_per_call", "{:.2f}"),
  "step cost": _number("step_cost", "{:.2f}"),
  "drafting": _number("draft_share", "{:.0%}"),
  "ms/token": _number("ms_per_token", "{:.3g}"),
  "ms to first": _number("ms_to_first_token", "{:.3g}"),
  "tokens/s": _number("tokens_per_second", "{:,.0f}"),
  "speed-up": _speedup,
  "predicted": _number("predicted_speedup", "{:.2f}"),
  "request": _number("speedup_request", "{:.2f}"),
  "identical": _number("identical", "{:.1%}"),
  "margin": _number("max_tie_margin", "{:.0e}"),
  "recompiles": _number("recompiles", "{}"),
  "extra weights": _number("extra_params", "{:,}"),
}
LEFT = ("run", "method", "tree")


def render(rows: Sequence[dict]) -> str:
  """The table as text; a column that no row fills is left out."""
  cells = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
  return table({n: texts for n, texts in cells.items() if any(texts)}, LEFT)


def table(
  columns: Mapping[str, Sequence[str]], left: Collection[str] = ()
) -> str:
  """Columns of texts, by name, as lines of equal width.

  left: the columns that are flush left; numbers are flush right.
  """
  widths = {n: max(map(len, [n, *texts])) for n, texts in columns.items()}
  side = lambda n, text: (
    text.ljust(widths[n]) if n in left else text.rjust(widths[n])
  )
  rows = [columns.keys(), *zip(*columns.values(), strict=True)]
  lines = ["  ".join(map(side, columns, row)) for row in rows]
  return "\n".join(line.rstrip() for line in lines)


def by_category(results: Sequence[Measured], categories: Sequence[str]) -> str:
  """Tokens per call of each drafter, one row for each category of prompts.

  categories: of each prompt that was measured, in their order.
  """
  kinds = list(dict.fromkeys(categories))
  columns = {
    "category": kinds,
    "prompts": [str(categories.count(kind)) for kind in kinds],
  }
  for result in results:
    if result.drafter.num_nodes == 1:
      continue  # always one
    tokens, calls = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    for kind, made in zip(categories, result.generations, strict=True):
      tokens[kind] += len(made.token_ids)
      calls[kind] += made.target_calls
    name = f"{result.method.name}, {result.drafter.num_nodes} nodes"
    columns[name] = [f"{tokens[k] / calls[k]:.2f}" for k in kinds]
  return table(columns, ("category",))
