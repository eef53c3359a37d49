"""Data sets as TFDS builders, the tokenizer, and the input pipeline."""
