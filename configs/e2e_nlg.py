"""E2E-NLG: a slot-and-value record to a sentence, from scratch, 15 M weights.

  python launch/train.py --config=configs/e2e_nlg.py --workdir=runs/e2e

Without --config.data.manual_dir=DIR the original release is downloaded.
Device: 2 CPU cores (AMD EPYC), 47 minutes. What to expect: 2.2 tokens per call
with trees of 4 nodes; 3.0 after 400 more steps on its own outputs, and then
twice the speed of plain decoding (experiments/e2e_nlg).
"""

from configs import _base


def get_config():
  config = _base.base()
  config.model.update(
    width=320, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=64
  )
  config.model.ffw_dim = 1024
  config.model.streams.update(num_streams=3, num_stream_layers=1)
  config.data.update(dataset="e2e_nlg", vocab_size=1024)
  # Completions are 46 % of the tokens: 128 positions hold nearly all streams.
  config.data.update(seq_len=256, stream_positions=128, batch_size=4)
  config.train.update(steps=2400, learning_rate=2e-3, schedule="cosine")
  config.train.update(warmup_steps=100, log_every=20, save_every=100)
  # From scratch the streams shape the trunk as well: more weight than the 0.1
  # of the paper, which adapts a pretrained model.
  config.train.stream_weight = (0.3,)
  return config
