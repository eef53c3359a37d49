"""The built-in data: invented restaurant records to sentences; a first try.

  python launch/train.py --config=configs/restaurants.py --workdir=runs/first

Device: 2 CPU cores (AMD EPYC). Minutes: 4 to 5. What to expect: a main loss of
0.5, stream 1 right at 0.7 of the positions; 2.7 tokens per call with 4 nodes.
The width and depth are such that a plain step is bound by memory.
"""

from configs import _base


def get_config():
  config = _base.base()
  config.model.update(
    width=320, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64
  )
  config.model.ffw_dim = 1024
  config.model.streams.update(num_streams=3, num_stream_layers=1)
  config.data.update(dataset="restaurants", vocab_size=896)
  config.data.update(seq_len=256, stream_positions=128, batch_size=4)
  config.train.update(steps=300, learning_rate=3e-3, schedule="cosine")
  config.train.update(warmup_steps=30, log_every=10, save_every=100)
  config.train.stream_weight = (0.3,)  # from scratch: see e2e_nlg
  return config
