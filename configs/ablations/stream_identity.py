"""How a stream knows which it is: an embedding, or rotated values (figure 11a).

  python launch/sweep.py --config=configs/ablations/stream_identity.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/stream_identity.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

Equation 3 against equation 9, which has no weights of its own, in shared mode
for several numbers of stream layers; each with the streams' rotary positions at
t + j, which tell them apart too, and all at t, as the paper may have had them.
Small: 300 steps each beside the target of `_small`; 2 CPU cores. Paper: 5e-4,
one accelerator of 80 GB. What to expect: experiments/stream_identity.
"""

from configs.ablations import _small
from spec_stream.sweep import Run

LAYERS = {"small": (1, 4), "paper": (1, 4, 8, 16)}


def get_config(scale: str = "small"):
  return _small.get_config(scale, "shared")


def sweep(scale: str = "small"):
  bench = {"drafters": "streams", "tree_nodes": (4, 16)}
  runs = (
    Run(
      f"{identity}_{position}_{layers}",
      {
        "model.streams.stream_id": identity,
        "model.streams.stream_position": position,
        "model.streams.num_stream_layers": layers,
      },
      benchmark=[bench],
      evaluate=[{"prompts": 300}],
    )
    for layers in LAYERS[scale]
    for identity in ("embedding", "rotation")
    for position in ("future", "same")
  )
  return _small.sweep(scale, runs)
