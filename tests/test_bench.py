"""The benchmark counts right, times fairly, and can fail."""

import copy
import dataclasses
import json

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tiny import MODEL, SMALL, make_model

from spec_stream import bench, bench_rows, results, text_table
from spec_stream.bench import NO_STREAMS, NOISE, Measured, Method, Settings
from spec_stream.decode import Generation, generate
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.prune import Prune
from spec_stream.models.transformer import Transformer
from spec_stream.tree import TreeSpec
from spec_stream.weights import to_model, to_weights

LOSSLESS = dataclasses.replace(
  MODEL,
  streams=dataclasses.replace(MODEL.streams, mode="lossless", lora_rank=2),
)
RNG = np.random.default_rng(0)
# Two buckets, and a last batch of one.
PROMPTS = [RNG.integers(4, 19, n).tolist() for n in (5, 3, 20)]
SETTINGS = Settings(
  batch=2, max_new_tokens=13, end_token=3, temperature=1.2, seed=2**32 - 2
)
ABOUT = {"run_id": "x", "dataset": "none", "device": "cpu", "jax": "0"}


def stub(tokens, sizes, accepts=(0,)):
  """A Generation whose calls emitted `sizes` tokens, prefill first."""
  calls = [c for c, n in enumerate(sizes) for _ in range(n)]
  return Generation(list(tokens), calls, len(sizes), list(accepts))


@pytest.fixture(scope="module")
def measured():
  methods = bench.plan(SMALL, [StreamDraft(TreeSpec(num_nodes=3)), NoDraft()])
  return bench.measure(make_model(SMALL), PROMPTS, methods, SETTINGS)


def rows(measured):
  return bench_rows.rows(make_model(SMALL), PROMPTS, measured, SETTINGS, ABOUT)


def decode(model, drafter):
  """What is measured, without the benchmark; in shapes compiled already."""
  seeds = [2**32 - 2, 2**32 - 1, 0]  # SETTINGS.seed + i, wrapped
  return [
    generation
    for at in (slice(0, 2), slice(2, 3))
    for generation in generate(
      model, PROMPTS[at], drafter, **SETTINGS.options(seeds[at])
    )
  ]


# -- what is measured --------------------------------------------------------


def test_plan_names_both_baselines_only_where_they_differ():
  names = lambda config, *d: [m.name for m in bench.plan(config, d)]
  assert names(LOSSLESS, NoDraft()) == ["none", NOISE]
  assert names(MODEL, StreamDraft()) == ["none", NO_STREAMS, NOISE, "streams"]
  by_name = {m.name: m for m in bench.plan(MODEL, [StreamDraft()])}
  # The twin of the A-against-A row is the faster baseline.
  assert by_name[NOISE].drafter == NoDraft(attach_streams=False)
  assert by_name[NOISE].times_against == NO_STREAMS
  assert by_name[NO_STREAMS].expects is None
  assert by_name["streams"].expects == "none"


@pytest.mark.slow
def test_a_measurement_of_shared_mode(measured):
  table = rows(measured)
  json.dumps(table, allow_nan=False)
  results.check(table, "results.jsonl")
  assert [r["method"] for r in table] == ["none", NO_STREAMS, NOISE, "streams"]
  none, plain, noise, streams = table
  for r in table:
    assert r["recompiles"] == 0 and r["mismatch"] is None
    assert r["prompts"] == 3 and r["baseline"] in ("none", NO_STREAMS)
    assert r["ms_per_token"] > 0 and r["ms_to_first_token"] > 0
  assert [r["identical"] for r in table] == [1.0, None, 1.0, 1.0]
  # Tokens and calls are those of plain decoding, of each prompt its own seed.
  alone = [g.token_ids for g in decode(make_model(SMALL), NoDraft())]
  assert [g.token_ids for g in measured[3].generations] == alone
  assert none["tokens"] == streams["tokens"] == sum(map(len, alone))
  assert none["target_calls"] == none["tokens"]
  assert streams["target_calls"] < none["target_calls"]
  assert streams["tokens_per_call"] == (
    streams["tokens"] / streams["target_calls"]
  )
  assert (none["tree"], none["tree_nodes"]) == (None, 1)
  assert (streams["tree"], streams["tree_nodes"]) == ("best_first", 3)
  assert (none["num_streams"], plain["num_streams"]) == (1, 0)
  assert noise["noise_low"] == noise["speedup_low"]
  assert bench_rows.bugs(table) == []
  assert noise["baseline"] == NO_STREAMS


def test_a_shape_that_was_not_warmed_up_is_counted(monkeypatch):
  monkeypatch.setattr(bench, "_one_of_each_shape", lambda p, b: b[:1])
  # Room for new tokens that no other test asks for: nothing is compiled yet.
  settings = Settings(max_new_tokens=100, end_token=3)
  methods = [Method("none", NoDraft())]
  (result,) = bench.measure(make_model(SMALL), PROMPTS[1:], methods, settings)
  assert result.recompiles == 2  # prefill and loop, at the longer prompt
  assert result.compile_seconds > 0


def test_the_counter_counts_and_only_what_compiles():
  counter = bench.Compilations()
  double = jax.jit(lambda x: x * 2)
  assert counter.count == 0
  double(np.zeros(7)).block_until_ready()
  assert counter.count == 1
  double(np.zeros(7)).block_until_ready()
  assert counter.count == 1
  double(np.zeros(8)).block_until_ready()
  assert counter.count == 2
  assert bench.Compilations().count == 0  # counts from now on


def test_a_silent_listener_is_noticed(monkeypatch):
  bench.Compilations()
  monkeypatch.setattr(bench, "_EVENT", "/jax/renamed")
  with pytest.raises(RuntimeError, match="does not report"):
    bench.Compilations()


def test_what_cannot_be_measured_is_refused():
  model, methods = make_model(SMALL), [Method("none", NoDraft())]
  with pytest.raises(UserError, match="prompt 2 is the same as prompt 0"):
    bench.measure(model, [[5, 6], [7], [5, 6]], methods, SETTINGS)
  with pytest.raises(UserError, match="no prompt"):
    bench.measure(model, [], methods, SETTINGS)
  with pytest.raises(UserError, match="repeats=0"):
    Settings(repeats=0)


# -- agreement ---------------------------------------------------------------


@pytest.mark.slow
def test_other_tokens_are_reported_as_a_bug(measured):
  changed = [copy.copy(r) for r in measured]
  wrong = changed[3].generations[1]
  tokens = [*wrong.token_ids]
  tokens[2] = next(t for t in range(4, 19) if t != tokens[2])
  changed[3].generations = [*changed[3].generations]
  changed[3].generations[1] = dataclasses.replace(wrong, token_ids=tokens)
  table = rows(changed)
  assert table[3]["identical"] == pytest.approx(2 / 3)
  assert table[3]["max_tie_margin"] > 1e-4
  assert "prompt 1, new token 2: margin" in table[3]["mismatch"]
  (line,) = bench_rows.bugs(table)
  assert line.startswith("streams (3 nodes) departs from plain decoding")
  assert table[0]["identical"] == 1.0  # the others are as they were


@pytest.mark.slow
def test_a_different_model_is_found_out(measured):
  weights = to_weights(make_model(SMALL))
  other = to_model(SMALL, {p: -np.asarray(w) for p, w in weights.items()})
  other = decode(other, StreamDraft(TreeSpec(num_nodes=3)))
  changed = [*measured[:3], copy.copy(measured[3])]
  changed[3].generations = other
  assert rows(changed)[3]["identical"] < 1 and bench_rows.bugs(rows(changed))


@pytest.mark.slow
def test_an_early_end_is_a_bug_without_a_margin(measured):
  changed = [*measured[:3], copy.copy(measured[3])]
  first, *rest = changed[3].generations
  cut = dataclasses.replace(
    first, token_ids=first.token_ids[:-1], calls=first.calls[:-1]
  )
  changed[3].generations = [cut, *rest]
  row = rows(changed)[3]
  assert row["max_tie_margin"] is None and "inf" in row["mismatch"]
  json.dumps(row, allow_nan=False)


# -- times -------------------------------------------------------------------


def made_up(name, drafter, seconds, generations, expects="none", **times):
  """A Measured of batch 1 with these decoding seconds and 1 s of prefill."""
  seconds = np.atleast_2d(seconds)
  return Measured(
    Method(name, drafter, expects, **times),
    drafter.resolve(SMALL),
    generations,
    np.ones_like(seconds),
    seconds,
    batch=1,
  )


def test_speedups_are_against_the_faster_baseline_per_token():
  five = [5, 6, 7, 8, 9]
  plain = [stub(five, [1] * 5), stub(five[:3], [1] * 3)]
  longer = [stub(five, [1] * 5), stub(five * 2, [1] * 10)]
  drafted = [stub(five, [1, 2, 2]), stub(five[:3], [1, 2])]
  made = [
    made_up("none", NoDraft(), [8.0, 4.0], plain),  # 6 tokens in 12 s
    # 13 tokens in 19.5 s: more seconds, but fewer per token.
    made_up(NO_STREAMS, NoDraft(False), [6.0, 13.5], longer, None),
    made_up(
      NOISE,
      NoDraft(False),
      [6.0, 13.5],
      longer,
      None,
      times_against=NO_STREAMS,
    ),
    made_up("streams", StreamDraft(), [4.0, 2.0], drafted),
  ]
  prompts = [[4, 5], [6, 7]]
  settings = Settings()
  none, base, noise, streams = bench_rows.rows(
    make_model(SMALL), prompts, made, settings, ABOUT
  )
  assert none["ms_per_token"] == 2000 and none["step_ms"] == 2000
  assert base["ms_per_token"] == pytest.approx(1500)
  assert streams["ms_per_token"] == 1000 and streams["step_ms"] == 2000
  assert streams["baseline"] == none["baseline"] == NO_STREAMS
  assert streams["speedup"] == pytest.approx(1.5)
  assert none["speedup"] == pytest.approx(0.75)
  assert base["speedup"] == noise["speedup"] == 1
  assert (noise["noise_low"], noise["noise_high"]) == (1, 1)
  assert streams["step_cost"] == pytest.approx(2000 / 1500)
  # Requests: (2 + 19.5) s for 15 tokens over (2 + 6) s for 8.
  expected = (21.5 / 15) / (8 / 8)
  assert streams["speedup_request"] == pytest.approx(expected)
  assert streams["ms_to_first_token"] == 1000
  assert streams["tokens_per_second"] == 1
  assert streams["speedup_low"] <= 1.5 <= streams["speedup_high"]


def test_a_batch_runs_until_its_last_row_is_done():
  generations = [stub([5] * 4, [1, 1, 1, 1]), stub([5] * 4, [1, 3])]
  result = made_up("none", NoDraft(), [[0.4], [0.2]], generations)
  result.batch = 2
  assert bench_rows.step_ms(result) == pytest.approx(600 / (3 * 2))
  assert bench_rows._ms_per_token(result) == pytest.approx(600 / (6 * 2))


def test_nothing_decoded_leaves_no_numbers_and_no_crash():
  ended = [stub([3], [1]), stub([3], [1])]
  made = [
    made_up("none", NoDraft(), [0.0, 0.0], ended),
    made_up(NOISE, NoDraft(), [0.0, 0.0], ended, times_against="none"),
  ]
  settings = Settings()
  table = bench_rows.rows(make_model(SMALL), [[4], [5]], made, settings, ABOUT)
  json.dumps(table, allow_nan=False)
  for name in ("ms_per_token", "speedup", "step_ms", "step_cost"):
    assert table[0][name] is None
  assert table[0]["accept_by_depth"] == []
  assert "none" in text_table.render(table)


@hypothesis.settings(max_examples=20)
@given(
  st.lists(
    st.tuples(
      st.floats(0.1, 9), st.floats(0.1, 9), st.integers(1, 9), st.integers(1, 9)
    ),
    min_size=2,
    max_size=6,
  )
)
def test_the_interval_is_that_of_a_plain_bootstrap(prompts):
  base_s, own_s, base_n, own_n = map(np.array, zip(*prompts))
  parts = np.array([[0.25], [0.75]])  # of two repeats
  got = bench_rows.ratio_with_interval(
    (base_s * parts, base_n), (own_s * parts, own_n), seed=7
  )
  rng, ratios = np.random.default_rng(7), []
  draws = rng.integers(0, len(prompts), (2000, len(prompts)))
  for at in draws:  # the same prompts for both
    base = base_s[at].sum() / base_n[at].sum()
    ratios.append(base / (own_s[at].sum() / own_n[at].sum()))
  point = (base_s.sum() / base_n.sum()) / (own_s.sum() / own_n.sum())
  expected = [point, *np.quantile(ratios, [0.025, 0.975])]
  np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_pairing_takes_the_spread_of_prompts_out_of_the_interval():
  seconds = np.random.default_rng(0).uniform(0.1, 10, 30)
  tokens = np.full(30, 8)
  half = seconds / 2
  got = bench_rows.ratio_with_interval(
    (seconds[None], tokens), (half[None], tokens)
  )
  np.testing.assert_allclose(got, [2, 2, 2])


def test_of_one_batch_the_repeats_are_drawn():
  ask = lambda base, own: bench_rows.ratio_with_interval(
    (np.array(base)[:, None], np.array([8])),
    (np.array(own)[:, None], np.array([8])),
  )
  assert ask([3.0], [2.0]) == ask([1.0, 2.0], [1.0, 1.0]) == (1.5, None, None)
  # By hand: Student's t of 2 degrees of freedom is 4.303.
  ratio, low, high = ask([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])
  width = 4.3027 * np.log(2) / np.sqrt(3)
  assert ratio == pytest.approx(7 / 3)
  expected = 2 * np.exp(-width), 2 * np.exp(width)
  assert (low, high) == pytest.approx(expected, rel=1e-3)
  # Nine in ten of equal methods' intervals, or more, hold 1 (19 in 20).
  rng = np.random.default_rng(0)
  held = 0
  for _ in range(300):
    _, low, high = ask(*np.exp(rng.normal(0, 0.03, (2, 3))))
    held += low < 1 < high
  assert 270 < held < 299


# -- rows that go on with the next prompt ------------------------------------


@pytest.mark.slow
def test_throughput_of_refilled_rows():
  """The same tokens as in batches, timed as a whole."""
  prompts = [[5 + i, 6, 7][: 1 + i % 3] for i in range(7)]
  limits = dict(max_new_tokens=9, end_token=3, seed=4, temperature=0.9)
  settings = Settings(batch=3, refill=True, repeats=3, **limits)
  model = make_model(SMALL)
  methods = bench.plan(SMALL, [StreamDraft(TreeSpec(num_nodes=3))])
  methods = [methods[0], methods[-1]]
  made = bench.measure(model, prompts, methods, settings)
  table = bench_rows.rows(model, prompts, made, settings, ABOUT)
  alone = bench.measure(
    model, prompts, methods[:1], dataclasses.replace(settings, refill=False)
  )
  tokens = [g.token_ids for g in alone[0].generations]
  assert [g.token_ids for g in made[-1].generations] == tokens
  for row, result in zip(table, made, strict=True):
    assert row["refill"] and row["recompiles"] == 0
    assert result.decode_seconds.shape == (3, 1)
    assert row["step_ms"] is row["ms_to_first_token"] is None
    seconds = result.decode_seconds.sum() / 3
    emitted = sum(len(g.token_ids) for g in result.generations)
    assert row["tokens_per_second"] == pytest.approx(emitted / seconds)
    assert row["ms_per_token"] == pytest.approx(1e3 * seconds / emitted)
    assert row["speedup"] == pytest.approx(row["speedup_request"])
  assert table[-1]["identical"] == 1 and table[-1]["speedup_low"] > 0
  assert "tokens/s" in text_table.render(table)


# -- counts ------------------------------------------------------------------


def test_tokens_per_call_along_the_output():
  # Calls of 1, 3, 4 | 2, and one of 4 across the border of the bins at 8.
  first = stub(range(14), [1, 3, 4, 2, 4])
  assert bench_rows.tokens_per_call_by_position([first]) == [8 / 3, 6 / 2]
  across = stub(range(12), [1, 3, 2, 4, 2])  # 4: two in each bin
  got = bench_rows.tokens_per_call_by_position([across])
  np.testing.assert_allclose(got, [8 / 3.5, 4 / 1.5])
  both = bench_rows.tokens_per_call_by_position([first, across])
  np.testing.assert_allclose(both, [16 / 6.5, 10 / 3.5])
  assert bench_rows.tokens_per_call_by_position([stub([3], [1])]) == [1]


def test_acceptance_by_depth_is_a_share_of_verifications():
  made = [stub([1], [1], (4, 3, 1, 0)), stub([1], [1], (6, 3, 1, 1))]
  assert bench_rows.accept_by_depth(made) == [0.6, 0.2, 0.1]


def test_extra_weights_are_those_that_drafting_needs():
  streams = MODEL.streams.num_streams * MODEL.width  # J D
  pruner = 2 * MODEL.streams.prune_rank * MODEL.width  # 2 r D

  def count(config, drafter):
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return bench_rows.extra_params(model, drafter.resolve(config))

  assert count(MODEL, NoDraft()) == streams  # attached: eq. 1
  assert count(MODEL, NoDraft(attach_streams=False)) == 0
  assert count(MODEL, StreamDraft()) == streams
  pruned = StreamDraft(prune=Prune(kept_nodes=4))
  assert count(MODEL, pruned) == streams + pruner
  # LoRA of rank 2 on the four linears of one layer, for streams alone.
  lora = 2 * ((16 + 2 * 4 * 4) + (16 + 16) + (16 + 2 * 24) + (24 + 16))
  assert count(LOSSLESS, NoDraft()) == 0
  assert count(LOSSLESS, StreamDraft()) == streams + lora


@pytest.mark.slow
def test_the_table_lines_up(measured):
  lines = text_table.render(rows(measured)).split("\n")
  assert len(lines) == 5
  head = lines[0]
  for name in ("tokens/call", "step cost", "ms/token", "recompiles"):
    end = head.index(name) + len(name)
    assert all(line[end - 1] != " " for line in lines), name
    assert all(line[end : end + 1] in ("", " ") for line in lines), name
  assert "margin" not in head  # no row has one
