"""How wide a tree pays: C = 1 to 6 candidates of each of 3 streams, all of
their products (the paper's tree), without pruning and with it (figure 7).

  python launch/sweep.py --config=configs/ablations/tree_width.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/tree_width.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

One training with a pruner, and a benchmark for each tree; beside them
best-first trees of as many nodes. Small: 15 M weights from scratch on E2E-NLG,
shared mode with a plain main stream, 700 steps; 2 CPU cores. Paper: a 7B
checkpoint, shared mode, 4 top layers. What to expect: experiments/tree_width.
"""

from configs import checkpoint, e2e_nlg
from configs.ablations import _small
from spec_stream.sweep import Run

WIDTHS = (1, 2, 3, 4, 5, 6)


def get_config(scale: str = "small"):
  _small.check(scale)
  if scale == "paper":
    config = checkpoint.get_config("shared")
  else:
    config = e2e_nlg.get_config()
    config.model.streams.num_stream_layers = 4
    # Plain decoding of this model is then the fastest that there is.
    config.model.streams.main_attends_streams = False
    config.train.steps = 700
  config.model.streams.prune_rank = 8
  return config


def sweep(scale: str = "small"):
  prompts = {"drafters": "streams", "prompts": 64 if scale == "paper" else 24}
  benchmarks = []
  for width in WIDTHS:
    nodes = sum(width**depth for depth in range(4))
    tree = {**prompts, "tree": "cartesian", "tree_width": width}
    benchmarks.append(tree)
    benchmarks.append({**tree, "kept_nodes": min(nodes // 2, 16)})
    benchmarks.append({**prompts, "tree": "best_first", "tree_nodes": nodes})
  yield Run("trained", benchmark=benchmarks)
