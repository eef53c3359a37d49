"""Speculative Streaming in JAX and Flax (arXiv 2402.11131)."""
