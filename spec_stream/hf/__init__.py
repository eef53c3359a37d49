"""Checkpoints of Hugging Face: weights, tokenizers and families of models."""
