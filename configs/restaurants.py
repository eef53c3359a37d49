"""The built-in data: invented restaurant records to sentences; a first try.

  python launch/train.py --config=configs/restaurants.py --workdir=runs/tiny

Device: 2 CPU cores. Minutes: not run yet. What to expect: not run yet.
"""

from configs import _base


def get_config():
  config = _base.base()
  config.model.update(
    width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32
  )
  config.model.ffw_dim = 344
  config.model.streams.update(num_streams=3, num_stream_layers=2)
  config.data.update(dataset="restaurants", vocab_size=896)
  config.data.update(seq_len=256, stream_positions=128, batch_size=8)
  config.train.update(steps=600, learning_rate=3e-3, schedule="cosine")
  config.train.update(warmup_steps=50, log_every=20, save_every=200)
  return config
