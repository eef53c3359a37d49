"""Charts and numbers for a page: inline SVG, no library, no request.

Colours come from the page's CSS (classes s0..s7), so that one drawing serves
light and dark. Text is sized for a phone: the drawing is 440 units wide and is
never shown wider than about 540 pixels. The legend is HTML above the drawing,
where it wraps and cannot cover a line.
"""

import dataclasses
import html
import math

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 30, 44
NUM_COLOURS = 8  # s0 (grey) is for baselines; see page.CSS


def escape(text):
  return html.escape(str(text), quote=True)


# -- numbers -----------------------------------------------------------------


def count(value):
  return f"{value:,.0f}"


def significant(value, digits=3):
  """Three significant digits and no exponent: 31,200, 2.81, 0.0412."""
  if value == 0 or not math.isfinite(value):
    return f"{value:g}"
  if abs(value) < 1e-4:
    return f"{value:.1e}"
  value = float(f"{value:.{digits}g}")  # 0.9999 is 1.00, not 1.000
  decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
  return f"{value:,.{decimals}f}"


def percent(value):
  """1.0 -> 100%, 0.984 -> 98.4%: what is not all never rounds to all."""
  text = f"{100 * value:.1f}"
  if text == "100.0" and value < 1:
    return ">99.9%"
  return text.removesuffix(".0") + "%"


def ratio(value):
  return f"{value:.2f}×"


# -- axes --------------------------------------------------------------------


def ticks(low, high, target=5):
  """Round values that cover [low, high], in steps of 1, 2 or 5 times 10^n."""
  span = (high - low) or abs(high) or 1.0
  raw = span / target
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
  first = math.floor(low / step + 1e-9)
  last = max(math.ceil(high / step - 1e-9), first + 1)
  return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values):
  """All with the same decimals, as few as tell neighbours apart."""
  step = min((b - a for a, b in zip(values, values[1:])), default=1)
  decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
  return [f"{v:,.{decimals}f}" for v in values]


def _spread(positions, labels):
  """Indices of the labels that fit side by side, from the left."""
  kept, edge = [], -math.inf
  for i, (x, label) in enumerate(zip(positions, labels)):
    half = 3.6 * len(label)
    if x - half > edge:
      kept.append(i)
      edge = x + half + 6
  return kept


@dataclasses.dataclass(frozen=True)
class Series:
  """One line: points in order of x; a y of None is a gap."""

  name: str
  xs: list
  ys: list
  colour: int = 1
  dashed: bool = False


def line_chart(
  title,
  series,
  *,
  x_label,
  y_label,
  y_low=None,
  y_high=None,
  x_ticks=None,
  y_percent=False,
  reference=None,
  note="",
):
  """-> HTML figure with one line per series.

  Args:
    series: non-empty list of Series with at least one point between them.
    y_low, y_high: values the y axis must reach (data may reach further).
    x_ticks: where to label the x axis, instead of round values.
    reference: (y, words) of a dashed horizontal line.
  """
  points = [
    [(x, y) for x, y in zip(s.xs, s.ys) if y is not None] for s in series
  ]
  all_x = [x for line in points for x, _ in line]
  all_y = [y for line in points for _, y in line]
  all_y += [v for v in (y_low, y_high) if v is not None]
  all_y += [reference[0]] if reference else []
  y_values = ticks(min(all_y), max(all_y))
  x_values = x_ticks or ticks(min(all_x), max(all_x))
  x_from, x_to = x_values[0], x_values[-1]
  if not x_ticks:  # a curve may end between two round values
    x_from, x_to = min(all_x), max(all_x)
    x_values = [v for v in x_values if x_from <= v <= x_to] or [x_from]
  if x_to == x_from:
    x_from, x_to = x_from - 1, x_to + 1

  def at(x, y):
    across = (x - x_from) / (x_to - x_from)
    up = (y - y_values[0]) / (y_values[-1] - y_values[0])
    return (
      LEFT + across * (WIDTH - LEFT - RIGHT),
      HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
    )

  parts = _axes(at, x_values, y_values, x_from, x_to, y_percent)
  parts.append(
    f'<text class="name" x="4" y="14">{escape(y_label)}</text>'
    f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
    f'text-anchor="middle">{escape(x_label)}</text>'
  )
  if reference:
    y = at(x_from, reference[0])[1]
    parts.append(
      f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
      f'y1="{y:.1f}" y2="{y:.1f}"/>'
    )
  for s in series:
    parts.append(_line(s, at, x_label, y_percent))
  return _figure(title, series, reference, note, parts)


def _axes(at, x_values, y_values, x_from, x_to, y_percent):
  parts = []
  labels = tick_labels([100 * y for y in y_values] if y_percent else y_values)
  for value, label in zip(y_values, labels):
    y = at(x_from, value)[1]
    parts.append(
      f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
      f'y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}'
      f"{'%' if y_percent else ''}</text>"
    )
  base = HEIGHT - BOTTOM
  parts.append(
    f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
    f'y1="{base}" y2="{base}"/>'
  )
  labels = tick_labels(x_values)
  where = [at(value, y_values[0])[0] for value in x_values]
  for i in _spread(where, labels):
    parts.append(
      f'<line class="axis" x1="{where[i]:.1f}" x2="{where[i]:.1f}" '
      f'y1="{base}" y2="{base + 4}"/>'
      f'<text x="{where[i]:.1f}" y="{base + 17}" text-anchor="middle">'
      f"{labels[i]}</text>"
    )
  return parts


def _line(s, at, x_label, y_percent):
  """The path of one series; marks too where they are few enough to see."""
  path, pen_down = [], False
  marks = []
  few = len(s.xs) <= 40
  for x, y in zip(s.xs, s.ys):
    if y is None:
      pen_down = False
      continue
    px, py = at(x, y)
    path.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
    pen_down = True
    if few:
      value = percent(y) if y_percent else significant(y)
      words = f"{s.name}: {value} ({x_label} {significant(x)})"
      marks.append(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2">'
        f"<title>{escape(words)}</title></circle>"
      )
  dash = " dashed" if s.dashed else ""
  return (
    f'<g class="series s{s.colour % NUM_COLOURS}{dash}">'
    f'<path d="{"".join(path)}"/>{"".join(marks)}</g>'
  )


def _figure(title, series, reference, note, parts):
  legend = "".join(
    f'<li><svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
    f'<g class="series s{s.colour % NUM_COLOURS}{" dashed" * s.dashed}">'
    f'<path d="M1 5L25 5"/></g></svg>{escape(s.name)}</li>'
    for s in series
  )
  if reference:
    legend += (
      '<li><svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">'
      '<line class="reference" x1="1" x2="25" y1="5" y2="5"/></svg>'
      f"{escape(reference[1])}</li>"
    )
  note = f'<p class="note">{escape(note)}</p>' if note else ""
  return (
    f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
    f'<ul class="legend">{legend}</ul>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{escape(title)}">{"".join(parts)}</svg>{note}</figure>'
  )


def thin(xs, ys, limit=200):
  """Means of neighbouring points, so that a long curve stays light.

  -> (xs, ys, how many points each mean has); a mean of none is None.
  """
  size = math.ceil(len(xs) / limit) or 1
  if size == 1:
    return list(xs), list(ys), 1
  out_x, out_y = [], []
  for i in range(0, len(xs), size):
    known = [y for y in ys[i : i + size] if y is not None]
    out_x.append(xs[min(i + size, len(xs)) - 1])
    out_y.append(sum(known) / len(known) if known else None)
  return out_x, out_y, size
