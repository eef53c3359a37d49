"""The tokenizer of a Hugging Face checkpoint directory.

`load` takes tokenizer.json (byte-level BPE, or BPE with byte fallback), else a
SentencePiece tokenizer.model, else GPT-2's vocab.json and merges.txt. Which
tokens are special comes from the configuration files beside them.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence

from spec_stream import json_text
from spec_stream.errors import UserError
from spec_stream.hf import chat
from spec_stream.hf.bpe import Bpe
from spec_stream.hf.sentencepiece import SentencePiece

_CORES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_SETTINGS = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "generation_config.json",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_KINDS = tuple(
  f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of checkpoints whose files name none: what such a token is always called.
_USUAL = {
  "bos_token": ("<s>", "<bos>", "<|endoftext|>"),
  "eos_token": ("</s>", "<eos>", "<|endoftext|>"),
}


@dataclasses.dataclass(frozen=True)
class Added:
  """A token beside the vocabulary; lstrip, rstrip: it swallows spaces there."""

  content: str
  id: int | None
  special: bool
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool = False
  single_word: bool = False


def load(directory) -> "HFTokenizer":
  """Reads the tokenizer of a checkpoint directory.

  Raises: UserError, one line with the path, if there is none, or a file is
  broken or of a kind that is not supported.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"{directory}: no such directory; give a checkpoint's")
  files = {}
  try:
    for name in (*_CORES, *_SETTINGS, *_TEMPLATES, "config.json"):
      if (directory / name).is_file():
        files[name] = (directory / name).read_bytes()
  except OSError as e:
    raise UserError(f"{directory / name} cannot be read: {e.strerror}") from e
  try:
    return HFTokenizer(files)
  except UserError as e:
    raise UserError(f"{directory}: {chat.one_line(e)}") from e


class HFTokenizer:
  """Text to ids and back, as the checkpoint was trained with.

  vocab_size: the highest id + 1. bos_id, eos_id: None if there is none; there
  is never a sep_id. eos_ids: all that end an answer, eos_id first. pad_id: that
  of the checkpoint, else eos_id, else 0.
  """

  sep_id = None

  def __init__(self, files: Mapping[str, bytes]):
    """files: contents by name, as found in a checkpoint's directory."""
    config = _json(files, "tokenizer_config.json")
    names = _special_names(config, _json(files, "special_tokens_map.json"))
    added = _added(config, _json(files, "added_tokens.json"), names)
    name, core = _core(files, config, added)
    self._core, self._template = core, chat.find(files, config)
    declared = _declared_ids(files)
    self._tokens = core.tokens | names
    for kind, usual in _USUAL.items():
      if kind not in self._tokens and not declared[kind + "_id"]:
        found = [t for t in usual if t in core.vocab]
        self._tokens |= {kind: found[0]} if found else {}

    def ids(kind):
      known = core.vocab.get(self._tokens.get(kind))
      return ([] if known is None else [known]) + declared[kind + "_id"]

    self.eos_ids = tuple(dict.fromkeys(ids("eos_token")))
    self.eos_id = next(iter(self.eos_ids), None)
    self.bos_id = next(iter(ids("bos_token")), None)
    self.pad_id = [*ids("pad_token"), *self.eos_ids, 0][0]
    self.vocab_size = 1 + max(core.vocab.values())
    # What makes the same tokenizer again; of config.json no more than its ids.
    cores = _CORES[2:] if name == "vocab.json" else (name,)
    needed = (*cores, *_SETTINGS, *_TEMPLATES)
    self._files = {n: data for n, data in files.items() if n in needed}
    generation = _json(files, "generation_config.json")
    rest = {k: v for k, v in declared.items() if v and not generation.get(k)}
    if rest:
      merged = json.dumps(generation | rest, indent=2) + "\n"
      self._files["generation_config.json"] = merged.encode()

  # -- text and ids ----------------------------------------------------------

  def encode(self, text: str, start: bool = True) -> list[int]:
    """Ids of `text`; what looks like a special token is plain text.

    start: False for text that goes on another: Llama's and Mistral's
    tokenizers put a space before a text (and `decode` takes it away), which
    does not belong in the middle of one.
    """
    return self._core.encode(text, specials=False, start=start)

  def encode_prompt(self, text: str) -> list[int]:
    """Ids as the checkpoint's model expects a text, with bos if it wants one.

    As in `transformers`, names of special tokens in the text are those tokens.
    """
    return self._core.encode_prompt(text, self.bos_id, self.eos_id)

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, as they are: no spaces are cleaned up.

    Special tokens are left out, as are ids behind the vocabulary, which the
    padded embedding of a model has. Half a character gives U+FFFD.
    """
    data = b"".join([self.token_bytes(int(i)) for i in ids])
    if self._core.strip is None:
      data = data.lstrip(b" ")
    for _ in range(self._core.strip or 0):
      data = data.removeprefix(b" ")
    return data.decode("utf-8", "replace")

  def token_bytes(self, token: int) -> bytes:
    """What a token adds to a text; nothing for special and unknown ones."""
    return self._core.table.get(token, b"")

  def encode_completion(self, text: str) -> list[int]:
    """Ids of what follows a prompt: no space is put before it."""
    return self.encode(text, start=False)

  @property
  def has_chat_template(self) -> bool:
    return self._template is not None

  def encode_chat(
    self, messages: Sequence[Mapping], add_generation_prompt: bool = True
  ) -> list[int]:
    """Ids of a conversation, through the checkpoint's chat template.

    messages: {"role": "user", "content": "..."} and so on, the oldest first.
    The template writes the special tokens, bos too; none is added to them.

    Raises: UserError, one line, for no template, a broken one, or messages
    that it refuses.
    """
    if self._template is None:
      raise UserError(
        "this checkpoint has no chat template (named default): give a prompt"
      )
    text = chat.render(
      self._template, messages, add_generation_prompt, self._tokens
    )
    return self._core.encode(text, specials=True, start=True)

  # -- files -----------------------------------------------------------------

  def save(self, directory) -> None:
    """Writes what `load(directory)` needs for this tokenizer, file by file.

    A file is renamed into place when complete; a new directory is too.

    Raises: UserError if another kind of tokenizer is there, or for no access.
    """
    directory = pathlib.Path(directory)
    for name in (*_CORES, *_SETTINGS[:3], *_TEMPLATES):
      if name not in self._files and (directory / name).exists():
        raise UserError(
          f"{directory} holds {name} of another tokenizer: give a new directory"
        )
    part = directory.with_name(f"{directory.name}.part-{os.getpid()}")
    try:
      part.mkdir(parents=True)
      for name, data in self._files.items():
        (part / name).write_bytes(data)
      if not directory.exists():
        part.rename(directory)
      else:
        for name in self._files:
          (part / name).replace(directory / name)
    except OSError as e:
      raise UserError(f"{directory} cannot be written: {e.strerror}") from e
    finally:
      shutil.rmtree(part, ignore_errors=True)

  def hash(self) -> str:
    """sha256 of what the tokenizer was read from and its special ids."""
    ids = [self.bos_id, self.eos_ids, self.pad_id, self.vocab_size]
    done = hashlib.sha256(json.dumps(ids).encode())
    for name, data in sorted(self._files.items()):
      if name != "generation_config.json":  # its ids count, not its sampling
        done.update(hashlib.sha256(name.encode() + data).digest())
    return done.hexdigest()


# -- the files ---------------------------------------------------------------


def _core(files: Mapping[str, bytes], config: dict, added: Sequence[Added]):
  """-> (name of the file that holds the vocabulary, what encodes)."""
  try:
    name = "tokenizer.json"
    if name in files:
      return name, Bpe.from_json(files[name], added)
    name = "tokenizer.model"
    if name in files:
      return name, SentencePiece(files[name], config, added)
    name = "vocab.json"
    if name in files and "merges.txt" in files:
      vocab = _json(files, name)
      return name, Bpe.from_merges(vocab, files["merges.txt"], config, added)
  except UserError as e:
    raise UserError(f"{name}: {e}") from e
  raise UserError(
    "it holds no tokenizer: it needs tokenizer.json, tokenizer.model, or "
    "vocab.json and merges.txt"
  )


def _json(files: Mapping[str, bytes], name: str) -> dict:
  try:
    value = json_text.parse(files.get(name, b"{}"))
  except ValueError as e:
    raise UserError(f"{name} is not JSON ({e})") from e
  if not isinstance(value, dict):
    raise UserError(f"{name} must be a JSON object")
  return value


def _text(token, where: str) -> str:
  """The text of a token, which is written as such or as {"content": ...}."""
  text = token.get("content") if isinstance(token, dict) else token
  if not (isinstance(text, str) and re.fullmatch("[^\ud800-\udfff]+", text)):
    raise UserError(f"{where}: a token must be text: {token!r:.60}")
  return text


def _special_names(config: dict, old: dict) -> dict[str, str]:
  """{"bos_token": "<s>", ...} of tokenizer_config.json and the older file."""
  # Of two names, the one that transformers takes.
  both = [config, old] if "added_tokens_decoder" in config else [old, config]
  names = {}
  for kind, place in itertools.product(_KINDS, both):
    if (token := place.get(kind)) is not None:
      names.setdefault(kind, _text(token, kind))
  return names


def _added(config: dict, numbers: dict, names: dict[str, str]) -> list[Added]:
  """All tokens that the files add to the vocabulary or call special."""
  special = set(names.values())
  more = config.get("additional_special_tokens") or []
  special |= {_text(t, "additional_special_tokens") for t in more}
  flags = ("lstrip", "rstrip", "normalized", "single_word")
  found = {}
  try:
    for i, token in (config.get("added_tokens_decoder") or {}).items():
      text = _text(token, "added_tokens_decoder")
      is_special = text in special or bool(token.get("special"))
      how = {flag: bool(token.get(flag)) for flag in flags}
      found[text] = Added(text, int(i), is_special, **how)
    for text, i in numbers.items():
      found.setdefault(text, Added(text, int(i), text in special))
  except (AttributeError, TypeError, ValueError) as e:
    raise UserError(f"the added tokens cannot be read ({e})") from e
  found |= {t: Added(t, None, True) for t in sorted(special - set(found))}
  return sorted(found.values(), key=lambda t: -1 if t.id is None else t.id)


def _declared_ids(files: Mapping[str, bytes]) -> dict[str, list[int]]:
  """Ids by kind, of generation_config.json, else config.json; -1 is none."""
  ids = {}
  for name in ("generation_config.json", "config.json"):
    config = _json(files, name)
    for kind in _IDS:
      value = config.get(kind)
      value = value if isinstance(value, list) else [value]
      value = [i for i in value if type(i) is int and i >= 0]
      ids[kind] = ids.get(kind) or value
  return ids
