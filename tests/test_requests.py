"""Prompts of a user: read, refused, answered in order; text without halves."""

import dataclasses
import json
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL, make_model

from spec_stream import requests
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.detokenize import Detokenizer, token_text
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.tree import TreeSpec

TEXT = "the café is 楽しい — naïve 🍜🍣 and ok"
TOKENIZER = Tokenizer.train([TEXT] * 3, 280)


# -- reading -----------------------------------------------------------------


def test_one_source_of_prompts():
  (text,) = requests.read("name[A]", None, None, 7)
  assert (text.text, text.token_ids, text.seed) == ("name[A]", None, 7)
  (ids,) = requests.read(None, "5 17,3", None, 0)
  assert ids.token_ids == (5, 17, 3) and ids.words() == "5 17 3"
  for args in ((None, None, None), ("a", "5", None), (None, "5", "f")):
    with pytest.raises(UserError, match="give one of --prompt"):
      requests.read(*args, 0)
  for bad in ("5 x", "", "1.5"):
    with pytest.raises(UserError, match="--token_ids"):
      requests.read(None, bad, None, 0)
  with pytest.raises(UserError, match="--prompt is empty"):
    requests.read(" ", None, None, 0)


def test_a_file_of_prompts(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text('{"prompt": "é"}\n\n{"token_ids": [4, 5], "seed": 9}\n')
  text, ids = requests.read(None, None, str(path), 3)
  assert (text.text, text.seed) == ("é", 3)
  assert (ids.token_ids, ids.seed) == ((4, 5), 9)
  assert ids.name.endswith("p.jsonl, line 3")


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ('{"prompt": "a"', "line 2: not JSON"),
    ('"a"', "line 2: not a JSON object"),
    ("{}", 'line 2: needs either "prompt" or "token_ids"'),
    ('{"prompt": "a", "token_ids": [1]}', "line 2: needs either"),
    ('{"prompt": 3}', 'line 2: "prompt" must be text'),
    ('{"token_ids": []}', 'line 2: "token_ids" must be a list of whole'),
    ('{"token_ids": [1, true]}', 'line 2: "token_ids" must be a list'),
    ('{"prompt": "a", "seed": -1}', 'line 2: "seed" must be'),
  ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
  path = tmp_path / "p.jsonl"
  path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
  with pytest.raises(UserError, match=says):
    requests.read(None, None, str(path), 0)


def test_text_that_is_no_unicode(tmp_path):
  path = tmp_path / "p.jsonl"
  for line in ('{"prompt": "a\\ud83d"}', "[" * 100_000):
    path.write_text(line)
    with pytest.raises(UserError, match="line 1") as error:
      requests.read(None, None, str(path), 0)
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="--prompt holds half a character"):
    requests.read("\udcff", None, None, 0)


def test_a_question_is_its_first_turn(tmp_path):
  path = tmp_path / "q.jsonl"
  question = {"question_id": 1, "category": "c", "turns": [" Why? ", "How?"]}
  path.write_text(json.dumps(question) + "\n")
  (request,) = requests.read(None, None, str(path), 3)
  assert (request.text, request.seed, request.chat) == ("Why?", 3, False)
  for change, says in (
    ({"turns": ["x", 3]}, "line 1: a turn of"),
    ({"turns": [" "]}, "line 1: a turn of .* is empty"),
    ({"category": None}, 'line 1: "category" must be text'),
    ({"prompt": "x"}, "line 1: needs either"),
  ):
    path.write_text(json.dumps(question | change))
    with pytest.raises(UserError, match=says):
      requests.read(None, None, str(path), 0)


def test_a_chat_wants_text_and_a_template():
  (request,) = requests.read("red", None, None, 0, chat=True)
  tokenizer = types.SimpleNamespace(
    has_chat_template=True,
    encode_chat=lambda messages: [len(messages), len(messages[0]["content"])],
  )
  assert request.encode(tokenizer, SMALL, 1) == [1, 3]
  with pytest.raises(UserError, match="has no chat template"):
    request.encode(TOKENIZER, SMALL, 1)
  with pytest.raises(UserError, match="not token ids"):
    requests.read(None, "5 6", None, 0, chat=True)


def test_a_file_that_is_none(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    requests.read(None, None, str(tmp_path / "nowhere"), 0)
  (tmp_path / "empty").write_text("\n")
  with pytest.raises(UserError, match="holds no prompt"):
    requests.read(None, None, str(tmp_path / "empty"), 0)
  (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
  with pytest.raises(UserError, match="not UTF-8"):
    requests.read(None, None, str(tmp_path / "latin"), 0)


def test_a_prompt_the_model_cannot_take():
  config = dataclasses.replace(SMALL, max_positions=8)
  encode = lambda ids, room: requests.Request("here", None, ids, 0).encode(
    None, config, room
  )
  assert encode((1, 2, 18), 5) == [1, 2, 18]
  for ids in ((19,), (-1,)):
    with pytest.raises(UserError, match=r"here: token -?\d+ is outside.* 18"):
      encode(ids, 5)
  with pytest.raises(UserError, match="here: 3 tokens and 6 new ones do not"):
    encode((1, 2, 3), 6)


# -- text as it comes --------------------------------------------------------


@given(
  ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=20)
  | st.text(max_size=8).map(TOKENIZER.encode)
  | st.just(TOKENIZER.encode(TEXT)),
  data=st.data(),
)
def test_pieces_join_to_the_text_and_hold_no_half(ids, data):
  pieces, detokenizer, rest = [], Detokenizer(TOKENIZER), ids
  while rest:
    count = data.draw(st.integers(1, 4))
    pieces.append(detokenizer.push(rest[:count]))
    rest = rest[count:]
    # What was shown stays: it is a beginning of the text in the end.
    assert TOKENIZER.decode(ids).startswith("".join(pieces))
    assert not pieces[-1].endswith("\ufffd")
  pieces.append(detokenizer.flush())
  assert "".join(pieces) == TOKENIZER.decode(ids)


def test_a_character_waits_for_its_last_byte():
  ids = TOKENIZER.encode("𐍈")  # not in the corpus: one token a byte
  assert len(ids) == 4
  detokenizer = Detokenizer(TOKENIZER)
  assert [detokenizer.push([i]) for i in ids] == ["", "", "", "𐍈"]
  assert detokenizer.flush() == ""
  detokenizer = Detokenizer(TOKENIZER)
  assert detokenizer.push(ids[:2]) == "" and "\ufffd" in detokenizer.flush()


def test_special_tokens_have_names():
  names = [token_text(TOKENIZER, i) for i in range(4)]
  assert names == ["<pad>", "<bos>", "<sep>", "<eos>"]
  assert token_text(TOKENIZER, TOKENIZER.encode("a")[0]) == "a"


# -- answering ---------------------------------------------------------------


def test_answers_come_in_order_and_as_if_each_were_alone():
  model = make_model(dataclasses.replace(SMALL, vocab_size=280))
  found = [
    requests.Request(f"{i}", None, tuple(range(4, 6 + i)), seed=5 + i % 2)
    for i in range(4)
  ]
  drafter = StreamDraft(TreeSpec(num_nodes=2))
  settings = dict(max_new_tokens=6, end_token=3, temperature=1.0)
  got = list(requests.answers(model, TOKENIZER, found, drafter, 2, **settings))
  for request, answer in zip(found, got, strict=True):
    # Call by call; without a tokenizer the ids themselves are shown.
    steps = list(requests.pieces(model, None, request, drafter, **settings))
    ids = [int(word) for word in "".join(text for text, _ in steps).split()]
    assert answer["token_ids"] == ids and len(ids) <= 6
    assert answer["target_calls"] == len(steps)
    assert sum(count for _, count in steps) == len(ids)
    per_call = len(ids) / len(steps)
    assert answer["tokens_per_call"] == pytest.approx(per_call, abs=1e-4)
    assert answer["text"] == TOKENIZER.decode(ids)
    steps = requests.pieces(model, TOKENIZER, request, drafter, **settings)
    assert "".join(text for text, _ in steps) == answer["text"]
    json.dumps(answer)
  assert len({tuple(answer["token_ids"]) for answer in got}) == 4
  (first, *_) = requests.answers(model, None, found, drafter, 2, **settings)
  assert first == {**got[0], "text": None}
  with pytest.raises(UserError, match="batch=0"):
    next(requests.answers(model, None, found, drafter, 0, **settings))


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_stop_ends_the_text_before_it(at):
  """In batches and call by call, though tokens are cut behind it."""
  model = make_model(dataclasses.replace(SMALL, vocab_size=280))
  request = requests.Request("0", None, (4, 5), seed=3)
  drafter = StreamDraft(TreeSpec(num_nodes=2))
  settings = dict(max_new_tokens=24, temperature=1.0)
  answer = lambda **more: next(
    requests.answers(
      model, TOKENIZER, [request], drafter, 1, **settings, **more
    )
  )
  whole = answer()
  words = [c for c in whole["text"] if c != "\ufffd"]
  stop = [words[at] + words[at + 1], words[at + 1] + "never", words[at]]
  stop = [x for x in stop if x in whole["text"]]
  short = answer(stop=stop)
  end = min(whole["text"].index(x) for x in stop)
  assert short["text"] == whole["text"][:end]
  count = len(short["token_ids"])
  assert count < 24 and short["token_ids"] == whole["token_ids"][:count]
  steps = requests.pieces(
    model, TOKENIZER, request, drafter, stop=stop, **settings
  )
  assert "".join(text for text, _ in steps) == short["text"]


def test_a_stop_that_begins_with_a_space_the_text_lacks():
  """Llama's tokenizers take a space from the start of a text."""

  class Words:
    pad_id, bos_id, sep_id, eos_ids, vocab_size = 0, 1, None, (), 9
    pieces = {4: b" Yes", 5: b" no", 6: b"!"}

    def token_bytes(self, token):
      return self.pieces.get(token, b"")

    def decode(self, ids):
      text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
      return text.removeprefix(" ")

  for ids, stop, text in [
    ([4, 6], " Yes", ""),
    ([5, 4, 6], " Yes", "no"),
    ([4, 6], "s!", "Ye"),
    ([4, 6], "?", "Yes!"),
  ]:
    assert requests._text(Words(), ids, [stop]) == text


def test_a_stop_that_is_no_text():
  model = make_model(dataclasses.replace(SMALL, vocab_size=280))
  request = requests.Request("0", None, (4, 5), seed=3)
  with pytest.raises(UserError, match="--stop"):
    next(
      requests.answers(
        model, TOKENIZER, [request], StreamDraft(), 1, 4, stop=["\udcff"]
      )
    )
