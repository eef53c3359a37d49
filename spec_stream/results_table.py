"""The rows of one benchmark as a table, with what a reader must know of it.

A column stands in the table where rows differ in it; what all rows share is
said once above it. Columns that no row has are left out.
"""

from spec_stream.charts import count, escape, percent, ratio, significant
from spec_stream.results import headline
from spec_stream.rules import LOSSY

# Setting -> its name on the page. Above the table, or a column if rows differ.
SETTINGS = {
  "dataset": "data",
  "split": "split",
  "mode": "mode",
  "step": "step of the checkpoint",
  "num_streams": "streams",
  "num_stream_layers": "stream layers",
  "accept": "acceptance",
  "temperature": "temperature",
  "top_k": "top k",
  "top_p": "top p",
  "min_p": "min p",
  "repetition_penalty": "penalty",
  "batch": "batch",
  "prompts": "prompts",
  "refill": "rows refilled",
  "repeats": "repeats",
  "max_new_tokens": "most new tokens",
  "tree_width": "tree width",
  "kept_nodes": "nodes kept by pruning",
  "prune_threshold": "pruning threshold",
  "one_pass": "streams in the pass that verifies",
  "panels": "panels.cc multiplies",
  "baseline": "timed against",
  "dtype": "dtype",
  "matmul_precision": "matmul precision",
  "device": "device",
  "jax": "jax",
  "commit": "commit",
  "seed": "seed",
  "date": "date",
  "command": "command",
}
_OFF = {
  "top_k": 0,
  "top_p": 1,
  "min_p": 0,
  "repetition_penalty": 1,
  "kept_nodes": 0,
  "prune_threshold": 0,
  "refill": False,
}


def _speedup(row):
  text = ratio(row["speedup"])
  low, high = row.get("speedup_low"), row.get("speedup_high")
  if low is None or high is None:
    return text
  return f"{text} <small>{low:.2f}–{high:.2f}</small>"


def _field(name, show):
  """A cell of one field; None where the row does not have it."""
  return lambda row: None if row.get(name) is None else show(row[name])


COLUMNS = {
  "tree": _field("tree", escape),
  "nodes": _field("tree_nodes", count),
  "tokens per call": _field("tokens_per_call", "{:.2f}".format),
  "step cost": _field("step_cost", ratio),
  "drafting": _field("draft_share", percent),
  "speed-up, decoding": lambda row: (
    None if row.get("speedup") is None else _speedup(row)
  ),
  "speed-up, request": _field("speedup_request", ratio),
  "identical": _field("identical", percent),
  "margin where not": _field("max_tie_margin", "{:.1e}".format),
  "ms per token": _field("ms_per_token", significant),
  "ms to first": _field("ms_to_first_token", significant),
  "tokens/s": _field("tokens_per_second", significant),
  "tokens": _field("tokens", count),
  "extra weights": _field("extra_params", count),
  "compile, s": _field("compile_seconds", "{:.1f}".format),
  "recompiles": _field("recompiles", count),
}
_LEFT = ("tree",)
_OFTEN_SHARED = ("tokens", "extra weights", "compile, s", "recompiles")


def _setting(value):
  return f"{value:g}" if isinstance(value, float) else escape(value)


def _shared(rows):
  """-> (settings that all rows share, names of those in which they differ)."""
  shared, differ = {}, []
  for name in SETTINGS:
    values = {_setting(row[name]) for row in rows if row.get(name) is not None}
    if len(values) == 1:
      if values != {_setting(_OFF.get(name, ""))}:  # "top k 0" says nothing
        shared[name] = values.pop()
    elif values:
      differ.append(name)
  return shared, differ


def table(rows, said=()):
  """-> HTML of the table of one benchmark, with what its rows share above.

  said: settings that the page has named already.
  """
  shared, differ = _shared(rows)
  facts = {SETTINGS[k]: v for k, v in shared.items() if k not in said}
  columns = {}
  for name, cell in COLUMNS.items():
    texts = [cell(row) for row in rows]
    if name in _OFTEN_SHARED and len(set(texts)) == 1 and texts[0]:
      facts[name] = texts[0]
    elif any(text is not None for text in texts):
      columns[name] = cell
  if "command" in facts:  # the longest goes last
    facts["command"] = facts.pop("command")
  columns |= {SETTINGS[name]: _field(name, _setting) for name in differ}
  facts = "".join(
    f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>"
    for name, value in facts.items()
  )
  head = "".join(
    f"<th{_side(name)}>{escape(name)}</th>" for name in ("method", *columns)
  )
  best = headline(rows)
  body = ""
  for row in rows:
    cells = [f"<td>{escape(row['method'])}{_caveat(row)}</td>"]
    for name, cell in columns.items():
      text = cell(row)
      cells.append(f"<td{_side(name)}>{'–' if text is None else text}</td>")
    mark = ' class="best"' if row is best else ""
    body += f"<tr{mark}>{''.join(cells)}</tr>"
  return (
    f'<dl class="facts">{facts}</dl><div class="scroll"><table>'
    f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
  )


def _side(name):
  return ' class="left"' if name in _LEFT else ""


def _caveat(row):
  lossy = row.get("accept") in LOSSY
  return " <small>(not lossless)</small>" if lossy else ""


def notes(rows):
  """What a reader must know to read the numbers of these rows."""
  bugs = [
    f'<p class="bug">{escape(r["method"])}: {escape(r["mismatch"])}</p>'
    for r in rows
    if r.get("mismatch")
  ]
  said = [
    "Speed-up is a ratio of total times over the same prompts, against the "
    "faster plain decoding of the same weights, with its bootstrap interval; "
    "“decoding” leaves the prompt out, “request” counts it. Step cost is one "
    "verify step in plain steps."
  ]
  if any(r.get("refill") for r in rows):
    said.append(
      "Rows were refilled: one loop decodes all prompts, both speed-ups count "
      "the prompts, and intervals are over repeats."
    )
  noise = [r for r in rows if r.get("noise_low") is not None]
  if noise and noise[0].get("noise_high") is not None:
    low, high = noise[0]["noise_low"], noise[0]["noise_high"]
    said.append(
      f"Noise: plain decoding timed against itself gave {low:.2f}–{high:.2f}; "
      "a speed-up within that range says nothing."
    )
  if any(r["identical"] < 1 for r in rows if r.get("identical") is not None):
    said.append(
      "Identical is the share of prompts whose tokens equal the baseline's. "
      "The margin is the largest difference between the two tokens' scores "
      "where a prompt first differs: in float32 it is a tie below 1e-4, or a "
      "bug."
    )
  return "".join(bugs + [f'<p class="note">{note}</p>' for note in said])


def tiles(rows):
  """-> HTML of three large numbers of the headline row."""
  row = headline(rows)
  if row is None:
    return ""
  nodes = row.get("tree_nodes")
  what = row["method"] + (f", {count(nodes)} nodes" if nodes else "")
  low, high = row.get("speedup_low"), row.get("speedup_high")
  interval = "" if None in (low, high) else f", {low:.2f}–{high:.2f}"
  tile = '<div class="tile"><b>{}</b><span>{}</span></div>'.format
  words = f"decoding speed-up{interval} ({escape(what)}){_caveat(row)}"
  parts = [tile(ratio(row["speedup"]), words)]
  if row.get("tokens_per_call") is not None:
    parts.append(
      tile(f"{row['tokens_per_call']:.2f}", "tokens per call of the model")
    )
  if row.get("identical") is not None:
    prompts = row.get("prompts")
    of = f" of {count(prompts)} prompts" if prompts else " of the prompts"
    parts.append(
      tile(percent(row["identical"]), f"{of} with the tokens of plain decoding")
    )
  return f'<div class="tiles">{"".join(parts)}</div>'
