"""A rival's drafter beside a target of configs/paper_tasks.py.

  python launch/train.py --config=configs/rivals.py:TASK/DRAFTER \\
    --workdir=DIR --config.train.init_from=TARGET --config.data.manual_dir=DIR

TASK: e2e_nlg, dialogsum, sql_create_context. DRAFTER: medusa, hydra, redrafter
or eagle. The target is frozen; its own distribution is what is learnt
(train.target=main). experiments/rivals has the commands and the results.
"""

from configs import _base, paper_tasks
from spec_stream.errors import UserError


def get_config(which: str = "e2e_nlg/medusa"):
  task, _, drafter = which.partition("/")
  if not drafter:
    raise UserError(f"'{which}': give TASK/DRAFTER, such as e2e_nlg/medusa")
  config = paper_tasks.get_config(task)
  _base.with_drafter(config, drafter)
  config.train.steps = 200
  return config
