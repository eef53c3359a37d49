"""The shell of the report page: its style, its script, its head.

Everything is in the file: system fonts, no request of any kind. The script
only steps through the decoding calls; without it they stand one below another.
"""

from spec_stream.charts import escape

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6570;
  --line: #d9dee4; --grid: #e8ebef; --accent: #1f5fc4; --accent-soft: #dbe8ff;
  --bonus: #a24a00; --bonus-soft: #ffe9d6; --best: #eef5ff;
  --s0: #6b7480; --s1: #1f5fc4; --s2: #c2410c; --s3: #0b7a53; --s4: #7e3bb5;
  --s5: #93700a; --s6: #b81d5b; --s7: #0a7184;
  --t0: #cfe2ff; --t1: #ffdcc2; --t2: #c9efdd; --t3: #ead6ff; --t4: #f6e8a9;
  --t5: #ffd3e2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --ink: #e7eaee; --soft: #a0abb7;
    --line: #363d46; --grid: #2a3038; --accent: #79aeff;
    --accent-soft: #223d66; --bonus: #ffab6b; --bonus-soft: #4d2f17;
    --best: #1f2a3c;
    --s0: #a0abb7; --s1: #79aeff; --s2: #ff9d66; --s3: #53cfa0; --s4: #c79bff;
    --s5: #e0bd4a; --s6: #ff8fb6; --s7: #5cc6dc;
    --t0: #25477d; --t1: #6d3a17; --t2: #165540; --t3: #4f3170; --t4: #574813;
    --t5: #6b2441;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 24px 16px 48px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 0 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 6px; }
p { margin: 6px 0; max-width: 75ch; }
code, .token, .trace text { font-family: ui-monospace, "SF Mono", Menlo,
  Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; overflow-wrap: anywhere; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin: 16px 0;
}
.note, .lead { color: var(--soft); }
.note { font-size: .875rem; }
.missing { border-left: 3px solid var(--line); padding-left: 10px;
  color: var(--soft); }
.bug { border-left: 3px solid var(--s2); padding-left: 10px; }
.bug::before { content: "a bug: "; font-weight: 600; color: var(--s2); }
.facts { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 12px 0 0;
  padding: 0; }
.facts div { min-width: 0; }
.facts dt { font-size: .75rem; color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; gap: 12px; margin: 16px 0;
  grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 18px; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; }
.tile span { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; margin: 10px -20px; padding: 0 20px; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 9px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; font-size: .78rem; color: var(--soft);
  white-space: normal; line-height: 1.25; vertical-align: bottom;
  border-bottom-color: var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); padding-left: 0; }
th.left, td.left { text-align: left; }
td small { color: var(--soft); }
tr.best td { background: var(--best); }
details > summary { cursor: pointer; color: var(--soft); margin-top: 8px; }
.charts { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; min-width: 0; }
.chart { max-width: 540px; }
figcaption { font-weight: 600; font-size: .95rem; }
.chart > svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px;
  margin: 4px 0 6px; padding: 0; font-size: .85rem; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 6px; }
.swatch { width: 26px; height: 10px; flex: none; }
svg text { font-size: 12.5px; fill: var(--soft); }
svg text.name { fill: var(--ink); }
.grid { stroke: var(--grid); }
.axis { stroke: var(--soft); }
.reference { stroke: var(--soft); stroke-dasharray: 2 4; stroke-width: 1.5; }
.series path { fill: none; stroke: currentColor; stroke-width: 2;
  stroke-linejoin: round; stroke-linecap: round; }
.series circle { fill: currentColor; stroke: var(--card); }
.dashed path { stroke-dasharray: 6 5; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); }
.s3 { color: var(--s3); } .s4 { color: var(--s4); } .s5 { color: var(--s5); }
.s6 { color: var(--s6); } .s7 { color: var(--s7); }
.prompt, .output { white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 4px 0 12px; max-width: none; }
.prompt { color: var(--soft); }
.output { line-height: 1.9; }
.call { padding: 2px 0; border-radius: 3px; cursor: pointer; color: inherit;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.call:hover, .call:focus-visible { outline: 1px solid var(--soft); }
.call.on { outline: 2px solid var(--ink); }
.t0 { background: var(--t0); } .t1 { background: var(--t1); }
.t2 { background: var(--t2); } .t3 { background: var(--t3); }
.t4 { background: var(--t4); } .t5 { background: var(--t5); }
.before { border-bottom: 2px dotted var(--soft); }
.stepper { display: flex; align-items: center; gap: 10px; flex-wrap: wrap;
  margin: 12px 0; }
.stepper input { flex: 1 1 140px; max-width: 420px; min-width: 100px;
  accent-color: var(--accent); }
.stepper button { font: inherit; padding: 3px 14px; border-radius: 6px;
  border: 1px solid var(--line); background: var(--page); color: var(--ink);
  cursor: pointer; }
.stepper output { font-variant-numeric: tabular-nums; }
[hidden] { display: none !important; }
.step { margin: 0 0 20px; }
.trace svg { display: block; }
.edge { fill: none; stroke: var(--line); stroke-width: 1.2; }
.edge.accepted { stroke: var(--accent); stroke-width: 2.5; }
.edge.bonus { stroke: var(--bonus); stroke-width: 2; stroke-dasharray: 4 3; }
.node rect { fill: var(--card); stroke: var(--line); }
.node text { fill: var(--soft); }
.node .odds { font-size: 10.5px; }
.node.root rect { fill: var(--grid); stroke: var(--soft); }
.node.accepted rect { fill: var(--accent-soft); stroke: var(--accent);
  stroke-width: 1.8; }
.node.bonus rect { fill: var(--bonus-soft); stroke: var(--bonus);
  stroke-width: 1.5; stroke-dasharray: 4 3; }
.node.root text, .node.accepted text, .node.bonus text { fill: var(--ink); }
.key { display: inline-block; width: 22px; height: 13px; border-radius: 4px;
  border: 1.5px solid var(--line); }
.key.root { background: var(--grid); border-color: var(--soft); }
.key.accepted { background: var(--accent-soft); border-color: var(--accent); }
.key.bonus { background: var(--bonus-soft);
  border: 1.5px dashed var(--bonus); }
@media (max-width: 600px) {
  body { padding: 14px 8px 32px; font-size: 15px; }
  .card { padding: 14px; }
  .scroll { margin: 10px -14px; padding: 0 14px; }
  .tile b { font-size: 1.5rem; }
}
"""

SCRIPT = """
(function () {
  var steps = document.querySelectorAll(".step");
  var bar = document.querySelector(".stepper");
  if (!bar || !steps.length) return;
  var calls = document.querySelectorAll(".call[data-step]");
  var range = bar.querySelector("input"), words = bar.querySelector("output");
  var now = 0;
  function show(i) {
    now = Math.max(0, Math.min(steps.length - 1, i));
    steps.forEach(function (s, j) { s.hidden = j !== now; });
    calls.forEach(function (c) {
      c.classList.toggle("on", Number(c.dataset.step) === now);
    });
    range.value = now + 1;
    words.textContent = "call " + (now + 1) + " of " + steps.length;
  }
  bar.hidden = false;
  bar.querySelectorAll("button").forEach(function (b) {
    b.onclick = function () { show(now + Number(b.dataset.go)); };
  });
  range.oninput = function () { show(Number(range.value) - 1); };
  calls.forEach(function (c) {
    c.onclick = function () { show(Number(c.dataset.step)); };
    c.onkeydown = function (e) {
      if (e.key !== "Enter" && e.key !== " ") return;
      e.preventDefault();
      c.onclick();
    };
  });
  show(0);
})();
"""


def page(title, body):
  """-> the whole document around a body that is escaped already."""
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(title)}</title>\n"
    '<link rel="icon" href="data:,">\n'  # or a browser asks for /favicon.ico
    f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
    f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
  )


def section(title, *parts):
  return (
    f'<section class="card"><h2>{escape(title)}</h2>{"".join(parts)}</section>'
  )


def missing(what, how):
  """Says that something was not run, and which command would run it."""
  return (
    f'<p class="missing">not run: {escape(what)}. '
    f"Run <code>{escape(how)}</code></p>"
  )
