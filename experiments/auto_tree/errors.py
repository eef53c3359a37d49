"""How far predictions are from what was measured: RESULTS.jsonl -> two tables.

For each batch the fixed trees, and what --tree=auto made of it; the last
benchmark of a batch counts. Errors are of the speed-up, in percent of what was
measured.
"""

import json
import pathlib
import sys


def last_of_each_batch(rows: list[dict]) -> dict[int, list[dict]]:
  """The rows of the newest benchmark of each batch, by batch."""
  runs = {}
  for row in rows:
    if "predicted_speedup" in row:
      runs.setdefault(row["run_id"], []).append(row)
  return dict(sorted((run[0]["batch"], run) for run in runs.values()))


def interval(row: dict) -> str:
  if row["speedup_low"] is None:  # of a single batch
    return ""
  return f"[{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def error(row: dict) -> float:
  """Of the predicted speed-up, in percent of the measured one."""
  return 100 * (row["predicted_speedup"] / row["speedup"] - 1)


def render(rows: list[dict]) -> str:
  """Markdown."""
  fixed, chosen, errors = [], [], []
  for batch, run in last_of_each_batch(rows).items():
    plain = next(r for r in run if r["method"] == "none")
    noise = next(r for r in run if "A against A" in r["method"])
    trees = [r for r in run if r["method"] == "streams"]
    for row in trees:
      errors.append(error(row))
      fixed.append(
        f"| {batch} | {row['tree_nodes']} | "
        f"{row['predicted_tokens_per_call']:.2f}, "
        f"{row['tokens_per_call']:.2f} | {row['predicted_step_cost']:.2f}, "
        f"{row['step_cost']:.2f} | {row['predicted_speedup']:.2f} | "
        f"{row['speedup']:.2f} {interval(row)} | {errors[-1]:+.0f} % |"
      )
    best = max(trees, key=lambda r: r["speedup"])
    # "auto (streams)" until 44ce1f9.
    (auto,) = [r for r in run if "auto" in r["method"]]
    tree = "none"
    if auto["tree_nodes"] > 1:
      tree = f"{auto['tree_nodes']} nodes, J = {auto['num_streams']}"
    chosen.append(
      f"| {batch} | {plain['tokens_per_second']:.0f} | {tree} | "
      f"{auto['tokens_per_second']:.0f} | {auto['predicted_speedup']:.2f} | "
      f"{auto['speedup']:.2f} {interval(auto)} | {best['tree_nodes']} nodes: "
      f"{best['speedup']:.2f} | {interval(noise)} |"
    )
  mean = sum(map(abs, errors)) / len(errors)
  return "\n".join(
    [
      "| batch | plain, tokens/s | auto chose | auto, tokens/s | predicted | "
      "speed-up [95 %] | best fixed tree | noise |",
      "|---|---|---|---|---|---|---|---|",
      *chosen,
      "",
      "| batch | nodes | tokens/call predicted, measured | step cost "
      "predicted, measured | speed-up predicted | measured [95 %] | error |",
      "|---|---|---|---|---|---|---|",
      *fixed,
      "",
      f"Mean error of {len(errors)} settings: {mean:.1f} %, the largest "
      f"{max(map(abs, errors)):.1f} %.",
    ]
  )


if __name__ == "__main__":
  lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
  print(render([json.loads(line) for line in lines if line.strip()]))
