"""Prompts that a user gives, and their answers.

A request is text or token ids. Text needs the tokenizer of the run or the
checkpoint; token ids do not, and then answers have no text.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from spec_stream import checkpoints, json_text, stops, weights
from spec_stream.data import chat_prompts, rows
from spec_stream.decode import Decoder, collect, stream
from spec_stream.detokenize import Detokenizer
from spec_stream.drafters.base import Drafter
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig, from_dict
from spec_stream.models.transformer import Transformer
from spec_stream.rules import LOSSY

# Of a run or a checkpoint: any of them says that it has a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer", "tokenizer.model", "vocab.json")


@dataclasses.dataclass(frozen=True)
class Request:
  """Either text or token_ids; `name` says where it came from.

  chat: the text is what a user says, for the tokenizer's chat template.
  """

  name: str
  text: str | None
  token_ids: tuple[int, ...] | None
  seed: int
  chat: bool = False

  def words(self) -> str:
    """The prompt for a person."""
    return self.text or " ".join(map(str, self.token_ids))

  def encode(self, tokenizer, config: ModelConfig, room: int) -> list[int]:
    """Token ids of the prompt; a UserError if the model cannot take them.

    room: tokens that must fit behind it.
    """
    ids = self.token_ids
    if ids is None:
      ids = encode_text(tokenizer, self.text, self.chat)
    for token in ids:
      if not 0 <= token < config.vocab_size:
        raise UserError(
          f"{self.name}: token {token} is outside the vocabulary, which ends "
          f"at {config.vocab_size - 1}"
        )
    if len(ids) + room > config.max_positions:
      raise UserError(
        f"{self.name}: {len(ids)} tokens and {room} new ones do not fit the "
        f"cache of {config.max_positions} (model.max_positions): shorten it or "
        "lower max_new_tokens"
      )
    return list(ids)


def encode_text(tokenizer, text: str, chat: bool) -> list[int]:
  """Token ids of a prompt, as it is or as a user's message in a chat.

  Raises: UserError for a chat if the tokenizer has no template.
  """
  if not chat:
    return tokenizer.encode_prompt(text)
  return encode_chat(tokenizer, [("user", text)])


def encode_chat(tokenizer, turns: Sequence[tuple[str, str]]) -> list[int]:
  """Token ids of (role, text) turns through the tokenizer's chat template."""
  if not getattr(tokenizer, "has_chat_template", False):
    raise UserError(
      "--chat: the tokenizer of this model has no chat template; leave it out"
    )
  return tokenizer.encode_chat(
    [{"role": role, "content": text} for role, text in turns]
  )


# -- reading -----------------------------------------------------------------


def read(
  prompt: str | None,
  token_ids: str | None,
  prompts_file: str | None,
  seed: int,
  chat: bool = False,
) -> list[Request]:
  """Requests from exactly one of the three sources.

  chat: all of them are for the chat template; then none may be token ids.
  """
  found = _read(prompt, token_ids, prompts_file, seed)
  if not chat:
    return found
  for request in found:
    if request.token_ids is not None:
      raise UserError(
        f"{request.name}: --chat puts text into a template, not token ids: "
        "leave one of them out"
      )
  return [dataclasses.replace(request, chat=True) for request in found]


def _read(prompt, token_ids, prompts_file, seed) -> list[Request]:
  given = {
    "--prompt": prompt,
    "--token_ids": token_ids,
    "--prompts_file": prompts_file,
  }
  given = [name for name, value in given.items() if value is not None]
  if len(given) != 1:
    raise UserError(
      "give one of --prompt, --token_ids and --prompts_file, not "
      + (" and ".join(given) or "none of them")
    )
  if prompts_file is not None:
    return _read_file(prompts_file, seed)
  if prompt is not None:
    if not prompt.strip():
      raise UserError("--prompt is empty")
    rows.text(prompt, "--prompt")
    return [Request("--prompt", prompt, None, seed)]
  try:
    ids = tuple(int(word) for word in token_ids.replace(",", " ").split())
  except ValueError as e:
    raise UserError(
      f"--token_ids='{token_ids:.60}' must be whole numbers such as '5 17 3'"
    ) from e
  if not ids:
    raise UserError("--token_ids is empty: give numbers such as '5 17 3'")
  return [Request("--token_ids", None, ids, seed)]


def _read_file(path: str, seed: int) -> list[Request]:
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except (FileNotFoundError, IsADirectoryError) as e:
    raise UserError(f"--prompts_file={path}: no such file") from e
  except UnicodeDecodeError as e:
    raise UserError(f"--prompts_file={path}: not UTF-8 ({e.reason})") from e
  requests = [
    _parse(line, f"{path}, line {number}", seed)
    for number, line in enumerate(lines, 1)
    if line.strip()
  ]
  if not requests:
    raise UserError(f"--prompts_file={path} holds no prompt")
  return requests


def _parse(line: str, where: str, seed: int) -> Request:
  is_int = lambda x: isinstance(x, int) and not isinstance(x, bool)
  try:
    record = json_text.parse(line)
  except ValueError as e:
    raise UserError(f"{where}: not JSON ({e})") from e
  if not isinstance(record, dict):
    raise UserError(f"{where}: not a JSON object: {line:.40}")
  kinds = ("prompt", "token_ids", "turns")
  given = [name for name in kinds if record.get(name) is not None]
  if len(given) != 1:
    raise UserError(
      f'{where}: needs either "prompt" or "token_ids" (or the "turns" of a '
      "question)"
    )
  text, ids = record.get("prompt"), record.get("token_ids")
  if given == ["turns"]:
    text = chat_prompts.question(record, where).turns[0].strip()
  if ids is None and not (isinstance(text, str) and text.strip()):
    raise UserError(f'{where}: "prompt" must be text: {text!r:.40}')
  if ids is None:
    rows.text(text, f'{where}: "prompt"')
  if ids is not None:
    if not (isinstance(ids, list) and ids and all(map(is_int, ids))):
      raise UserError(f'{where}: "token_ids" must be a list of whole numbers')
    ids = tuple(ids)
  seed = record.get("seed", seed)
  if not is_int(seed) or not 0 <= seed < 2**32:
    raise UserError(f'{where}: "seed" must be a whole number in [0, 2**32)')
  return Request(where, text, ids, seed)


def load(
  requests: Sequence[Request],
  workdir=None,
  checkpoint: str = "",
  **settings,
) -> tuple[Transformer, object]:
  """-> (model, tokenizer) of a run, or of a Hugging Face directory.

  No tokenizer (None) if there is none and no request is text.

  settings: of `checkpoints.load_checkpoint`.
  """
  directory = pathlib.Path(checkpoint or workdir)
  needed = any(r.token_ids is None for r in requests)
  needed |= any((directory / name).exists() for name in _TOKENIZERS)
  if checkpoint:
    run = checkpoints.load_checkpoint(checkpoint, tokenizer=needed, **settings)
    return run.model, run.tokenizer
  if not needed:
    values = checkpoints.read_config(workdir)["model"]
    config = from_dict(values, f"{workdir}/config.json: model")
    values, _ = checkpoints.load_weights(workdir, config)
    return weights.to_model(config, values), None
  run = checkpoints.load_run(workdir)
  return run.model, run.tokenizer


# -- answering ---------------------------------------------------------------


def answers(
  model: Transformer,
  tokenizer,
  requests: Sequence[Request],
  drafter: Drafter,
  batch: int,
  max_new_tokens: int,
  own=None,
  stop: Sequence[str] = (),
  **settings,
) -> Iterator[dict]:
  """Decodes `batch` requests at once; yields their answers in order.

  own: the drafter's own weights, see `Decoder`. stop: texts that end an answer:
  the text ends before it, the tokens with the one that completes it. settings:
  of `decode.generate`, but for `seed`, which is each request's own.
  """
  if batch < 1:
    raise UserError(f"batch={batch} must be 1 or more")
  # All of them first: a bad one stops the work before it begins.
  room, config = max_new_tokens, model.config
  prompts = [r.encode(tokenizer, config, room) for r in requests]
  decoder = Decoder(model, drafter, own)
  settings["stop"] = _stop_table(tokenizer, stop, config)
  for start in range(0, len(prompts), batch):
    at = slice(start, start + batch)
    seeds = [r.seed for r in requests[at]]
    state = decoder.start(
      prompts[at], seed=seeds, max_new_tokens=room, **settings
    )
    for generation in collect(decoder.finish(state)):
      ids = generation.token_ids
      yield {
        "text": None if tokenizer is None else _text(tokenizer, ids, stop),
        "token_ids": ids,
        "target_calls": generation.target_calls,
        "tokens_per_call": round(generation.tokens_per_call, 4),
        "lossless": drafter.rule not in LOSSY,
      }


def pieces(
  model: Transformer,
  tokenizer,
  request: Request,
  drafter: Drafter,
  max_new_tokens: int,
  own=None,
  stop: Sequence[str] = (),
  **settings,
) -> Iterator[tuple[str, int]]:
  """Yields (text, number of tokens) for each call of the model as it comes.

  The text is what the tokens complete and what cannot be the start of a stop; a
  last piece with no tokens may hold what was never completed. Without a
  tokenizer the text is the token ids.
  """
  settings |= {"max_new_tokens": max_new_tokens, "seed": request.seed}
  settings["stop"] = _stop_table(tokenizer, stop, model.config)
  ids = request.encode(tokenizer, model.config, max_new_tokens)
  detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
  found, whole, shown = [], "", 0
  for i, step in enumerate(stream(model, ids, drafter, own, **settings)):
    if detokenizer is None:
      words = " ".join(map(str, step.token_ids))
      yield (" " if i else "") + words, len(step.token_ids)
      continue
    found += step.token_ids
    whole += detokenizer.push(step.token_ids)
    ready = len(_text(tokenizer, found, stop)) if stop else len(whole)
    if ready >= len(whole):  # no stop has come, but one may have begun
      ready = len(whole) - stops.held(whole, stop)
    yield whole[shown:ready], len(step.token_ids)
    shown = max(shown, ready)
  if detokenizer is not None:
    whole += detokenizer.flush()
    text = _text(tokenizer, found, stop) if stop else whole
    if rest := text[shown:]:
      yield rest, 0


def _text(tokenizer, ids: Sequence[int], stop: Sequence[str]) -> str:
  """Text of tokens up to where the first stop begins.

  Found in bytes, as the loop does: a tokenizer may take a space from the start
  of a text.
  """
  text = tokenizer.decode(ids)
  if not stop:
    return text
  data = b"".join(tokenizer.token_bytes(int(i)) for i in ids)
  behind = stops.behind(data, [x.encode() for x in stop])
  size = len(behind.decode("utf-8", "replace"))
  return text[: max(len(text) - size, 0)]


def _stop_table(tokenizer, stop: Sequence[str], config: ModelConfig):
  if stop and tokenizer is None:
    raise UserError(
      "--stop is text, which this model has no tokenizer for: leave it out"
    )
  for text in stop:
    rows.text(text, "--stop")
  return stops.of_text(tokenizer, stop, config.vocab_size) if stop else ()
