"""LoRA adapters of a run in the format of PEFT, and nothing else of it.

Where a plain LoRA means the same model: in shared mode without eq. 1's main
stream that attends to its streams, on the base of a Hugging Face directory.
"""

import jax
import numpy as np

from spec_stream import card, weights
from spec_stream.checkpoints import Run
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint, layout
from spec_stream.hf import config as hf_config
from spec_stream.hf.families import BY_TYPE
from spec_stream.hf.writing import (
  check,
  whole,
  write_json,
  write_tensors,
  write_text,
)
from spec_stream.models.config import ModelConfig
from spec_stream.models.transformer import Transformer


def write(run: Run, out, *, workdir=None) -> list[str]:
  """Writes the LoRA adapters as PEFT does, into the new directory `out`.

  Args, Returns: as `export.merge`.

  Raises:
    UserError: `out` exists, there are no adapters, or PEFT would make another
      model of them.
  """
  check(out)
  config, added = run.model.config, run.model.config.streams
  if not added.lora_rank:
    raise UserError(
      "this run has no LoRA adapters (model.streams.lora_rank=0): export it "
      "with --what=merged"
    )
  if added.mode == "lossless":
    raise UserError(
      "the adapters of lossless mode act on streams alone, but PEFT would "
      "apply them to the main stream, which would be another model: use "
      "--what=streams, or --what=merged"
    )
  if added.attends:
    raise UserError(
      "PEFT would make another model of these adapters: " + card.ATTENDS + "; "
      "use --what=merged, or train with "
      "model.streams.main_attends_streams=False"
    )
  train = run.config.get("train", {})
  if train.get("trainable") != "adapters":
    raise UserError(
      "this run trained its base as well (train.trainable=all), which adapters "
      "do not hold: use --what=merged"
    )
  if not hf_config.is_checkpoint(train.get("init_from", "")):
    raise UserError(
      "adapters belong to a Hugging Face directory, but this run began with "
      f"{train.get('init_from') or 'nothing'}: use --what=merged"
    )
  model_type, _ = hf_config.describe(config, card.model_type_of(run.config))
  table = BY_TYPE[model_type].TABLE
  adapted = _adapted(config, table)
  arrays = _tensors(run.model, table, adapted)
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()
  }
  settings = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": card.base_name(run.config),
    "r": added.lora_rank,
    "lora_alpha": added.lora_alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_modules": list(adapted),
  }
  use = (
    "    model = AutoModelForCausalLM.from_pretrained(BASE)\n"
    "    model = PeftModel.from_pretrained(model, THIS_DIRECTORY)\n\n"
    f"BASE is {card.base_name(run.config) or 'what the run began with'}."
  )
  text = card.card(run, out, workdir, use)
  with whole(out) as part:
    write_tensors(part / "adapter_model.safetensors", shapes, arrays.values())
    write_text(part / "README.md", text)
    write_json(part / "adapter_config.json", settings)
  return []


def _adapted(config: ModelConfig, table) -> dict[str, tuple[str, int]]:
  """Module of each adapted projection -> (its kernel's path here, its place
  among the projections side by side in that kernel)."""
  found = {}
  for path in weights.shapes(config):
    if path.endswith("/lora_a"):
      kernel = path.removesuffix("lora_a") + "kernel"
      row, layer = checkpoint.entry(table, kernel)
      for i, name in enumerate(row.names(layer)):
        found[name.removesuffix(".weight")] = (kernel, i)
  return found


def _tensors(model: Transformer, table, adapted) -> dict[str, np.ndarray]:
  """Arrays by PEFT's names, which has a pair for each projection: lora_A
  [rank, in], lora_B [out, rank].

  Here projections side by side share A, and B is laid out as their kernel is.
  """
  values, arrays = weights.to_weights(model), {}
  for module, (kernel, i) in adapted.items():
    row, _ = checkpoint.entry(table, kernel)
    a_path, b_path = (
      kernel.removesuffix("kernel") + name for name in ("lora_a", "lora_b")
    )
    a, b = np.asarray(values[a_path]), np.asarray(values[b_path])
    b = layout.unpack(row, model.config, b_path, b)[i]
    name = f"base_model.model.{module}"
    arrays[f"{name}.lora_A.weight"] = a.reshape(-1, a.shape[-1]).T
    arrays[f"{name}.lora_B.weight"] = b
  return arrays
