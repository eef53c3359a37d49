"""The families of checkpoints, by the `model_type` of their config.json.

A family is a module with MODEL_TYPES, ARCHITECTURES, TABLE (weight -> tensors,
see `layout`), `read` (config.json -> fields of ModelConfig) and `write` (back).
"""

from types import ModuleType

from spec_stream.hf.families import gemma, llama, opt, phi, phi3

BY_TYPE: dict[str, ModuleType] = {
  model_type: family
  for family in (llama, phi, phi3, opt, gemma)
  for model_type in family.MODEL_TYPES
}
