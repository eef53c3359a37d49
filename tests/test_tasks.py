"""Each data set from its files to pairs, and the scores that it has."""

import dataclasses
import gzip
import json
import os
import pathlib
import types

import pytest
from tiny import SMALL, make_model

from spec_stream import checkpoints, evaluate, task
from spec_stream.data import (
  builder,
  chat_prompts,
  formats,
  pipeline,
  rows,
  source,
)
from spec_stream.data.dialogsum import FILES
from spec_stream.data.pipeline import DataConfig
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError

real = pytest.mark.skipif(
  "SPEC_STREAM_DATA" not in os.environ, reason="no SPEC_STREAM_DATA"
)


def write(path: pathlib.Path, values) -> pathlib.Path:
  """JSON lines, or an array for .json; .gz as the name says."""
  path.parent.mkdir(exist_ok=True)
  lines = [json.dumps(value) for value in values]
  text = "\n".join(lines) + "\n"
  if ".jsonl" not in path.name:
    text = "[" + ",\n".join(lines) + "]"
  opened = gzip.open if path.suffix == ".gz" else open
  with opened(path, "wt", encoding="utf-8") as file:
    file.write(text)
  return path


def config(name: str, tmp_path: pathlib.Path) -> DataConfig:
  return DataConfig(
    dataset=name,
    data_dir=str(tmp_path / "data"),
    manual_dir=str(tmp_path / "in"),
  )


# -- rows --------------------------------------------------------------------

GOOD = [{"a": "x\u2028\u00e9", "b": "1"}, {"a": "", "b": "2", "c": [1]}]


@pytest.mark.parametrize(
  "name", ["f.jsonl", "f.jsonl.gz", "f.json", "f.json.gz"]
)
def test_rows_of_each_form(tmp_path, name):
  path = str(write(tmp_path / name, GOOD))
  got = list(rows.read(path, ("a", "b")))
  assert [row for _, row in got] == GOOD
  unit = "line" if ".jsonl" in name else "item"
  assert [where for where, _ in got] == [f"{path}, {unit} {i}" for i in (1, 2)]


def test_rows_of_a_table_and_blank_lines(tmp_path):
  path = tmp_path / "f.csv"
  path.write_text('b,a\n1,"x\n""y"""\n\n2,z\n\n')
  got = list(rows.read(str(path), ("a", "b")))
  assert got == [
    (f"{path}, line 3", {"b": "1", "a": 'x\n"y"'}),
    (f"{path}, line 5", {"b": "2", "a": "z"}),
  ]
  path = tmp_path / "f.jsonl"
  path.write_text('{"a": "x"}\n\n{"a": "y"}\n\n')
  got = list(rows.read(str(path), ("a",)))
  assert got[1] == (f"{path}, line 3", {"a": "y"})


def test_a_download_is_called_by_its_name(tmp_path):
  path = tmp_path / "hashed"
  path.write_text('{"a": "x"}\n{')
  with pytest.raises(UserError, match=r"^f\.jsonl, line 2: not JSON"):
    list(rows.read(str(path), ("a",), "f.jsonl"))
  with pytest.raises(UserError, match="must end in .jsonl, .json or .csv"):
    list(rows.read(str(path), ("a",)))


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("f.jsonl", '{"a": "x"}\n' * 16 + '{"a": "x"\n', "line 17: not JSON"),
    ("f.jsonl", '{"a": "x"}\n{"b": "x"}\n', 'line 2: "a" is missing'),
    ("f.jsonl", '{"a": 3}\n', 'line 1: "a" must be text, not 3'),
    ("f.jsonl", '["a"]\n', "line 1: must be a JSON object"),
    ("f.jsonl", '{"a": "\\ud83d"}\n', 'line 1: "a" holds half a character'),
    ("f.jsonl", "[" * 100_000, "line 1: not JSON"),
    ("f.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: not JSON"),
    ("f.jsonl", "\n\n", "holds no example"),
    ("f.json", "[]", "holds no example"),
    ("f.json", '[{"a": "x"},\n{"a": }]', "line 2: not JSON"),
    ("f.json", '[{"a": "x"},\n{"b": 1}]', 'item 2: "a" is missing'),
    ("f.json", '{"a": "x"}', "must be a JSON array"),
    ("f.csv", "a,b\n1\n", "line 2: 1 columns, not 2"),
    ("f.csv", "b\n1\n", "line 1: the header must have a"),
    ("f.jsonl.gz", "no gzip", "cannot be read"),
  ],
)
def test_bad_rows_name_the_line(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    list(rows.read(str(tmp_path / name), ("a",)))
  said = str(error.value)
  assert said.startswith(str(tmp_path / name)) and "\n" not in said


def test_bytes_that_are_no_text(tmp_path):
  (tmp_path / "f.jsonl").write_bytes(b'{"a": "\xff"}\n')
  whole = gzip.compress(b'{"a": "x"}\n' * 500)
  (tmp_path / "g.jsonl.gz").write_bytes(whole[:-12])
  broken = whole[:20] + b"\x00\xff\x00\xff" + whole[24:]
  (tmp_path / "h.jsonl.gz").write_bytes(broken)
  for name in ("f.jsonl", "g.jsonl.gz", "h.jsonl.gz"):
    with pytest.raises(UserError, match=f"{name} cannot be read"):
      list(rows.read(str(tmp_path / name), ("a",)))


# -- formats -----------------------------------------------------------------


def test_prompts_end_in_a_word_and_completions_begin_with_the_blank():
  assert formats.dialogsum(" #A: Hi.\n#B: Ho. ", "They greet. ") == (
    "#A: Hi.\n#B: Ho.\n\nSummary:",
    " They greet.",
  )
  assert formats.sql("CREATE TABLE t (a INT)", "How many?\n", "SELECT 1") == (
    "CREATE TABLE t (a INT)\n\nQuestion: How many?\n\nSQL:",
    " SELECT 1",
  )
  turns = [
    ("assistant", "Before any question."),
    ("system", "Be brief."),
    ("user", "Hi. "),
    ("assistant", "Hello!"),
    ("user", "And?"),
    ("assistant", "  "),
    ("assistant", "More."),
  ]
  head = "ASSISTANT: Before any question.\nBe brief.\nUSER: Hi.\nASSISTANT:"
  assert list(formats.conversation_pairs(turns)) == [
    (head, " Hello!"),
    (f"{head} Hello!\nUSER: And?\nASSISTANT: \nASSISTANT:", " More."),
  ]
  assert list(formats.conversation_pairs(turns[:4], len)) == [(3, " Hello!")]


def test_chunks_are_the_text_and_end_where_something_ends():
  paragraphs = ["word " * n + f"end{n}." for n in (3, 9, 30, 2, 8)]
  text = "\n\n".join(paragraphs)
  pieces = list(formats.chunks(text, 80))
  assert all(0 < len(piece) <= 80 for piece in pieces)
  assert "".join(pieces).split() != text.split()  # the blank at a cut is gone
  assert " ".join(pieces).split() == text.split()  # but no word is cut
  assert pieces[0] == "\n\n".join(paragraphs[:2])  # as many as fit
  assert list(formats.chunks("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]
  assert list(formats.chunks("aaa bbb\nccc ddd", 12)) == ["aaa bbb", "ccc ddd"]
  assert list(formats.chunks("aaaa bbbb", 4)) == ["aaaa", "bbbb"]
  assert list(formats.chunks(" \n ", 4)) == []


# -- data sets ---------------------------------------------------------------


@pytest.mark.parametrize("form", [0, 1, 2])
def test_dialogsum_has_a_pair_for_each_reference(tmp_path, form):
  for split, names in FILES.items():
    row = {"fname": "f", "dialogue": f"#A#: {split}.", "summary": "One."}
    if split == "test":
      del row["summary"]
      row |= {f"summary{i}": f"Sum {i}." for i in (1, 2, 3)}
    write(tmp_path / "in" / names[form], [row])
  chosen = config("dialogsum", tmp_path)
  assert pipeline.prompts(chosen, "train") == [
    ("#A#: train.\n\nSummary:", [" One."])
  ]
  ((prompt, references),) = pipeline.prompts(chosen, "test")
  assert prompt == "#A#: test.\n\nSummary:"
  assert sorted(references) == [" Sum 1.", " Sum 2.", " Sum 3."]


def test_dialogsum_with_a_reference_missing(tmp_path):
  for names in FILES.values():
    row = {"dialogue": "#A#", "summary1": "One.", "summary3": "Three."}
    write(tmp_path / "in" / names[0], [row])
  with pytest.raises(UserError, match='jsonl, line 1: "summary2" is missing'):
    pipeline.examples(config("dialogsum", tmp_path), "train")


def make_sql(count: int) -> list[dict]:
  make = lambda i: {"context": "CREATE TABLE t", "question": f"Q {i}?"}
  return [make(i % 500) | {"answer": f"SELECT {i}"} for i in range(count)]


def test_sql_in_one_file_is_split_by_question_and_context(tmp_path):
  write(tmp_path / "in" / "sql_create_context_v4.json", make_sql(900))
  chosen = config("sql_create_context", tmp_path)
  splits = {s: pipeline.examples(chosen, s) for s in builder.SPLITS}
  assert sum(map(len, splits.values())) == 900
  prompts = {s: {prompt for prompt, _ in x} for s, x in splits.items()}
  assert sum(map(len, prompts.values())) == 500  # so none is in two splits
  assert 470 < len(prompts["train"]) < 490
  assert ("CREATE TABLE t\n\nQuestion: Q 7?\n\nSQL:", " SELECT 7") in {
    pair for x in splits.values() for pair in x
  }
  groups = [f"g{i}" for i in range(20_000)]
  counted = [builder.split_of(group) for group in groups]
  assert 340 < counted.count("validation") < 460
  assert 340 < counted.count("test") < 460


def test_sql_in_three_files_keeps_their_splits(tmp_path):
  for i, split in enumerate(builder.SPLITS):
    write(tmp_path / "in" / f"{split}.jsonl", make_sql(3 + i))
  chosen = config("sql_create_context", tmp_path)
  assert [len(pipeline.examples(chosen, s)) for s in builder.SPLITS] == [
    3,
    4,
    5,
  ]
  os.remove(tmp_path / "in" / "test.jsonl")
  with pytest.raises(
    UserError, match="test.jsonl, and not one file sql_create"
  ):
    source.builder("sql_create_context", str(tmp_path), str(tmp_path / "in"))


def test_sql_too_small_to_split_says_so(tmp_path):
  write(tmp_path / "in" / "sql_create_context_v4.json", make_sql(3))
  with pytest.raises(UserError, match="give a file for each split"):
    pipeline.examples(config("sql_create_context", tmp_path), "train")


def test_downloads_keep_the_names_of_their_files(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  asked = {}

  def download(self, urls):
    asked.update(urls)
    hashed = {}
    for key, url in urls.items():
      path = write(tmp_path / url.rsplit("/", 1)[1], make_sql(900))
      hashed[key] = path.rename(tmp_path / "hashed")
    return hashed

  monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
  got = source.examples("sql_create_context", str(tmp_path / "d"), "", "test")
  assert 0 < len(got) < 60
  (url,) = asked.values()
  assert url.endswith("/sql_create_context_v4.json")


def talk(ident: str, *turns: tuple[str, str]) -> dict:
  said = [{"from": who, "value": text} for who, text in turns]
  return {"id": ident, "conversations": said}


def test_conversations_have_a_pair_for_each_answer(tmp_path):
  talks = [
    talk(
      "a_0", ("human", "Hi."), ("gpt", "Ho."), ("human", "So?"), ("gpt", "S")
    ),
    talk("b_0"),
  ]
  for name in ("train.json", "validation.jsonl", "test.jsonl.gz"):
    write(tmp_path / "in" / name, talks)
  for split in builder.SPLITS:
    got = pipeline.examples(config("conversations", tmp_path), split)
    assert sorted(got) == [
      ("USER: Hi.\nASSISTANT:", " Ho."),
      ("USER: Hi.\nASSISTANT: Ho.\nUSER: So?\nASSISTANT:", " S"),
    ]


def test_parts_of_a_conversation_stay_in_one_split(tmp_path):
  talks = [
    talk(f"QWJh{i:03}_{part}", ("human", f"{i}?"), ("gpt", f"{i}."))
    for i in range(300)
    for part in range(2)
  ]
  write(tmp_path / "in" / "sharegpt.json", talks)
  chosen = config("conversations", tmp_path)
  splits = [pipeline.prompts(chosen, split) for split in builder.SPLITS]
  assert sum(map(len, splits)) == 300 and len(splits[0]) < 300
  assert all(len(x) == 2 for split in splits for _, x in split)


def test_other_ids_may_count_as_they_like(tmp_path):
  """Not all of identity_0, identity_1, ... in one split."""
  talks = [
    talk(f"identity_{i}", ("human", f"{i}?"), ("gpt", "Yes."))
    for i in range(300)
  ]
  write(tmp_path / "in" / "mine.json", talks)
  chosen = config("conversations", tmp_path)
  splits = [pipeline.prompts(chosen, split) for split in builder.SPLITS]
  assert all(map(len, splits)) and sum(map(len, splits)) == 300


def test_a_tokenizer_without_an_end_cannot_train(tmp_path):
  for name in ("train.json", "validation.json", "test.json"):
    talks = [talk("a", ("human", "Hi."), ("gpt", "Ho."))]
    write(tmp_path / "in" / name, talks)
  endless = types.SimpleNamespace(eos_id=None)
  with pytest.raises(UserError, match="names no token that ends an answer"):
    pipeline.train_iterator(config("conversations", tmp_path), endless)


@pytest.mark.parametrize(
  "row, message",
  [
    ({"id": "a"}, '"conversations" must be a list'),
    (talk("a", ("dog", "x")), 'turn 1: "from" must be one of .* not "dog"'),
    ({"id": 3, "conversations": []}, '"id" must be text'),
    ({"id": "a", "conversations": ["x"]}, "turn 1: must be a JSON object"),
    ({"id": "a", "conversations": [{"from": "gpt"}]}, '"value" is missing'),
  ],
)
def test_bad_conversations(tmp_path, row, message):
  write(tmp_path / "in" / "train.json", [talk("a"), row])
  with pytest.raises(UserError, match=f"train.json, item 2.*{message}"):
    pipeline.examples(config("conversations", tmp_path), "train")


def test_a_text_corpus_trains_without_prompts(tmp_path):
  book = "\n\n".join(f"It was day {i} of the journey." for i in range(200))
  for split in builder.SPLITS:
    write(tmp_path / "in" / f"{split}.jsonl", [{"id": "b", "text": book}] * 2)
  chosen = config("text_corpus", tmp_path)
  pairs = pipeline.examples(chosen, "train")
  assert {prompt for prompt, _ in pairs} == {""}
  assert 900 < max(len(text) for _, text in pairs) <= 1000
  assert sum(text.count("It was day 7 ") for _, text in pairs) == 2
  tokenizer = Tokenizer.train((text for _, text in pairs), 300)
  encoded = pipeline.encode(tokenizer, *pairs[0])
  assert encoded["tokens"][:2].tolist() == [tokenizer.bos_id, tokenizer.sep_id]
  assert encoded["loss_mask"].tolist()[:3] == [False, False, True]
  run = types.SimpleNamespace(
    tokenizer=tokenizer, config={"data": vars(chosen)}, step=1
  )
  with pytest.raises(UserError, match="it is for pretraining"):
    task.prompts(run, "test")
  with pytest.raises(UserError, match="config.data.manual_dir=DIR"):
    source.builder("text_corpus", str(tmp_path))


QUESTIONS = [
  {"question_id": 81, "category": "writing", "turns": ["Compose. ", "Again."]},
  {"question_id": "82", "category": "math", "turns": ["Add."]},
]


@pytest.mark.parametrize("name", ["question.jsonl", "test.jsonl.gz"])
def test_questions_are_read_as_they_stand(tmp_path, name):
  path = write(tmp_path / "in" / name, QUESTIONS)
  found = list(chat_prompts.read(str(path)))
  assert [q.turns for q in found] == [("Compose. ", "Again."), ("Add.",)]
  assert [q.category for q in found] == ["writing", "math"]
  assert [q.question_id for q in found] == ["81", "82"]


def test_another_process_may_prepare_the_data_first(tmp_path, monkeypatch):
  for split in builder.SPLITS:
    write(tmp_path / "in" / f"{split}.jsonl", [{"text": "one"}])
  prepare = builder.PairsBuilder.download_and_prepare

  def late(self):
    prepare(self)  # as the other one does
    raise FileExistsError(17, "Cannot rename")

  monkeypatch.setattr(builder.PairsBuilder, "download_and_prepare", late)
  pairs = pipeline.examples(config("text_corpus", tmp_path), "test")
  assert pairs == (("", "one"),)

  def full(self):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(builder.PairsBuilder, "download_and_prepare", full)
  with pytest.raises(OSError, match="No space"):
    source.builder("text_corpus", str(tmp_path / "b"), str(tmp_path / "in"))


def test_an_unknown_split_is_named(tmp_path):
  for split in builder.SPLITS:
    write(tmp_path / "in" / f"{split}.jsonl", [{"text": "one"}])
  with pytest.raises(UserError, match="no split 'dev', only .*validation"):
    pipeline.examples(config("text_corpus", tmp_path), "dev")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"turns": []}, '"turns" must be a list'),
    ({"turns": "x"}, '"turns" must be a list'),
    ({"turns": [3]}, "must be text, not 3"),
    ({"category": None}, '"category" must be text'),
    ({"question_id": None}, '"question_id" is missing'),
  ],
)
def test_bad_questions(tmp_path, change, message):
  path = write(
    tmp_path / "question.jsonl", [QUESTIONS[0], QUESTIONS[0] | change]
  )
  with pytest.raises(UserError, match=f"line 2: .*{message}"):
    list(chat_prompts.read(str(path)))


@pytest.fixture
def asked(tmp_path):
  """A run whose tokenizer has a template, and a file of questions."""
  model = dataclasses.replace(SMALL, vocab_size=280, max_positions=256)
  tokenizer = Tokenizer.train(["Compose. Add. Again."], 280)
  run = checkpoints.Run(make_model(model), tokenizer, {"data": {}}, 1)
  repeated = QUESTIONS[1] | {"question_id": 83}
  path = write(tmp_path / "mine.jsonl.gz", [*QUESTIONS, repeated])
  return run, str(path)


def test_questions_are_prompts_of_first_turns(asked):
  run, path = asked
  name, found = task.questions(run, path)
  assert name == "mine" and [p.category for p in found] == ["writing", "math"]
  assert [p.text for p in found] == ["Compose.", "Add."]
  assert found[1].token_ids == run.tokenizer.encode_prompt("Add.")
  assert len(task.questions(run, path, 1)[1]) == 1
  run = dataclasses.replace(run, config={"data": {"dataset": "conversations"}})
  _, found = task.questions(run, path)
  assert found[1].text == "USER: Add.\nASSISTANT:"
  with pytest.raises(UserError, match="no chat template"):
    task.questions(run, path, chat=True)
  with pytest.raises(UserError, match="--questions=no: no such file"):
    task.questions(run, "no")


def test_a_second_turn_follows_the_models_own_answer(asked):
  run, path = asked
  _, firsts = task.questions(run, path)
  (second,) = task.second_turns(run, firsts, 5)
  (made,) = generate(
    run.model,
    [firsts[0].token_ids],
    NoDraft(),
    max_new_tokens=5,
    end_token=run.tokenizer.eos_id,
  )
  said = run.tokenizer.decode(made.token_ids).strip()
  assert said and second.category == "writing"
  assert second.text == (
    f"USER: Compose.\nASSISTANT: {said}\nUSER: Again.\nASSISTANT:"
  )


def test_eighty_questions_of_these_ids_are_mt_bench():
  made = lambda ids: [chat_prompts.Question(str(i), "c", ("x",)) for i in ids]
  assert chat_prompts.name("a/q.jsonl.gz", made(range(81, 161))) == "mt_bench"
  assert chat_prompts.name("a/q.jsonl.gz", made(range(81, 160))) == "q"


# -- scores ------------------------------------------------------------------


def test_each_data_set_has_scores_or_says_why_not():
  assert evaluate.SCORERS.keys() == source.BUILDERS.keys()
  for name in ("e2e_nlg", "restaurants", "dialogsum", "conversations"):
    got = evaluate.score(name, ["a b"], [["a b"]])
    assert got == evaluate.rouge(["a b"], [["a b"]])
    assert evaluate.words(got).startswith("ROUGE-1 100.00  ROUGE-Lsum 100.00")
    assert "exact" not in evaluate.words(got)
  for name in ("text_corpus", "nonsense"):
    with pytest.raises(UserError, match=f"no quality of '{name}'.*dialogsum"):
      evaluate.score(name, ["a b"], [["a b"]])
  with pytest.raises(UserError, match="no outputs"):
    evaluate.score("e2e_nlg", [], [])


def test_sql_has_exact_match_beside_rouge():
  outputs = [" select A from t", " SELECT b"]
  got = evaluate.score(
    "sql_create_context", outputs, [[" SELECT a FROM t"], [" SELECT c"]]
  )
  assert (got["exact_match"], got["unparsed"]) == (50, 0)
  assert 50 < got["rouge1"] < 100 and "sqlite" in got["normalisation"]
  assert evaluate.words(got).startswith("exact match 50.00 percent")
  json.dumps(got)


# -- the real files ----------------------------------------------------------


@real
@pytest.mark.parametrize(
  "name, folder, sizes",
  [
    ("dialogsum", "dialogsum", (12_460, 500, 1_500)),
    pytest.param(
      "sql_create_context",
      "sql_create_context_rederived",
      (63_335, 8_902, 15_878),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_real_releases(tmp_path, name, folder, sizes):
  chosen = DataConfig(
    dataset=name,
    data_dir=str(tmp_path),
    manual_dir=os.path.join(os.environ["SPEC_STREAM_DATA"], folder),
  )
  splits = [pipeline.examples(chosen, s) for s in builder.SPLITS]
  assert tuple(map(len, splits)) == sizes
  if name == "dialogsum":
    grouped = pipeline.prompts(chosen, "test")
    assert len(grouped) == 500 and {len(x) for _, x in grouped} == {3}
  assert all(text[0] == " " and text[1:].strip() for _, text in splits[2])


@real
def test_the_real_novels_and_questions():
  folder = os.environ["SPEC_STREAM_DATA"]
  path = os.path.join(folder, "english_novels", "test.jsonl.gz")
  for _, row in rows.read(path, ("text",)):
    pieces = list(formats.chunks(row["text"], 1000))
    assert "".join("".join(pieces).split()) == "".join(row["text"].split())
    assert " ".join(pieces).split() == row["text"].split()  # no word is cut
    assert 700 < sum(map(len, pieces)) / len(pieces) <= 1000
  path = os.path.join(folder, "mt_bench", "test.jsonl.gz")
  found = list(chat_prompts.read(path))
  assert len({q.turns[0] for q in found}) == 80
  assert len({q.category for q in found}) == 8
  assert chat_prompts.name(path, found) == "mt_bench"
