"""The rows of run.sh as two Markdown tables, decoding and training.

  python experiments/slices/table.py OUT

Figures are a chip's. FLOPs and bytes have, after a comma, their ratio to the
row without streams, where there is one. A shape or slice that run.sh does not
know is refused.
"""

import json
import pathlib
import sys

from spec_stream import roofline

SHAPES = {
  "llama2_7b": "Llama-2-7B",
  "llama3_8b": "Llama-3.1-8B",
  "llama2_70b": "Llama-2-70B",
}
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v6e:2x2")
HEADS = (
  "slice, shape",
  "J",
  "held + temporaries, GB",
  "GFLOP",
  "bytes, GB",
  "collectives",
  "roofline, ms",
)


def read(folder: pathlib.Path) -> dict:
  """{(program, slice, shape, J): row}."""
  rows = {}
  for path in sorted(folder.glob("*.jsonl")):
    for row in map(json.loads, path.read_text().splitlines()):
      kind = row["program"].split()[0]
      key = (kind, row["topology"], row["shape"], row["num_streams"])
      if row["topology"] not in SLICES or row["shape"] not in SHAPES:
        where = f"{row['topology']}, {row['shape']}"
        sys.exit(f"error: {path}: {where} is no row of run.sh")
      rows[key] = row
  return rows


def number(value: float) -> str:
  """Three digits, or from 100 on all before the point."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def against(row: dict, plain: dict | None, name: str, scale: float) -> str:
  text = number(row[name] / scale)
  if plain is None or plain is row or name not in plain:
    return text
  return f"{text}, {row[name] / plain[name]:.2f}"


def cells(row: dict, plain: dict | None) -> list[str]:
  """Of one row but for its names."""
  if not row["fits"]:
    used = row.get("used") or f"{row['memory']['total'] / 1e9:.1f} GB"
    return [f"does not fit: {used}", "", "", "", ""]
  memory = row["memory"]
  found = [
    f"{memory['arguments'] / 1e9:.2f} + {memory['temporaries'] / 1e9:.2f}",
    against(row, plain, "flops", 1e9),
  ]
  if "bytes" not in row:  # what its products alone take
    chip = roofline.CHIPS[row["topology"].split(":")[0]]
    least = number(1e3 * row["flops"] / chip.flops)
    return [*found, "unread", "unread", f"at least {least}, arithmetic"]
  counts = list(row["collectives"].values())
  count, size = (sum(x[i] for x in counts) for i in (0, 1))
  size = f"{size / 1e9:.1f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"
  bound = {"FLOPs": "arithmetic"}.get(row["bound"], row["bound"])
  return [
    *found,
    against(row, plain, "bytes", 1e9),
    f"{count:,}, {size}",
    f"{number(row['roofline_ms'])}, {bound}",
  ]


def tables(rows: dict, kind: str) -> list[str]:
  lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
  for place in SLICES:
    for shape, name in SHAPES.items():
      label = f"{place.replace(':', ' ')}, {name}"
      plain = rows.get((kind, place, shape, 0))
      for streams in (0, 1, 3, 7):
        row = rows.get((kind, place, shape, streams))
        if row is not None:
          line = [label, str(streams), *cells(row, plain)]
          lines.append("| " + " | ".join(line) + " |")
          label = ""
  return lines


def main(argv: list[str]) -> int:
  if len(argv) != 1 or not pathlib.Path(argv[0]).is_dir():
    print("usage: experiments/slices/table.py OUT (of run.sh)", file=sys.stderr)
    return 2
  rows = read(pathlib.Path(argv[0]))
  for kind in ("decode", "train"):
    print("\n".join([f"{kind}:", "", *tables(rows, kind), ""]))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
