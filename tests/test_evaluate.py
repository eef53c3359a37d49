"""ROUGE of known texts, prompts of a task, and what a trace says."""

import dataclasses
import io
import types

import jax
import pytest
from tiny import DATA, SMALL, make_model, use_small_data

from spec_stream import evaluate, task, trace, trace_view
from spec_stream.bench import Settings
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.decode import generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.progress import Progress
from spec_stream.tree import TreeSpec

MODEL = dataclasses.replace(SMALL, vocab_size=280)
TOKENIZER = Tokenizer.train(["It is red. It is small and green."], 280)


# -- scores ------------------------------------------------------------------


def test_rouge_of_texts_counted_by_hand():
  outputs = ["the cat sat", "a b. c d"]
  # Unigrams: 3 of 3 in the second reference; the better one counts.
  # Then: 4 of 4 tokens, but sentences in the other order: Lsum joins the
  # longest common subsequence of each sentence, so order does not matter.
  references = [["a dog", "the cats sat"], ["c d. a b"]]
  scores = evaluate.rouge(outputs, references)
  assert scores == {
    "rouge1": pytest.approx(100),  # "cats" is stemmed
    "rougeLsum": pytest.approx(100),
  }
  half = evaluate.rouge(["a b"], [["a c d e f g"]])
  assert half["rouge1"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 6) / (2 / 3))
  # In one line the order does matter: the subsequence has two tokens of four.
  flat = evaluate.rouge(["a b c d"], [["c d a b"]])
  assert flat == {"rouge1": pytest.approx(100), "rougeLsum": pytest.approx(50)}


def test_sentences_are_lines():
  assert evaluate.sentences(" A b. C d.  ") == "A b.\nC d."


# -- decoding many -----------------------------------------------------------


@pytest.mark.parametrize(
  "rounds, expected",
  [
    (1, [(2, 5), (4, 5), (5, 5)]),
    pytest.param(4, [(5, 5)], marks=pytest.mark.slow),
  ],
)
def test_many_prompts_keep_their_order(monkeypatch, rounds, expected):
  monkeypatch.setattr(evaluate, "ROUND", rounds)  # prompts a row
  model = make_model(MODEL)
  prompts = [[5] * n for n in (9, 2, 7, 3, 5)]
  seen = []
  got = evaluate.decode_all(
    model,
    prompts,
    NoDraft(),
    batch=2,
    max_new_tokens=6,
    end_token=3,
    on_batch=lambda done, total: seen.append((done, total)),
  )
  assert seen == expected
  alone = [
    generate(model, [p, p], NoDraft(), max_new_tokens=6, end_token=3)[0]
    for p in prompts
  ]
  assert got == alone
  with pytest.raises(UserError, match="batch=0"):
    evaluate.decode_all(model, prompts, NoDraft(), batch=0)
  # Looked at before anything is decoded, and named by its place in the list.
  seen.clear()
  prompts[1] = [5] * model.config.max_positions
  with pytest.raises(UserError, match="prompt 1 of .* do not fit"):
    evaluate.decode_all(
      model, prompts, NoDraft(), on_batch=lambda *at: seen.append(at)
    )
  assert not seen


# -- prompts -----------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
  use_small_data(monkeypatch)
  config = {"data": DATA | {"dataset": "restaurants"}}
  return types.SimpleNamespace(tokenizer=TOKENIZER, config=config, step=7)


def test_no_prompt_comes_twice_and_the_choice_is_always_the_same(run):
  every = task.prompts(run, "test")
  texts = [p.text for p in every]
  assert len(set(texts)) == len(texts) > 20
  assert all(p.token_ids == TOKENIZER.encode_prompt(p.text) for p in every)
  assert all(f"It is {p.text}." in p.references for p in every)
  some, more = task.prompts(run, "test", 5), task.prompts(run, "test", 9)
  assert some == task.prompts(run, "test", 5) and len(some) == 5
  assert set(p.text for p in some) < set(p.text for p in more)
  assert [p.text for p in some] != texts[:5]  # not the first ones
  assert task.prompts(run, "test", 10**6) == every
  with pytest.raises(UserError, match="unknown split 'tset'"):
    task.prompts(run, "tset")
  with pytest.raises(UserError, match="prompts=-1"):
    task.prompts(run, "test", -1)
  run.config = {"model": {}}
  with pytest.raises(UserError, match="names no data set"):
    task.prompts(run, "test")


def test_what_a_result_says_about_itself(run):
  about = task.about(run)
  assert about["dataset"] == "restaurants" and about["step"] == 7
  assert about["device"].startswith("cpu: ") and "core" in about["device"]
  assert about["jax"] == jax.__version__ and about["date"].endswith("UTC")
  assert about["run_id"] != task.about(run)["run_id"]


# -- a trace -----------------------------------------------------------------


@pytest.mark.parametrize("limit", [7, pytest.param(9, marks=pytest.mark.slow)])
def test_a_trace_retells_the_decoding(limit):
  model = make_model(MODEL)
  prompt = task.Prompt("red", [1, 9, 2], ["It is red."])
  settings = Settings(max_new_tokens=limit, temperature=0.5, seed=4)
  drafter = StreamDraft(TreeSpec(num_nodes=4))
  found = trace.record(model, TOKENIZER, prompt, drafter, settings)
  trace_view.check(found, "trace.json")
  trace_view.render(found)
  (made,) = generate(
    model, [prompt.token_ids], drafter, **settings.options(settings.seed)
  )
  assert found["text"] == TOKENIZER.decode(made.token_ids)
  assert (found["method"], found["tree"]) == ("streams", "best_first")
  text = lambda token: trace.token_text(TOKENIZER, token)
  emitted = [t for step in found["steps"] for t in step["emitted"]]
  assert emitted == [text(t) for t in made.token_ids[1:]]
  assert len(found["steps"]) == made.target_calls - 1
  root = text(made.token_ids[0])
  for step in found["steps"]:
    assert step["root"] == root and len(step["nodes"]) == 4
    accepted = [n for n in step["nodes"] if n["accepted"]]
    assert [n["depth"] for n in accepted] == [*range(len(accepted))]
    drafted = [n["text"] for n in accepted[1:]]
    assert drafted == step["emitted"][: len(drafted)]
    assert len(step["emitted"]) - len(drafted) in (0, 1)  # the bonus
    root = step["emitted"][-1]


# -- progress ----------------------------------------------------------------


def test_progress_says_how_far_and_how_long(monkeypatch):
  clock = iter([0.0, 10.0, 20.0, 20.1, 30.0, 100.0])
  monkeypatch.setattr("time.monotonic", lambda: next(clock))
  file = io.StringIO()
  progress = Progress("measure", every=5, file=file)
  for done in (1, 2, 3, 4):
    progress(done, 12)
  progress(12, 12)
  # The clock starts at the first piece: it may have paid for a start-up.
  assert file.getvalue() == (
    "measure 2/12  1:40 left\nmeasure 4/12  0:53 left\n"
  )
