"""Top-k sampling at temperature 1, k = 10 to 50 (the paper's figure 11b).

  python launch/sweep.py --config=configs/ablations/sampling.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/sampling.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

Streams and Medusa's heads on one frozen target, in the same loop, with as many
nodes; k = 0 samples among all tokens, and greedy decoding stands beside. Small:
300 steps each beside the target of `_small`; 2 CPU cores. Paper: one
accelerator of 80 GB. What to expect: experiments/sampling.
"""

from configs.ablations import _small
from spec_stream.sweep import Run

TOP_K = (10, 20, 30, 40, 50, 0)


def get_config(scale: str = "small"):
  return _small.get_config(scale, "lossless")


def sweep(scale: str = "small"):
  nodes = {"drafters": "streams,medusa={medusa}", "tree_nodes": (4, 16)}
  benches = [{**nodes, "temperature": 1.0, "top_k": k} for k in TOP_K]
  medusa = {
    "model.drafter.name": "medusa",
    "model.streams.num_streams": 0,
    "model.streams.lora_rank": 0,
    "train.trainable": "drafter",
    "train.objective": "next_token",
  }
  runs = (
    Run("medusa", medusa),
    Run("streams", benchmark=[nodes, *benches]),
  )
  return _small.sweep(scale, runs)
