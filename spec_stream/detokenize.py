"""Text from tokens as they come, never with half a character."""

from collections.abc import Sequence

_HALF = "\ufffd"  # what a tokenizer makes of bytes that are no UTF-8 yet


class Detokenizer:
  """Turns tokens into pieces of text.

    pieces = [detokenizer.push(ids) for ids in calls] + [detokenizer.flush()]

  The pieces joined are `tokenizer.decode` of all tokens. Bytes at the end that
  may be the start of a character wait for the tokens that complete it.

  It asks of a tokenizer that `decode` joins the bytes of tokens, takes spaces
  from the start at most, and writes U+FFFD for what is no UTF-8. Only the last
  tokens are then decoded again, so all pushes together take linear time.
  """

  def __init__(self, tokenizer):
    self.tokenizer = tokenizer
    # Tokens that end with a whole character, all of it given out. What follows
    # them decodes as it does behind all tokens: no space is taken from it.
    self._before: list[int] = []
    self._new: list[int] = []
    self._shown = 0  # letters given out of the text of both

  def push(self, ids: Sequence[int]) -> str:
    """New tokens -> the text they complete."""
    self._new += ids
    text = self.tokenizer.decode(self._before + self._new)
    whole = text.rstrip(_HALF)
    piece = self._rest(whole)
    if whole == text and (alone := self.tokenizer.decode(self._new)):
      self._before, self._new, self._shown = self._new, [], len(alone)
    return piece

  def flush(self) -> str:
    """What is left, whole or not."""
    return self._rest(self.tokenizer.decode(self._before + self._new))

  def _rest(self, text: str) -> str:
    piece, self._shown = text[self._shown :], max(self._shown, len(text))
    return piece


def token_text(tokenizer, token: int) -> str:
  """One token for a person: special ones by name, else its text."""
  names = {
    tokenizer.pad_id: "<pad>",
    tokenizer.bos_id: "<bos>",
    tokenizer.sep_id: "<sep>",
    **dict.fromkeys(tokenizer.eos_ids, "<eos>"),
  }
  return names.get(token) or tokenizer.decode([token])
