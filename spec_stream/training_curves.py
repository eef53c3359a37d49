"""The curves of metrics.jsonl: losses, and how often each stream is right."""

from spec_stream import charts, page
from spec_stream.charts import NUM_COLOURS, Series
from spec_stream.errors import UserError


def check(metrics, path):
  """Refuses records whose fields are of the wrong kind."""
  for number, record in enumerate(metrics, 1):
    for key, value in record.items():
      if value is not None and not isinstance(value, int | float):
        raise UserError(f"{path}, record {number}: {key!r} is no number")
    if record.get("step") is None:
      raise UserError(f"{path}, record {number}: there is no 'step'")


def section(metrics, workdir):
  """-> HTML of the training curves; says so where there are none."""
  title = "Training"
  names = {name for record in metrics for name in record}
  if not any(name.startswith("loss") for name in names):
    how = f"launch/train.py --config=... --workdir={workdir}"
    return page.section(title, page.missing("no metrics.jsonl", how))

  def curves(words):
    """Series of the metrics among {name: words} that were logged."""
    out, size = [], 1
    for i, (name, label) in enumerate(words.items()):
      known = [r for r in metrics if r.get(name) is not None]
      if not known:
        continue
      xs = [r["step"] for r in known]
      xs, ys, size = charts.thin(xs, [r[name] for r in known])
      out.append(Series(label, xs, ys, i, i >= NUM_COLOURS))
    return out, f"each point is the mean of {size} logs" if size > 1 else ""

  streams = [j for j in range(1, 1 + len(names)) if f"loss_stream_{j}" in names]
  losses = {"loss_main": "main stream"}
  losses |= {f"loss_stream_{j}": f"stream {j}" for j in streams}
  losses |= {"loss_prune": "pruner"}
  if not names & losses.keys():
    losses = {"loss": "loss"}
  accepts = {"accuracy_main": "main stream (next token)"}
  accepts |= {f"accept_{j}": f"stream {j}" for j in streams}
  series, note = curves(losses)
  figures = ""
  if series:
    figures += charts.line_chart(
      "Losses",
      series,
      x_label="training step",
      y_label="cross-entropy (nats per token)",
      note=note,
    )
  series, note = curves(accepts)
  if series:
    figures += charts.line_chart(
      "How often the most probable token is right",
      series,
      x_label="training step",
      y_label="of the target positions",
      y_low=0,
      y_high=1,
      y_percent=True,
      note=note,
    )
  last = metrics[-1]
  words = f"{charts.count(last['step'])} steps"
  if last.get("seconds"):
    words += f" in {charts.significant(last['seconds'] / 60)} minutes"
  if last.get("tokens_per_second"):
    words += f", {charts.significant(last['tokens_per_second'])} tokens/s"
  return page.section(
    title, f"<p>{words}</p>", f'<div class="charts">{figures}</div>'
  )
