"""The report page: well formed, self-contained, escaped, and its numbers."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_stream import charts, report, results, trace_view
from spec_stream.charts import Series
from spec_stream.errors import UserError
from spec_stream.models import config as model_config

EVIL = '<script>alert("1")</script>&amp;'
VOID = {"meta", "link", "input", "br"}
# In the SVG we write, these close themselves.
CLOSED = {"path", "line", "rect"}


class Page(HTMLParser):
  """Checks that tags nest; keeps tags, attributes, table cells and text."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.tags, self.rows, self.words = [], [], [], []
    self.labels = []  # of drawings: (attributes, text)
    self.feed(text)
    self.close()
    assert not self.stack, f"left open: {self.stack}"

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
    assert tag not in CLOSED, f"<{tag}> does not close itself"
    if tag not in VOID:
      self.stack.append(tag)
    if tag == "tr":
      self.rows.append([])
    if tag in ("td", "th"):
      self.rows[-1].append("")

  def handle_startendtag(self, tag, attrs):
    assert tag in CLOSED
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.stack and self.stack[-1] == tag, f"</{tag}> in {self.stack}"
    self.stack.pop()

  def handle_data(self, data):
    if self.stack and self.stack[-1] not in ("style", "script"):
      self.words.append(data)
    if self.stack and self.stack[-1] == "text":
      self.labels.append((self.tags[-1][1], data))
    if {"td", "th"} & set(self.stack):
      self.rows[-1][-1] += data

  @property
  def text(self):
    return " ".join("".join(self.words).split())

  def classes(self, name):
    return [a for _, a in self.tags if name in a.get("class", "").split()]


def row(method, nodes, tokens_per_call, step_cost, **other):
  speedup = tokens_per_call / step_cost
  return {
    "run_id": "b",
    "method": method,
    "dataset": "restaurants",
    "mode": "lossless",
    "tree": "best_first",
    "tree_nodes": nodes,
    "accept": "exact",
    "temperature": 0.0,
    "prompts": 64,
    "tokens": 3912,
    "tokens_per_call": tokens_per_call,
    "ms_per_token": 4.81234 / speedup,
    "speedup": speedup,
    "speedup_low": speedup - 0.06,
    "speedup_high": speedup + 0.07,
    "identical": 1.0,
    "device": "cpu, 2 cores",
    "commit": "abc1234",
    "date": "2026-11-23",
    "step_cost": step_cost,
    "tokens_per_call_by_position": [tokens_per_call] * 3,
    "accept_by_depth": [0.9, 0.6, None],
    **other,
  }


ROWS = [
  row("none", 1, 1.0, 1.0, run_id="a"),
  row("none", 1, 1.0, 1.0, accept_by_depth=[]),
  row("none (A against A)", 1, 1.0, 1.0, noise_low=0.97, noise_high=1.04),
  row("streams", 4, 2.55, 1.4),
  row("streams", 8, 2.87, 1.71, identical=0.984375, max_tie_margin=3.2e-6),
  row("medusa", 4, 2.1, 1.05),
]
TRACE = {
  "prompt": f"name[The Punter] {EVIL}",
  "text": "The Punter is",
  "method": "streams",
  "tree": "best_first",
  "steps": [
    {
      "root": "The",
      "nodes": [
        {"text": "The", "parent": -1, "depth": 0, "log_prob": 0.0},
        {
          "text": " Punter",
          "parent": 0,
          "depth": 1,
          "log_prob": math.log(0.8),
          "accepted": True,
        },
        {"text": EVIL, "parent": 0, "depth": 1, "log_prob": math.log(0.1)},
        {"text": "\n", "parent": 1, "depth": 2, "log_prob": math.log(0.2)},
      ],
      "emitted": [" Punter", " is"],
    },
    {
      "root": " is",
      "nodes": [{"text": " is", "parent": -1, "depth": 0, "log_prob": None}],
      "emitted": ["<eos>"],
    },
  ],
}


def write_jsonl(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / "my run"
  path.mkdir()
  model = model_config.to_dict(model_config.ModelConfig(vocab_size=512))
  config = {"model": model, "data": {"dataset": "restaurants"}, "commit": "c0"}
  (path / "config.json").write_text(json.dumps(config))
  write_jsonl(
    path / "metrics.jsonl",
    [
      {
        "step": s,
        "loss": 3 / s,
        "loss_main": 2 / s,
        "loss_stream_1": None if s == 3 else 3 / s,
        "accept_1": s / 10,
        "seconds": 6.0 * s,
        "tokens_per_second": 31204.7,
      }
      for s in range(1, 6)
    ],
  )
  write_jsonl(path / "results.jsonl", ROWS)
  (path / "trace.json").write_text(json.dumps(TRACE))
  return path


def render(workdir):
  return report.write(workdir).read_text(encoding="utf-8")


# -- the page ----------------------------------------------------------------


def test_page_nests_and_asks_for_nothing(workdir):
  text = render(workdir)
  page = Page(text)
  assert "http" not in text and "url(" not in text and "@import" not in text
  for tag, attrs in page.tags:
    assert not {"src", "srcset", "action"} & attrs.keys(), tag
    if "href" in attrs:
      assert tag == "link" and attrs["href"] == "data:,"
  assert "not run" not in page.text


def test_all_text_is_escaped(workdir):
  rows = [{**r, "method": EVIL, "tree": EVIL, "device": EVIL} for r in ROWS]
  write_jsonl(workdir / "results.jsonl", rows)
  trace = {**TRACE, "text": EVIL, "method": EVIL, "tree": EVIL}
  (workdir / "trace.json").write_text(json.dumps(trace))
  page = Page(render(workdir))
  assert sum(tag == "script" for tag, _ in page.tags) == 1  # our own
  assert not any(
    name.startswith("on") for _, attrs in page.tags for name in attrs
  )
  assert page.text.count(EVIL) > 10


def test_table_shows_the_numbers_of_the_newest_benchmark(workdir):
  page = Page(render(workdir))
  header, *rows = page.rows
  # The newest run's rows, then those of the older one, folded.
  methods = [r[0] for r in rows[:5]]
  assert methods == [r["method"] for r in ROWS[1:]]
  assert len(page.rows) == 1 + 5 + 2
  eight = dict(zip(header, rows[3], strict=True))
  assert eight["nodes"] == "8"
  assert eight["tokens per call"] == "2.87"
  assert eight["step cost"] == "1.71×"
  assert eight["speed-up, decoding"] == "1.68× 1.62–1.75"
  assert eight["identical"] == "98.4%"
  assert eight["margin where not"] == "3.2e-06"
  assert eight["ms per token"] == "2.87"
  plain = dict(zip(header, rows[0], strict=True))
  assert plain["margin where not"] == "–"
  # What all rows share is said once and is no column.
  assert "prompts" not in header and "prompts64" in page.text
  assert "tokens3,912" in page.text
  assert "gave 0.97–1.04" in page.text


def test_rows_that_differ_in_a_setting_get_a_column(workdir):
  rows = [*ROWS[1:4], {**ROWS[3], "temperature": 0.7, "accept": "typical"}]
  write_jsonl(workdir / "results.jsonl", rows)
  page = Page(render(workdir))
  header, *rows = page.rows
  assert [dict(zip(header, r))["temperature"] for r in rows[-2:]] == [
    "0",
    "0.7",
  ]
  assert rows[-1][0] == "streams (not lossless)"


def test_a_difference_that_is_no_tie_is_called_a_bug(workdir):
  page = Page(render(workdir))
  assert not page.classes("bug")
  words = "prompt 3, token 7: margin 0.2"
  write_jsonl(
    workdir / "results.jsonl", [*ROWS, {**ROWS[3], "mismatch": words}]
  )
  page = Page(render(workdir))
  assert len(page.classes("bug")) == 1 and f"streams: {words}" in page.text


def test_header_and_headline(workdir):
  page = Page(render(workdir))
  for words in ("lossless", "cpu, 2 cores", "abc1234", "2026-11-23"):
    assert words in page.text
  assert "commit of the modelc0" in page.text
  assert re.search(r"\d\.\d\d M weights, 6 layers of width 256", page.text)
  # The fastest row of streams, though medusa's is faster here.
  assert "1.82×decoding speed-up, 1.76–1.89 (streams, 4 nodes)" in page.text
  assert "100% of 64 prompts" in page.text


@pytest.mark.parametrize(
  ("name", "command"),
  [
    ("results.jsonl", "--drafters=none,streams"),
    ("metrics.jsonl", "launch/train.py"),
    ("trace.json", "no trace"),
    ("config.json", None),
  ],
)
def test_a_missing_file_is_said(workdir, name, command):
  (workdir / name).unlink()
  page = Page(render(workdir))
  assert ("not run" in page.text) == (command is not None)
  assert command is None or command in page.text


def test_an_empty_run_is_a_page_too(tmp_path):
  page = Page(render(tmp_path))
  assert page.text.count("not run") == 5


def test_one_size_of_tree_is_said(workdir):
  write_jsonl(workdir / "results.jsonl", [*ROWS[1:4]])
  assert "--tree_nodes=4,8,16" in Page(render(workdir)).text


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("config.json", "{", "config.json"),
    ("config.json", '{"model": {"widht": 3}}', "config"),
    ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n', "line 2"),
    ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "'loss' is no number"),
    ("metrics.jsonl", '{"loss": 1}\n', "no 'step'"),
    ("results.jsonl", "[]\n", "line 1"),
    ("results.jsonl", '{"speedup": 1}\n', "no 'method'"),
    ("results.jsonl", '{"method": "a", "speedup": "1"}\n', "'speedup'"),
    (
      "results.jsonl",
      '{"method": "a", "accept_by_depth": ["x"]}\n',
      "accept_by_depth",
    ),
    ("trace.json", '{"prompt"', "trace.json: not JSON"),
    ("trace.json", "[]", "not a JSON object"),
    ("trace.json", json.dumps({**TRACE, "steps": [{}]}), "step 0: 'root'"),
    ("trace.json", b"\xff\xfe", "trace.json: not JSON"),
  ],
)
def test_a_corrupt_file_is_refused(workdir, name, text, message):
  (workdir / name).write_bytes(
    text if isinstance(text, bytes) else text.encode()
  )
  with pytest.raises(UserError, match=message) as error:
    report.write(workdir)
  assert "\n" not in str(error.value)
  assert not (workdir / "report.html").exists()


def test_no_such_run(tmp_path):
  with pytest.raises(UserError, match="no such run"):
    report.write(tmp_path / "none")


def test_out_names_the_file(workdir, tmp_path):
  out = tmp_path / "deep" / "page.html"
  assert report.write(workdir, out) == out and out.exists()
  assert not (workdir / "report.html").exists()


# -- one prompt, call by call ------------------------------------------------


def test_trace_marks_the_accepted_path_and_the_bonus(workdir):
  page = Page(render(workdir))
  assert len(page.classes("call")) == len(page.classes("step")) == 2
  nodes = page.classes("node")
  kinds = [a["class"].split()[1] for a in nodes]
  assert kinds == [
    *("root", "accepted", "rejected", "rejected", "bonus"),
    *("root", "bonus"),
  ]
  edges = [a["class"].split()[1] for a in page.classes("edge")]
  assert edges == ["accepted", "rejected", "rejected", "bonus", "bonus"]
  # The trace holds probabilities of paths; a node shows its own.
  assert (
    "“↵”, not accepted, thought 0.250 probable after its parent" in page.text
  )
  assert "0.200 along the path" in page.text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"parent": 7}, "parent 7"),
    ({"parent": 3}, "parent 3"),  # itself
    ({"depth": 1}, "not one level up"),
    ({"log_prob": "low"}, "'log_prob'"),
    ({"text": None}, "'text'"),
  ],
)
def test_a_tree_that_is_none_is_refused(change, message):
  trace = json.loads(json.dumps(TRACE))
  trace["steps"][0]["nodes"][3] |= change
  with pytest.raises(UserError, match=message):
    trace_view.check(trace, "trace.json")


@st.composite
def steps(draw):
  """A tree with its nodes in any order below the root, and a path of it."""
  size = draw(st.integers(1, 24))
  parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
  nodes = []
  for i, parent in enumerate(parents):
    above = nodes[parent] if i else {"depth": -1, "log_prob": 0.0}
    nodes.append(
      {
        "text": draw(st.text(max_size=20)),
        "parent": parent,
        "depth": above["depth"] + 1,
        "log_prob": above["log_prob"] - draw(st.floats(0, 9)),
      }
    )
  at, path = draw(st.integers(0, size - 1)), []
  while at >= 0:
    nodes[at]["accepted"] = True
    path.append(nodes[at]["text"])
    at = parents[at]
  emitted = path[::-1][1:] + draw(st.lists(st.text(), max_size=1))
  return {"root": nodes[0]["text"], "nodes": nodes, "emitted": emitted}


@given(steps())
def test_nodes_of_a_drawing_never_overlap(step):
  page = Page(trace_view.draw(step))
  boxes = [
    [float(a[k]) for k in ("x", "y", "width", "height")]
    for tag, a in page.tags
    if tag == "rect"
  ]
  bonus = len(step["emitted"]) > sum(
    bool(n.get("accepted")) for n in step["nodes"][1:]
  )
  assert len(boxes) == len(step["nodes"]) + bonus
  (_, svg), *_ = page.tags
  for i, (x, y, w, h) in enumerate(boxes):
    assert 0 <= x and x + w <= float(svg["width"]) + 1
    assert 0 <= y and y + h <= float(svg["height"])
    for x2, y2, w2, h2 in boxes[:i]:
      assert x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h


# -- charts ------------------------------------------------------------------

finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 4))


@given(finite, finite)
def test_ticks_cover_the_range_evenly(a, b):
  low, high = min(a, b), max(a, b)
  values = charts.ticks(low, high)
  assert values[0] <= low + 1e-9 * abs(low) and values[-1] >= high - 1e-6
  gaps = [y - x for x, y in zip(values, values[1:])]
  assert 2 <= len(values) <= 8
  assert max(gaps) == pytest.approx(min(gaps))
  labels = charts.tick_labels(values)
  assert len(set(labels)) == len(labels)
  for value, label in zip(values, labels):
    assert float(label.replace(",", "")) == pytest.approx(value)


@given(
  st.lists(
    st.lists(st.none() | finite, min_size=1, max_size=60),
    min_size=1,
    max_size=9,
  ).filter(lambda ys: any(y is not None for line in ys for y in line)),
  st.sampled_from([1, 8, 98765]),
  st.booleans(),
)
def test_points_lie_inside_the_axes_and_labels_apart(lines, gap, own_ticks):
  most = [gap * i for i in range(max(map(len, lines)))]
  series = [
    Series(str(i), most[: len(ys)], ys, i) for i, ys in enumerate(lines)
  ]
  x_ticks = None if own_ticks else most
  page = Page(
    charts.line_chart("t", series, x_label="x", y_label="y", x_ticks=x_ticks)
  )
  for tag, a in page.tags:
    if tag == "circle":
      assert charts.LEFT - 0.1 <= float(a["cx"])
      assert float(a["cx"]) <= charts.WIDTH - charts.RIGHT + 0.1
      assert charts.TOP - 0.1 <= float(a["cy"])
      assert float(a["cy"]) <= charts.HEIGHT - charts.BOTTOM + 0.1
  ends = [
    (float(a["x"]) - 3.6 * len(label), float(a["x"]) + 3.6 * len(label))
    for a, label in page.labels
    if a["y"] == str(charts.HEIGHT - charts.BOTTOM + 17)  # under the x axis
  ]
  assert ends and all(b[0] > a[1] for a, b in zip(ends, ends[1:]))


def test_numbers_read_well():
  assert charts.significant(31204.7) == "31,200"
  assert charts.significant(2.8149) == "2.81"
  assert charts.significant(0.99999) == "1.00"
  assert charts.significant(0.04123) == "0.0412"
  assert charts.significant(0) == "0"
  assert charts.percent(1.0) == "100%"
  assert charts.percent(0.99996) == ">99.9%"
  assert charts.percent(0.5) == "50%"


def test_a_long_curve_is_thinned_to_means():
  xs, ys = list(range(1, 1001)), [float(i % 5) for i in range(1000)]
  ys[10:15] = [None] * 5
  thin_x, thin_y, size = charts.thin(xs, ys, limit=200)
  assert size == 5 and thin_x[0] == 5 and thin_x[-1] == 1000
  assert len(thin_x) == len(thin_y) == 200
  assert thin_y[2] is None
  assert set(thin_y) == {2.0, None}


def test_many_rows_show_the_fastest_of_each_method():
  rows = [row("streams", n, 2.0 + n / 40, 1 + n / 10) for n in range(2, 12)]
  lines, note = results.by_row(rows, "accept_by_depth", lambda i: i)
  assert [s.name for s in lines] == ["streams"] and "fastest" in note
  assert lines[0].ys is max(rows, key=lambda r: r["speedup"])["accept_by_depth"]
  lines, note = results.by_row(rows[:3], "accept_by_depth", lambda i: i)
  names = ["streams, 2 nodes", "streams, 3 nodes", "streams, 4 nodes"]
  assert [s.name for s in lines] == names and not note


def test_cost_lines_start_at_plain_decoding():
  plain, streams, medusa = results.by_nodes(ROWS[1:], "step_cost")
  assert (plain.xs, plain.ys) == ([1], [1.0])
  assert (streams.xs, streams.ys) == ([4, 8], [1.4, 1.71])
  assert medusa.xs == [4]
