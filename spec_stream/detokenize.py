"""Text from tokens as they come, never with half a character."""

from collections.abc import Sequence

_HALF = "\ufffd"  # what a tokenizer makes of bytes that are no UTF-8 yet


class Detokenizer:
  """Turns tokens into pieces of text.

    pieces = [detokenizer.push(ids) for ids in calls] + [detokenizer.flush()]

  The pieces joined are `tokenizer.decode` of all tokens. Bytes at the end that
  may be the start of a character wait for the tokens that complete it.
  """

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer
    self.ids: list[int] = []
    self.shown = 0  # letters given out

  def push(self, ids: Sequence[int]) -> str:
    """New tokens -> the text they complete."""
    self.ids += ids
    return self._rest(self.tokenizer.decode(self.ids).rstrip(_HALF))

  def flush(self) -> str:
    """What is left, whole or not."""
    return self._rest(self.tokenizer.decode(self.ids))

  def _rest(self, text: str) -> str:
    piece, self.shown = text[self.shown :], max(self.shown, len(text))
    return piece


def token_text(tokenizer, token: int) -> str:
  """One token for a person: special ones by name, else its text."""
  names = {
    tokenizer.pad_id: "<pad>",
    tokenizer.bos_id: "<bos>",
    tokenizer.sep_id: "<sep>",
    tokenizer.eos_id: "<eos>",
  }
  return names.get(token) or tokenizer.decode([token])
