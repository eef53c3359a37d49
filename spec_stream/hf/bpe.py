"""Byte-level BPE and tokenizer.json, for `HFTokenizer`.

Only the way from text to ids is the `tokenizers` package's. Back go the bytes
of each token, which unlike the package's decoders do not change when more
tokens follow: its byte fallback makes U+FFFD of a whole run of bytes if the
last one does not fit.
"""

import json
from collections.abc import Sequence

from spec_stream.errors import UserError
from spec_stream.hf.sentencepiece import token_bytes


class Bpe:
  """Text to ids; its fields are those of `SentencePiece`."""

  tokens: dict[str, str] = {}  # the file does not say which is which
  # Whether (bos, eos) go around a prompt; None: the post-processor knows.
  _add = None

  def __init__(self, core, added: Sequence):
    """core: `tokenizers.Tokenizer`. added: `tokenizer.Added`, if it lacks any.

    Raises: UserError if the ids of those do not fit, or for another decoder.
    """
    import tokenizers as tk

    core.no_truncation()
    core.no_padding()
    known = {t.content for t in core.get_added_tokens_decoder().values()}
    for token in added:
      i = core.token_to_id(token.content)
      if token.content in known or (i is None and token.id is None):
        continue
      how = {k: getattr(token, k) for k in ("lstrip", "rstrip", "single_word")}
      entry = tk.AddedToken(
        token.content,
        special=token.special,
        normalized=token.normalized,
        **how,
      )
      core.add_tokens([entry])
      got = core.token_to_id(token.content)
      if token.id not in (None, got):
        raise UserError(
          f"the token {token.content!r} is {got} here, but {token.id} in "
          "added_tokens_decoder: they belong to different tokenizers"
        )
    self._core, self._middle = core, None
    self._form = json.loads(core.to_str())
    level, space, fallback, self.strip = _decoder(self._form["decoder"])
    self.vocab = core.get_vocab(with_added_tokens=True)
    if not self.vocab:
      raise UserError("its vocabulary is empty")
    extra = core.get_added_tokens_decoder()
    self.special = {i for i, token in extra.items() if token.special}
    to_bytes = level_bytes if level else token_bytes
    how = {} if level else {"space": space, "fallback": fallback}
    self.table = {i: to_bytes(t, **how) for t, i in self.vocab.items()}
    self.table |= {i: token.content.encode() for i, token in extra.items()}
    self.table |= dict.fromkeys(self.special, b"")

  @classmethod
  def from_json(cls, blob: bytes, added: Sequence) -> "Bpe":
    """Of a tokenizer.json. Raises: UserError if it is none or is broken."""
    import tokenizers as tk

    try:
      core = tk.Tokenizer.from_str(blob.decode())
    except Exception as e:  # tokenizers raises bare Exception
      raise UserError(f"not a tokenizer file ({e})") from e
    return cls(core, added)

  @classmethod
  def from_merges(cls, vocab, merges: bytes, config: dict, added: Sequence):
    """Of GPT-2's or OPT's two files. Raises: UserError, as `from_json`.

    vocab: vocab.json; merges: merges.txt; config: tokenizer_config.json.
    """
    import tokenizers as tk

    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer")
    if not kind.startswith(("GPT2", "CodeGen")):
      raise UserError(f"a {kind} is no GPT-2 tokenizer: give a tokenizer.json")
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
      raise UserError("it must give a number for each token")
    missing = set(_level_letters()) - set(vocab)
    if missing:
      raise UserError(f"it lacks {len(missing)} of the 256 bytes")
    try:
      lines = merges.decode().split("\n")
      pairs = [tuple(x.split(" ")) for x in lines if x and x[:9] != "#version:"]
      core = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=pairs))
    except Exception as e:
      raise UserError(f"merges.txt does not go with it ({e})") from e
    space = bool(config.get("add_prefix_space", False))
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=space)
    core.decoder = tk.decoders.ByteLevel()
    self = cls(core, added)
    self._add = config.get("add_bos_token"), config.get("add_eos_token")
    return self

  def encode(self, text: str, specials: bool, start: bool) -> list[int]:
    """As `SentencePiece.encode`."""
    core = self._core
    if not start:
      core = self._middle = self._middle or _without_prefix(self._form)
    core.encode_special_tokens = not specials
    return core.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, text: str, bos: int | None, eos: int | None):
    """As `SentencePiece.encode_prompt`."""
    if self._add is None:
      self._core.encode_special_tokens = False
      return self._core.encode(text).ids
    ids = self.encode(text, specials=True, start=True)
    head = [bos] if self._add[0] and bos is not None else []
    return head + ids + ([eos] if self._add[1] and eos is not None else [])


def _level_letters() -> dict[str, int]:
  """GPT-2's letters for bytes: those that print stay, the rest go past 255."""
  prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in prints]
  return {chr(b): b for b in prints} | {
    chr(256 + n): b for n, b in enumerate(rest)
  }


_LEVEL = _level_letters()


def level_bytes(token: str) -> bytes:
  """The bytes of a token that is written in GPT-2's letters."""
  try:
    return bytes([_LEVEL[letter] for letter in token])
  except KeyError:
    return token.encode()


def _decoder(form: dict | None) -> tuple[bool, str, bool, int]:
  """-> (byte level, letter for a space, byte fallback, spaces to strip)."""
  level, space, fallback, strip = False, "", False, 0
  steps = (form or {}).get("decoders", [form])
  for step in steps:
    kind = (step or {}).get("type")
    if kind == "ByteLevel":
      level = True
    elif kind == "Replace" and step["content"] == " ":
      space = step["pattern"].get("String", "")
    elif kind == "ByteFallback":
      fallback = True
    elif kind == "Strip" and step["content"] == " " and not step["stop"]:
      strip += step["start"]
    elif kind == "Metaspace":
      space = step["replacement"]
      strip += step.get("prepend_scheme") != "never"
    elif kind != "Fuse":
      raise UserError(
        f"its decoder {kind or 'null'} is not supported: only byte-level ones "
        "and those with byte fallback are"
      )
  return level, space, fallback, strip


def _without_prefix(form: dict):
  """The tokenizer of a tokenizer.json without the space that starts a text."""
  import tokenizers as tk

  def walk(part):
    if isinstance(part, list):
      return [walk(x) for x in part if (x or {}).get("type") != "Prepend"]
    if not isinstance(part, dict):
      return part
    part = {k: walk(v) if k.endswith("izers") else v for k, v in part.items()}
    if "prepend_scheme" in part:
      part["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
      part["add_prefix_space"] = False
    return None if part.get("type") == "Prepend" else part

  form = form | {k: walk(form[k]) for k in ("normalizer", "pre_tokenizer")}
  return tk.Tokenizer.from_str(json.dumps(form))
