"""A byte-level BPE tokenizer, trained on the data set it serves.

Four ids are fixed: <pad> 0, <bos> 1, <sep> 2, <eos> 3. An example is
`<bos> prompt <sep> completion <eos>`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

from spec_stream.errors import UserError

SPECIALS = ("<pad>", "<bos>", "<sep>", "<eos>")
_SMALLEST = len(SPECIALS) + 256  # every byte is a token


class Tokenizer:
  """Text to ids and back; a thin cover of `tokenizers.Tokenizer`."""

  pad_id, bos_id, sep_id, eos_id = range(4)
  eos_ids = (eos_id,)  # all that end an answer

  def __init__(self, core):
    self._core = core
    self.vocab_size = core.get_vocab_size()

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learns merges from `texts`; the same texts give the same tokenizer.

    Raises:
      UserError: vocab_size too small for the 256 bytes and the specials.
    """
    import tokenizers as tk

    if vocab_size < _SMALLEST:
      raise UserError(
        f"data.vocab_size={vocab_size} is too small: a byte-level tokenizer "
        f"needs {_SMALLEST} or more"
      )
    core = tk.Tokenizer(tk.models.BPE())
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIALS),
      initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return cls(core)

  @classmethod
  def load(cls, path: str) -> "Tokenizer":
    """Reads a tokenizer.json; a missing or broken one is a UserError."""
    import tokenizers as tk

    if not os.path.isfile(path):
      raise UserError(f"no tokenizer at {path}")
    try:
      core = tk.Tokenizer.from_file(path)
    except Exception as e:  # tokenizers raises bare Exception
      raise UserError(f"{path} is not a tokenizer file: {e}") from e
    for i, token in enumerate(SPECIALS):
      if core.token_to_id(token) != i:
        raise UserError(f"{path} lacks the special token {token} at id {i}")
    return cls(core)

  def save(self, path: str) -> None:
    # In one move: a reader never sees half a file.
    self._core.save(path + ".part")
    os.replace(path + ".part", path)

  def encode(self, text: str) -> list[int]:
    """Ids of `text`; what looks like a special token is plain text."""
    self._core.encode_special_tokens = True
    return self._core.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, text: str) -> list[int]:
    return [self.bos_id, *self.encode(text), self.sep_id]

  def encode_completion(self, text: str) -> list[int]:
    """Ids of what follows a prompt."""
    return self.encode(text)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, specials left out; half a character decodes to U+FFFD."""
    return self._core.decode(list(map(int, ids)), skip_special_tokens=True)

  def token_bytes(self, token: int) -> bytes:
    """What a token adds to a text; nothing for specials and unknown ids."""
    from spec_stream.hf.bpe import level_bytes

    known = len(SPECIALS) <= token < self.vocab_size
    return level_bytes(self._core.id_to_token(token)) if known else b""

  def hash(self) -> str:
    """sha256 of the vocabulary and the merges, however a file writes them."""
    merges = json.loads(self._core.to_str())["model"]["merges"]
    pairs = [x.split(" ") if isinstance(x, str) else list(x) for x in merges]
    words = [sorted(self._core.get_vocab().items()), pairs]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()
