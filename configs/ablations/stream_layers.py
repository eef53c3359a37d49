"""How many layers the streams need: N_s = 1 to 8 (the paper's figure 8).

  python launch/sweep.py --config=configs/ablations/stream_layers.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/stream_layers.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

Shared mode: adapters in the N_s top layers serve the main stream too, so that
both what is said (ROUGE) and how many tokens a call gives depend on N_s; beside
them next-token tuning of the same layers, without streams. Small: a target of 8
layers (`_small`), 300 steps for each; 2 CPU cores. Paper: 5e-4, one accelerator
of 80 GB. What to expect: experiments/stream_layers.
"""

from configs.ablations import _small
from spec_stream.sweep import Run

LAYERS = (1, 2, 3, 4, 5, 6, 7, 8)


def get_config(scale: str = "small"):
  return _small.get_config(scale, "shared", layers=8)


def sweep(scale: str = "small"):
  bench = {"drafters": "streams", "tree_nodes": (4, 16)}
  score = {"prompts": 300}

  def runs():
    for count in LAYERS:
      layers = {"model.streams.num_stream_layers": count}
      yield Run(f"layers_{count}", layers, [bench], [score])
      plain = {**layers, "train.objective": "next_token"}
      yield Run(f"next_token_{count}", plain, evaluate=[score])

  return _small.sweep(scale, runs())
