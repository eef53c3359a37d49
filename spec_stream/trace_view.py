"""One prompt, call by call: the drafted tree and what the target kept of it.

  the ── cat ── sat ┄┄ on        accepted path, then the target's own token
     └── dog ── ran              drafted, not kept

Every node shows the drafter's probability of that token after its parent; its
title (on hover) also has that of the whole path, which is what a trace holds.
"""

import math
import unicodedata

from spec_stream.charts import count, escape, percent, significant
from spec_stream.errors import UserError

ROW, BOX = 32, 23  # distance of two rows, height of a node
LETTER = 7.6  # width of one monospaced letter at 12.5 px
LONGEST = 16  # letters of a token that fit a node
NUM_TINTS = 6


def check(trace, path):
  """Refuses a trace that cannot be drawn, in one line that says why."""

  def need(condition, what):
    if not condition:
      raise UserError(
        f"{path}: {what}; write it again with launch/benchmark.py"
      )

  need(isinstance(trace, dict), "not a JSON object")
  for name in ("prompt", "text", "method", "tree"):
    need(isinstance(trace.get(name), str), f"{name!r} is no text")
  need(isinstance(trace.get("steps"), list), "'steps' is no list")
  for i, step in enumerate(trace["steps"]):
    where = f"step {i}"
    need(isinstance(step, dict), f"{where} is no object")
    need(isinstance(step.get("root"), str), f"{where}: 'root' is no text")
    emitted, nodes = step.get("emitted"), step.get("nodes")
    need(
      isinstance(emitted, list) and all(isinstance(t, str) for t in emitted),
      f"{where}: 'emitted' is no list of texts",
    )
    need(isinstance(nodes, list) and nodes, f"{where} has no nodes")
    for j, node in enumerate(nodes):
      where = f"step {i}, node {j}"
      need(isinstance(node, dict), f"{where} is no object")
      need(isinstance(node.get("text"), str), f"{where}: 'text' is no text")
      for name in ("parent", "depth"):
        need(isinstance(node.get(name), int), f"{where}: {name!r} is no number")
      log_prob = node.get("log_prob")
      need(
        log_prob is None or isinstance(log_prob, int | float),
        f"{where}: 'log_prob' is no number",
      )
      parent, depth = node["parent"], node["depth"]
      if j == 0:
        need(parent == -1 and depth == 0, "node 0 is not the root")
      else:
        need(
          0 <= parent < len(nodes) and nodes[parent].get("depth") == depth - 1,
          f"{where}: parent {parent} is not one level up",
        )


def render(trace):
  """-> HTML of the text, the stepper and one tree per call."""
  steps = trace["steps"]
  tokens = sum(len(step["emitted"]) for step in steps)
  head = (
    f"<p>{escape(trace['method'])}, {escape(trace['tree'])} tree: "
    f"{count(tokens)} tokens in {count(len(steps))} calls"
    f"{f' ({significant(tokens / len(steps))} a call)' if steps else ''}. "
    "A run of one colour came out of one call; choose it to see its tree.</p>"
    f'<h3>Prompt</h3><p class="prompt">{escape(trace["prompt"])}</p>'
    f'<h3>Output</h3><p class="output">{_coloured(trace)}</p>'
  )
  if not steps:
    return head
  stepper = (
    '<div class="stepper" hidden>'
    '<button type="button" data-go="-1" aria-label="call before">‹</button>'
    '<button type="button" data-go="1" aria-label="next call">›</button>'
    f'<input type="range" min="1" max="{len(steps)}" value="1" '
    'aria-label="decoding call"><output></output></div>'
  )
  legend = (
    '<ul class="legend">'
    '<li><span class="key root"></span>root: decided by the call before</li>'
    '<li><span class="key accepted"></span>drafted and accepted</li>'
    '<li><span class="key"></span>drafted, not accepted</li>'
    '<li><span class="key bonus"></span>the target\'s own next token</li></ul>'
  )
  trees = "".join(_step(i, step) for i, step in enumerate(steps))
  return f'{head}{stepper}{legend}<div class="trace">{trees}</div>'


def _coloured(trace):
  """The output, each call's tokens in one tint; the first root is prefill's."""
  steps = trace["steps"]
  if not steps:
    return escape(trace["text"])
  parts = [
    f'<span class="before" title="decided by prefill">'
    f"{escape(steps[0]['root'])}</span>"
  ]
  for i, step in enumerate(steps):
    size = len(step["emitted"])
    parts.append(
      f'<span class="call t{i % NUM_TINTS}" data-step="{i}" tabindex="0" '
      f'role="button" title="call {i + 1}: {size} token{"s" * (size != 1)}">'
      f"{escape(''.join(step['emitted']))}</span>"
    )
  return "".join(parts)


def _step(index, step):
  nodes, emitted = step["nodes"], step["emitted"]
  accepted = sum(bool(n.get("accepted")) for n in nodes[1:])
  drafted = len(nodes) - 1
  words = "".join(emitted)
  return (
    f'<div class="step"><p>Call {index + 1}: {drafted} '
    f"token{'s' * (drafted != 1)} drafted, {accepted} accepted, "
    f"{len(emitted)} emitted: <code>{escape(visible(words))}</code></p>"
    f'<div class="scroll">{draw(step)}</div></div>'
  )


# -- one tree ----------------------------------------------------------------


def visible(text):
  """A token as letters one can see: spaces as ·, line ends as ↵."""
  text = text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
  return "".join(c if c.isprintable() else "�" for c in text)


def _letters(text):
  """How many monospaced letters wide a text is; CJK and emoji take two."""
  return sum(
    0
    if unicodedata.combining(c)
    else 2
    if unicodedata.east_asian_width(c) in "WF"
    else 1
    for c in text
  )


def _short(text):
  text = visible(text) or "∅"
  if _letters(text) <= LONGEST:
    return text
  while _letters(text) > LONGEST - 1:
    text = text[:-1]
  return text + "…"


def _odds(nodes):
  """Own probability of each node after its parent, None at the root."""
  own = [None]
  for node in nodes[1:]:
    path, above = node.get("log_prob"), nodes[node["parent"]].get("log_prob")
    if path is None or above is None or not math.isfinite(above):
      own.append(None)
    else:
      own.append(min(math.exp(min(path - above, 0.0)), 1.0))
  return own


def _rows(nodes):
  """Row of each node: a parent stands level with its first child."""
  children = [[] for _ in nodes]
  for i, node in enumerate(nodes[1:], 1):
    children[node["parent"]].append(i)
  rows, used = [0] * len(nodes), 0
  # Depth first without recursion: leaves take the rows from top to bottom.
  order, stack = [], [0]
  while stack:
    i = stack.pop()
    order.append(i)
    stack.extend(reversed(children[i]))
  for i in order:
    if not children[i]:
      rows[i], used = used, used + 1
  for i in reversed(order):
    if children[i]:
      rows[i] = rows[children[i][0]]
  return rows, used


def draw(step):
  """-> SVG of one call's tree, the accepted path and the bonus token on it."""
  nodes = [dict(node) for node in step["nodes"]]
  kinds = ["root"] + [
    "accepted" if n.get("accepted") else "rejected" for n in nodes[1:]
  ]
  own = _odds(nodes)
  accepted = [i for i, kind in enumerate(kinds) if kind != "rejected"]
  last = max(accepted, key=lambda i: nodes[i]["depth"])
  if len(step["emitted"]) > nodes[last]["depth"]:
    nodes.append(
      {
        "text": step["emitted"][-1],
        "parent": last,
        "depth": nodes[last]["depth"] + 1,
      }
    )
    kinds.append("bonus")
    own.append(None)

  rows, num_rows = _rows(nodes)
  labels = [_short(node["text"]) for node in nodes]
  odds = ["" if p is None else percent(round(p, 2)) for p in own]
  odds = [
    "<1%" if p is not None and p < 0.005 else o for p, o in zip(own, odds)
  ]
  widths = [
    LETTER * _letters(label) + (6.6 * len(o) + 8 if o else 0) + 16
    for label, o in zip(labels, odds)
  ]
  depth = [node["depth"] for node in nodes]
  columns = [2.0]
  for level in range(max(depth) + 1):
    widest = max(w for w, d in zip(widths, depth) if d == level)
    columns.append(columns[-1] + widest + 28)

  def middle(i):
    return rows[i] * ROW + ROW / 2

  edges, boxes = [], []
  for i, node in enumerate(nodes):
    x, y = columns[depth[i]], middle(i)
    above = node["parent"]
    if above >= 0:
      x0, y0 = columns[depth[above]] + widths[above], middle(above)
      bend = (x0 + x) / 2
      edges.append(
        f'<path class="edge {kinds[i]}" d="M{x0:.1f} {y0:.1f}'
        f'C{bend:.1f} {y0:.1f} {bend:.1f} {y:.1f} {x:.1f} {y:.1f}"/>'
      )
    boxes.append(
      f'<g class="node {kinds[i]}"><title>{_words(node, kinds[i], own[i])}'
      f'</title><rect x="{x:.1f}" y="{y - BOX / 2:.1f}" rx="5" '
      f'width="{widths[i]:.1f}" height="{BOX}"/>'
      f'<text x="{x + 8:.1f}" y="{y + 4.5:.1f}">{escape(labels[i])}'
      + (f'<tspan class="odds" dx="8">{odds[i]}</tspan>' if odds[i] else "")
      + "</text></g>"
    )
  width, height = columns[-1] - 24, num_rows * ROW
  return (
    f'<svg width="{width:.0f}" height="{height}" '
    f'viewBox="0 0 {width:.0f} {height}" role="img" '
    f'aria-label="tree of {len(step["nodes"])} nodes">'
    f"{''.join(edges)}{''.join(boxes)}</svg>"
  )


def _words(node, kind, own):
  """The title of a node: the whole token and its probabilities."""
  words = {
    "root": "root",
    "accepted": "accepted",
    "rejected": "not accepted",
    "bonus": "the target's own next token",
  }[kind]
  parts = [f"“{visible(node['text'])}”", words]
  if own is not None:
    path = math.exp(min(node["log_prob"], 0.0))
    parts.append(f"thought {significant(own)} probable after its parent")
    parts.append(f"{significant(path)} along the path")
  return escape(", ".join(parts))
