"""What the configs share: a ConfigDict from the library's own dataclasses.

Defaults are those of ModelConfig, StreamConfig, DataConfig and TrainConfig, so
each is written once; a config file states what it changes. The vocabulary is
set by `data.vocab_size` alone: the model takes that of the tokenizer.

With model.checkpoint=HF_DIR the shape, the vocabulary and the tokenizer are
those of that Hugging Face directory, whatever the config says of them.
"""

import dataclasses

from ml_collections import ConfigDict

from spec_stream.data.pipeline import DataConfig
from spec_stream.drafters import registry
from spec_stream.models.config import ModelConfig, RopeScaling, StreamConfig
from spec_stream.train.config import TrainConfig


def base() -> ConfigDict:
  """config.model, .data, .train and .mesh with every key and its default."""
  model = _fields(ModelConfig)
  for name in ("vocab_size", "known_tokens"):
    del model[name]
  # Left open: the defaults of ModelConfig, or what the checkpoint says.
  model.update(checkpoint="", max_positions=0, dtype="", param_dtype="")
  model["streams"] = _fields(StreamConfig)
  model["rope_scaling"] = _fields(RopeScaling)
  model["drafter"] = {"name": "", "options": {}}
  return ConfigDict(
    {
      "model": model,
      "data": _fields(DataConfig),
      "train": _fields(TrainConfig),
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    }
  )


def with_drafter(config: ConfigDict, name: str):
  """Adds a drafter's options, to be trained beside a frozen target: that of
  --config.train.init_from or --config.model.checkpoint."""
  options = _fields(registry.trained(name).Options)
  config.model.drafter = {"name": name, "options": options}
  config.train.update(trainable="drafter", target="main")
  config.train.objective = "next_token"  # the target has no streams


def _fields(dataclass) -> dict:
  default = dataclass()
  return {
    field.name: getattr(default, field.name)
    for field in dataclasses.fields(dataclass)
  }
