"""How near a stream is to the future that it stands for, layer by layer.

  python experiments/similarity/similarity.py RUN [--prompts=64] [--out=DIR]

RUN: of launch/train.py, with streams. On the target's own greedy outputs to
test prompts: the cosine between stream j at position t and the main stream at
t + j, after each layer that holds streams, before the final norm (the paper's
figure 12). Beside it the main stream at t itself, which is what a stream starts
from, against the same. Prints a table, and writes it and a plot to DIR.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import UserError, evaluate, load_run, task
from spec_stream.drafters.none import NoDraft
from spec_stream.models.layers import wide
from spec_stream.models.transformer import (
  ALL,
  causal_mask,
  forward,
  merge_lora,
)

ROWS = 8  # sequences of one pass


@functools.partial(jax.jit, static_argnames="graphdef")
def _sums(graphdef, state, tokens, first, length):
  """-> sums of cosines [2, J, n] (of the streams, of the main stream at t), and
  how many [J], over positions that a step of decoding drafts from.

  tokens: [B, T], of which those from `first` [B] to `length` [B] are output.
  """
  model = nnx.merge(graphdef, state)
  config = model.config
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = order < length[:, None]
  out = forward(
    model,
    tokens,
    order,
    causal_mask(inside.astype(jnp.int32)),
    streams=ALL,
    taps=tuple(range(config.insertion_layer, config.num_layers)),
  )
  sums, counts = [], []
  for j in range(1, config.streams.num_streams + 1):
    valid = (order >= first[:, None] - 1) & (order + j < length[:, None])
    future = jnp.roll(out.taps, -j, 1)
    both = [
      jnp.where(valid[..., None], _cosine(x, future), 0).sum((0, 1))
      for x in (out.stream_taps[:, :, j - 1], out.taps)
    ]
    sums.append(jnp.stack(both))
    counts.append(valid.sum())
  return jnp.stack(sums, 1), jnp.stack(counts)


def _cosine(a, b):
  a, b = (x.astype(wide(x.dtype)) for x in (a, b))
  norm = lambda x: jnp.sqrt(jnp.sum(x * x, -1))
  return jnp.sum(a * b, -1) / jnp.maximum(norm(a) * norm(b), 1e-30)


def cosines(model, prompts, outputs) -> np.ndarray:
  """[2, J, n] mean cosines: of the streams, and of the main stream at t.

  prompts, outputs: token ids. n: the layers that hold streams, from below.

  Raises: UserError if the model has no streams, or the outputs are too short.
  """
  if not model.config.streams.num_streams:
    raise UserError("this model has no streams")
  graphdef, state = nnx.split(merge_lora(model))
  rows = [[*p, *o] for p, o in zip(prompts, outputs, strict=True)]
  size = -(-max(map(len, rows)) // 64) * 64
  total, count = 0.0, 0
  for start in range(0, len(rows), ROWS):
    tokens = np.zeros((ROWS, size), np.int32)
    first, length = np.ones((2, ROWS), np.int32)
    for i, row in enumerate(rows[start : start + ROWS]):
      tokens[i, : len(row)] = row
      first[i], length[i] = len(prompts[start + i]), len(row)
    more = _sums(graphdef, state, tokens, first, length)
    total, count = total + np.asarray(more[0], float), count + more[1]
  if not count.all():
    raise UserError("the outputs are too short for these streams: more prompts")
  return total / np.asarray(count)[None, :, None]


def render(found: np.ndarray, first_layer: int) -> str:
  """A Markdown table; a line is a layer, a cell "stream j / main at t"."""
  _, num_streams, num_layers = found.shape
  names = [f"stream {j}" for j in range(1, num_streams + 1)]
  lines = ["| layer | " + " | ".join(names) + " |"]
  lines.append("|---" * (num_streams + 1) + "|")
  for layer in range(num_layers):
    cells = [f"{s:.2f} / {m:.2f}" for s, m in found[:, :, layer].T]
    lines.append(f"| {first_layer + layer} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(found: np.ndarray, first_layer: int, path):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
  layers = first_layer + np.arange(found.shape[2])
  for j, (streams, main) in enumerate(zip(*found), 1):
    (line,) = axes.plot(layers, streams, marker="o", label=f"stream {j}")
    axes.plot(layers, main, linestyle=":", color=line.get_color())
  axes.plot([], [], color="gray", linestyle=":", label="main stream at t")
  axes.set_xlabel("layer")
  axes.set_ylabel("cosine with the main stream at t + j")
  axes.set_xticks(layers)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=100)
  pyplot.close(figure)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("run")
  parser.add_argument("--prompts", type=int, default=64)
  parser.add_argument("--out", default="", help="directory of what is written")
  args = parser.parse_args(argv)
  run = load_run(args.run)
  prompts = [p.token_ids for p in task.prompts(run, "test", args.prompts)]
  made = evaluate.decode_all(
    run.model, prompts, NoDraft(), end_token=run.tokenizer.eos_ids
  )
  found = cosines(run.model, prompts, [g.token_ids for g in made])
  first = run.model.config.insertion_layer + 1  # as the paper counts them
  text = render(found, first)
  print(text, end="")
  if args.out:
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "cosines.md").write_text(text)
    plot(found, first, out / "cosines.png")
  return 0


if __name__ == "__main__":
  try:
    sys.exit(main(sys.argv[1:]))
  except UserError as error:
    sys.exit(f"error: {error}")
