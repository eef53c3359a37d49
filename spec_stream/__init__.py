"""Speculative Streaming in JAX and Flax (arXiv 2402.11131).

    from spec_stream import StreamDraft, generate, load_run

Names are imported when first used: this package itself imports nothing.
"""

import importlib

_PUBLIC = {
  "Decoder": "decode",
  "Generation": "decode",
  "NoDraft": "drafters.none",
  "Prune": "models.prune",
  "StreamDraft": "drafters.streams",
  "TreeSpec": "tree",
  "UserError": "errors",
  "for_decoding": "models.transformer",
  "generate": "decode",
  "load_run": "checkpoints",
  "stream": "decode",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
  if name not in _PUBLIC:
    raise AttributeError(f"module 'spec_stream' has no attribute '{name}'")
  module = importlib.import_module(f"spec_stream.{_PUBLIC[name]}")
  return getattr(module, name)
