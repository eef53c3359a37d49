"""A Hugging Face checkpoint, tuned with streams as the paper does.

  python launch/train.py --config=configs/checkpoint.py:MODE --workdir=DIR \\
    --config.model.checkpoint=HF_DIR --config.data.dataset=dialogsum

MODE: "shared" (LoRA serves main stream and streams, eq. 1, loss weights 1 and
0.1), "lossless" (the checkpoint's own tokens, unchanged; the streams learn its
distribution) or "next_token" (the baseline of shared mode, at equal steps).
Device: one accelerator of 80 GB for a 7B model; bytes by part are in
experiments/memory. What to expect: not run at that size yet.
"""

from configs import _base
from spec_stream.errors import UserError

MODES = ("shared", "lossless", "next_token")


def get_config(mode: str = "shared"):
  if mode not in MODES:
    raise UserError(f"no mode '{mode}': use one of {', '.join(MODES)}")
  config = _base.base()
  # Compute in bfloat16; the base keeps its own dtype (that of the file, be it
  # float16), adapters are float32.
  config.model.update(checkpoint="HF_DIR", dtype="bfloat16")
  config.model.streams.update(num_streams=3, num_stream_layers=4)
  config.model.streams.update(lora_rank=32, lora_alpha=32.0)
  config.data.update(dataset="e2e_nlg", too_long="skip")
  config.data.update(seq_len=1024, stream_positions=512, batch_size=8)
  config.train.update(trainable="adapters", learning_rate=5e-4, steps=2000)
  config.train.update(segment=128, remat=True, remat_logits=True)
  if mode == "lossless":
    config.model.streams.mode = "lossless"
    config.train.update(target="main", stream_weight=(1.0,))
  if mode == "next_token":
    config.train.objective = "next_token"
  return config
