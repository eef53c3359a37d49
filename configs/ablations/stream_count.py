"""How many streams pay: J = 1 to 7 on one and the same frozen target.

  python launch/sweep.py --config=configs/ablations/stream_count.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/stream_count.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

The paper has no such table; it uses 3, and 4 in some figures. Lossless mode, so
that the target is the same to the bit, and only the draft differs. Small: 300
steps for each J beside the target of `_small`; 2 CPU cores. Paper: a 7B
checkpoint, 4 top layers, 5e-4; one accelerator of 80 GB. What to expect:
experiments/stream_count.
"""

from configs.ablations import _small
from spec_stream.sweep import Run

COUNTS = (1, 2, 3, 4, 5, 6, 7)


def get_config(scale: str = "small"):
  return _small.get_config(scale, "lossless")


def sweep(scale: str = "small"):
  bench = {"drafters": "streams", "tree_nodes": (4, 8, 16, 32)}
  runs = (
    Run(f"streams_{j}", {"model.streams.num_streams": j}, benchmark=[bench])
    for j in COUNTS
  )
  return _small.sweep(scale, runs)
