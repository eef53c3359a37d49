"""A SentencePiece tokenizer.model, for `HFTokenizer`.

Only the way from text to ids is the `sentencepiece` package's. Back go the
bytes of each token, whatever follows them.

What does not come back from `encode` and `decode`: a "▁" (U+2581) in the text,
which becomes a space, and what the model's own normaliser changes (nmt_nfkc
folds characters and runs of spaces; that of Llama, Mistral and Gemma is
"identity" and changes nothing).
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from spec_stream.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of pieces in the format


def token_bytes(token: str, space: str = "▁", fallback: bool = True) -> bytes:
  """The bytes of a token: `space` is one, and so is "<0xE2>" with fallback."""
  if fallback and (match := _BYTE.fullmatch(token)):
    return bytes([int(match[1], 16)])
  return (token.replace(space, " ") if space else token).encode()


class SentencePiece:
  """Text to ids through the `sentencepiece` package.

  vocab: ids by token. special: ids that stand for no text. table: bytes by id.
  strip: spaces to take from the start of a decoded text; None: all there are.
  tokens: special ones by kind ("bos_token", ...), as the file itself says.
  """

  def __init__(self, blob: bytes, config: dict, added: Sequence):
    """blob: the file. config: tokenizer_config.json. added: `tokenizer.Added`.

    Raises: UserError for what is no SentencePiece model or half of one.
    """
    proto = _parse(blob)
    pieces, trainer = proto.pieces, proto.trainer_spec
    self.vocab = {p.piece: i for i, p in enumerate(pieces)}
    self.special = {
      i for i, p in enumerate(pieces) if p.type in (_UNKNOWN, _CONTROL)
    }
    self.table = {i: token_bytes(p.piece) for i, p in enumerate(pieces)}
    ids = {k: getattr(trainer, f"{k}_id") for k in ("bos", "eos", "pad", "unk")}
    self.tokens = {
      f"{kind}_token": pieces[i].piece
      for kind, i in ids.items()
      if 0 <= i < len(pieces) and i in self.special
    }
    # By token: (special, strips the text left of it, right of it)
    self._added = {pieces[i].piece: (True, False, False) for i in self.special}
    for token in added:
      i = self.vocab.get(token.content) if token.id is None else token.id
      if i is None:
        continue
      self.vocab[token.content] = i
      self.table[i] = token.content.encode()
      self._added[token.content] = token.special, token.lstrip, token.rstrip
      if token.special:
        self.special.add(i)
        # Or the model itself would find it in any text.
        if i < len(pieces) and pieces[i].type == _USER_DEFINED:
          pieces[i].type = _CONTROL
    self.table |= dict.fromkeys(self.special, b"")
    spec = proto.normalizer_spec
    if config.get("add_prefix_space") is False:
      spec.add_dummy_prefix = False
    self.strip = 1 if spec.add_dummy_prefix else 0
    if spec.remove_extra_whitespaces:
      self.strip = None
    # Old ("legacy") tokenizers begin anew behind each special token.
    self._each_part_starts = config.get("legacy") is True
    self._add_bos = config.get("add_bos_token", True)
    self._add_eos = config.get("add_eos_token", False)
    self._start = _processor(proto)
    spec.add_dummy_prefix = False
    self._middle = _processor(proto)

  def encode(self, text: str, specials: bool, start: bool) -> list[int]:
    """Ids of `text`.

    specials: names of special tokens in it are those tokens, not letters.
    start: it is the start of a text, so the model's dummy space goes before it.
    """
    known = {t: x for t, x in self._added.items() if specials or not x[0]}
    ids = []
    for i, (part, token) in enumerate(_split(text, known)):
      at_start = start and (i == 0 or self._each_part_starts)
      if part:
        ids += (self._start if at_start else self._middle).encode(part)
      if token is not None:
        ids.append(self.vocab[token])
    return ids

  def encode_prompt(self, text: str, bos: int | None, eos: int | None):
    """Ids with the tokens that the checkpoint puts around a text."""
    head = [bos] if self._add_bos and bos is not None else []
    tail = [eos] if self._add_eos and eos is not None else []
    return [*head, *self.encode(text, specials=True, start=True), *tail]


def _parse(blob: bytes):
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(blob)
  except Exception as e:  # which one depends on protobuf's backend
    raise UserError(f"not a SentencePiece model, or half of one ({e})") from e
  if not proto.pieces:
    raise UserError("a SentencePiece model without any pieces")
  if not all(isinstance(p.piece, str) for p in proto.pieces):
    raise UserError("a SentencePiece model with pieces that are not UTF-8")
  if not proto.HasField("trainer_spec"):  # written behind the pieces
    raise UserError("a SentencePiece model that ends before its trainer_spec")
  if proto.trainer_spec.treat_whitespace_as_suffix:
    raise UserError(
      "a SentencePiece model with spaces behind words "
      "(treat_whitespace_as_suffix) is not supported"
    )
  return proto


def _processor(proto):
  import sentencepiece

  try:
    return sentencepiece.SentencePieceProcessor(
      model_proto=proto.SerializeToString()
    )
  except RuntimeError as e:
    raise UserError(f"not a usable SentencePiece model ({e})") from e


def _split(
  text: str, tokens: Mapping[str, tuple]
) -> Iterator[tuple[str, str | None]]:
  """(text, the token behind it) in order; the last has None for a token."""
  if tokens:
    longest_first = sorted(tokens, key=len, reverse=True)
    names = re.compile("|".join(map(re.escape, longest_first)))
    done = 0
    for match in names.finditer(text):
      part, token = text[done : match.start()], match[0]
      done = match.end()
      _, left, right = tokens[token]
      if right:
        done += len(text[done:]) - len(text[done:].lstrip())
      yield part.rstrip() if left else part, token
    text = text[done:]
  yield text, None
