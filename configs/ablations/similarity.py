"""How early a stream knows the future: its cosine with it, layer by layer.

  python launch/sweep.py --config=configs/ablations/similarity.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python experiments/similarity/similarity.py DIR/streams --out=DIR
  python launch/sweep.py --config=configs/ablations/similarity.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

The paper's figure 12: stream j at t against the main stream at t + j, in the
upper half of the layers (16 of 32 there). Lossless mode, so that what is to be
guessed stands still. Small: 300 steps beside a target of 8 layers (`_small`); 2
CPU cores. Paper: one accelerator of 80 GB. What to expect:
experiments/similarity.
"""

from configs.ablations import _small
from spec_stream.sweep import Run

LAYERS = {"small": 4, "paper": 16}


def get_config(scale: str = "small"):
  config = _small.get_config(scale, "lossless", layers=8)
  config.model.streams.num_stream_layers = LAYERS[scale]
  return config


def sweep(scale: str = "small"):
  bench = {"drafters": "streams", "tree_nodes": (4, 16)}
  return _small.sweep(scale, [Run("streams", benchmark=[bench])])
