"""What the configs share: a ConfigDict from the library's own dataclasses.

Defaults are those of ModelConfig, StreamConfig, DataConfig and TrainConfig, so
each is written once; a config file states what it changes. The vocabulary is
set by `data.vocab_size` alone: the model takes that of the tokenizer.
"""

import dataclasses

from ml_collections import ConfigDict

from spec_stream.data.pipeline import DataConfig
from spec_stream.models.config import ModelConfig, StreamConfig
from spec_stream.train.config import TrainConfig


def base() -> ConfigDict:
  """config.model, .data, .train and .mesh with every key and its default."""
  model = _fields(ModelConfig)
  del model["vocab_size"]
  model["streams"] = _fields(StreamConfig)
  return ConfigDict(
    {
      "model": model,
      "data": _fields(DataConfig),
      "train": _fields(TrainConfig),
      "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    }
  )


def _fields(dataclass) -> dict:
  default = dataclass()
  return {
    field.name: getattr(default, field.name)
    for field in dataclasses.fields(dataclass)
  }
