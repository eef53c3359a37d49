"""How many streams pay: J = 1 to 7 on one and the same frozen target.

  python launch/sweep.py --config=configs/ablations/stream_count.py \\
    --workdir=DIR --config.data.manual_dir=DIR
  python launch/sweep.py --config=configs/ablations/stream_count.py:paper \\
    --workdir=DIR --config.model.checkpoint=HF_DIR

The paper has no such table; it uses 3, and 4 in some figures. Lossless mode, so
that the target is the same to the bit, and only the draft differs. Small: 2.2 M
weights from scratch on E2E-NLG, then 300 steps for each J; 2 CPU cores. Paper:
a 7B checkpoint, 4 top layers, 5e-4; one accelerator of 80 GB. What to expect:
experiments/stream_count.
"""

from configs import _base, checkpoint, paper_tasks
from spec_stream.sweep import Run

COUNTS = (1, 2, 3, 4, 5, 6, 7)


def get_config(scale: str = "small"):
  _base.check_scale(scale)
  if scale == "paper":
    return checkpoint.get_config("lossless")
  config = paper_tasks.get_config("e2e_nlg")
  config.model.streams.update(mode="lossless", lora_rank=32)
  config.model.streams.num_stream_layers = 4
  config.data.vocab_size = 1024
  config.train.update(trainable="adapters", init_from="RUN", target="main")
  config.train.update(steps=300, stream_weight=(1.0,))
  return config


def sweep(scale: str = "small"):
  start = {}
  if scale == "small":
    yield Run(
      "base",
      {
        "train.objective": "next_token",
        "train.trainable": "all",
        "train.init_from": "",
        "train.steps": 600,
      },
    )
    start["train.init_from"] = "{base}"
  for count in COUNTS:
    streams = {"model.streams.num_streams": count, **start}
    bench = {"drafters": "streams", "tree_nodes": (4, 8, 16, 32)}
    yield Run(f"streams_{count}", streams, benchmark=[bench])
