"""The drafters by name: a new one is a new file and a line here."""

import dataclasses
import importlib

from spec_stream.errors import UserError
from spec_stream.models.config import DrafterConfig, ModelConfig, make

DRAFTERS = {
  "none": "none:NoDraft",
  "streams": "streams:StreamDraft",
  "draft_model": "draft_model:DraftModel",
  "prompt_lookup": "prompt_lookup:PromptLookup",
  "lookahead": "lookahead:Lookahead",
  "medusa": "medusa:MedusaDraft",
  "hydra": "hydra:HydraDraft",
  "redrafter": "redrafter:RecurrentDraft",
  "eagle": "eagle:EagleDraft",
}


def get(name: str) -> type:
  """The class of a drafter. Raises: UserError if there is none of the name."""
  if name not in DRAFTERS:
    raise UserError(
      f"unknown drafter '{name}': known ones are {', '.join(DRAFTERS)}"
    )
  file, cls = DRAFTERS[name].split(":")
  return getattr(importlib.import_module(f"spec_stream.drafters.{file}"), cls)


def trained(name: str) -> type:
  """As `get`, of a drafter whose weights can be trained beside a target."""
  drafter = get(name)
  if drafter.Module is None:
    known = [n for n in DRAFTERS if get(n).Module is not None]
    raise UserError(
      f"model.drafter.name={name} has no weights beside the target's: use one "
      f"of {', '.join(known)}"
    )
  return drafter


def default(config: ModelConfig) -> str:
  """Who drafts if nothing else is said: what the model was trained with."""
  streams = "streams" if config.streams.num_streams else "none"
  return config.drafter.name or streams


def options(config: DrafterConfig):
  """The `Options` of a config. Raises: UserError for one it does not have."""
  cls = trained(config.name).Options
  known = [field.name for field in dataclasses.fields(cls)]
  for name, _ in config.options:
    if name not in known:
      raise UserError(
        f"model.drafter.options has no '{name}' for {config.name}: its options "
        f"are {', '.join(known)}"
      )
  made = make(cls, dict(config.options), "model.drafter.options")
  if made.length < 1 or getattr(made, "layers", 1) < 1:
    raise UserError(
      f"model.drafter.options: length and layers of {config.name} must be 1 or "
      "more"
    )
  return made


def make_module(config: ModelConfig, rngs):
  """Fresh weights of the config's drafter, an nnx.Module; None without one."""
  if not config.drafter.name:
    return None
  module = trained(config.drafter.name).Module
  return module(config, options(config.drafter), rngs=rngs)
