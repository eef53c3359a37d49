"""The paper's three tasks at a size that trains on two CPU cores: 2 M weights.

  python launch/train.py --config=configs/paper_tasks.py:TASK --workdir=DIR \\
    --config.data.manual_dir=DIR --config.train.init_from=DIR

TASK: text_corpus (pretraining, next-token alone), then e2e_nlg, dialogsum or
sql_create_context. experiments/paper_tasks/run.sh has all commands, minutes
and results.
"""

from configs import _base


def get_config(task: str = "text_corpus"):
  config = _base.base()
  config.model.update(
    width=192, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=48
  )
  config.model.ffw_dim = 512
  config.model.streams.update(num_streams=3, num_stream_layers=2)
  config.data.update(dataset=task, vocab_size=4096, too_long="skip")
  config.train.update(schedule="cosine", log_every=10, save_every=100)
  if task == "text_corpus":
    config.data.update(seq_len=384, batch_size=4)
    config.train.update(steps=3500, learning_rate=3e-3, warmup_steps=100)
    config.train.objective = "next_token"
    return config
  config.data.update(seq_len=384, stream_positions=192, batch_size=4)
  if task == "dialogsum":  # long prompts, short completions
    config.data.update(seq_len=512, stream_positions=128)
  config.train.update(steps=700, learning_rate=2e-3, warmup_steps=50)
  # A base of so few weights learns most of a task here: as from scratch, the
  # streams need more weight than the paper's 0.1 (experiments/e2e_nlg).
  config.train.stream_weight = (0.3,)
  return config
