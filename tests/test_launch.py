"""generate, benchmark and evaluate, by their flags, on a run made in a second.

A process for each launcher makes all its calls: starting python and jax is what
takes the time. The text of a mistake is one line, and nothing is written.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest
from tiny import DATA, SMALL, pairs

from spec_stream import checkpoints, results, trace_view, weights
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.models.config import StreamConfig, to_dict

TESTS = pathlib.Path(__file__).parent
LAUNCH = TESTS.parent / "launch"
# Makes each call as the shell would, but for the start of the process.
DRIVER = """
import contextlib, gc, importlib, io, json, sys
name, small_data, calls = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
import common, tiny
from absl import flags
launcher = importlib.import_module(name)
if small_data:
  tiny.use_small_data()
done = []
for args, before in calls:
  flags.FLAGS.unparse_flags()
  for flag in list(flags.FLAGS):
    if flag.startswith("config."):  # a key that the last call changed
      delattr(flags.FLAGS, flag)
      continue
    flags.FLAGS[flag].unparse()
  sys.argv = [f"launch/{name}.py", *args]
  out, err, code = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      exec(before)
      argv = common._parse(sys.argv)
      code = common._guard(launcher.main, argv) or 0
    except SystemExit as stop:
      code = stop.code or 0
  done.append([code, out.getvalue(), err.getvalue()])
  gc.collect()  # what a failed read leaves behind is not the next call's
print(json.dumps(done))
"""


@dataclasses.dataclass
class Done:
  code: int
  out: str
  err: str

  def objects(self):
    return [json.loads(line) for line in self.out.splitlines()]


def call_all(name, calls, folder, small_data=True):
  """{what: (arguments, python run before them)} -> {what: Done}.

  small_data: whether every data set is the one of tests/tiny.py.
  """
  env = dict(os.environ, JAX_PLATFORMS="cpu")
  env["PYTHONPATH"] = os.pathsep.join(map(str, (LAUNCH, TESTS, TESTS.parent)))
  done = subprocess.run(
    [sys.executable, "-c", DRIVER, name, str(int(small_data))],
    input=json.dumps([*calls.values()]),
    cwd=folder,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  made = [Done(*d) for d in json.loads(done.stdout.splitlines()[-1])]
  return dict(zip(calls, made, strict=True))


def write_run(directory, model, tokenizer, step=3, **settings):
  """A run as launch/train.py leaves it, but with fresh weights."""
  checkpoints.write_config(directory, {"model": to_dict(model), **settings})
  tokenizer.save(str(directory / "tokenizer.json"))
  with ocp.StandardCheckpointer() as writer:
    values = weights.init(model, seed=1)
    writer.save(directory / "checkpoints" / str(step) / "weights", values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run with fresh weights, and others that something is wrong with."""
  folder = tmp_path_factory.mktemp("runs")
  run = folder / "run"
  texts = [text for pair in pairs() for text in pair]
  tokenizer = Tokenizer.train(texts, DATA["vocab_size"])
  model = dataclasses.replace(
    SMALL, vocab_size=tokenizer.vocab_size, max_positions=64
  )
  data = DATA | {"dataset": "restaurants"}
  write_run(run, model, tokenizer, data=data)
  plain = dataclasses.replace(model, streams=StreamConfig(0, 1))
  train = {"objective": "next_token"}
  write_run(folder / "next_token", plain, tokenizer, data=data, train=train)
  for name in ("no_tokenizer", "other_tokenizer", "torn"):
    shutil.copytree(run, folder / name)
  (folder / "no_tokenizer" / "tokenizer.json").unlink()
  shutil.copytree(folder / "next_token", folder / "another_tokenizer")
  words = Tokenizer.train(["xy zw"] * 9 + texts[:9], tokenizer.vocab_size)
  words.save(f"{folder}/another_tokenizer/tokenizer.json")
  Tokenizer.train(texts, 270).save(f"{folder}/other_tokenizer/tokenizer.json")
  files = [p for p in (folder / "torn" / "checkpoints").rglob("*/d/*")]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  (folder / "p.jsonl").write_text(
    '{"prompt": "red big"}\n{"token_ids": [1, 40, 41, 2], "seed": 5}\n'
    '{"prompt": "old new small"}\n'
  )
  (folder / "bad.jsonl").write_text('{"prompt": "red"}\n{"promt": "blue"}\n')
  (folder / "deep.json").write_text("[[0], [0, 0]]")
  (folder / "words.json").write_text('{"a": 1}')
  return folder


def tree_of(folder):
  """What lies in a folder: {path: content}."""
  files = [p for p in folder.rglob("*") if p.is_file()]
  return {p.relative_to(folder): p.read_bytes() for p in files}


def one_line(done, *words):
  assert done.code == 1, done
  assert done.out == "" and done.err.count("\n") == 1, done
  assert done.err.startswith("error: "), done
  for word in words:
    assert word in done.err, done


# -- generate ----------------------------------------------------------------

RUN = "--workdir=run"
SHORT = (RUN, "--max_new_tokens=9")
FILE = (*SHORT, "--prompts_file=p.jsonl", "--json", "--temperature=0.9")
COLOURS = "sys.stdout.isatty = lambda: True"
GENERATE = {
  "none": ([*FILE, "--drafter=none"], ""),
  "streams": ([*FILE, "--tree=cartesian", "--tree_width=2"], ""),
  "drawn": ([*FILE, "--accept=rejection", "--min_p=0.1"], ""),
  "typical": ([*FILE, "--accept=typical", "--stop=ab"], ""),
  "lossy": ([*SHORT, "--prompt=red big", "--accept=typical"], ""),
  "ids": (
    ["--workdir=no_tokenizer", "--token_ids=5 17 30", "--json"]
    + ["--max_new_tokens=4"],
    "",
  ),
  "text": ([*SHORT, "--prompt=red big"], ""),
  "bare": ([*SHORT, "--prompt=red big", "--nostats"], ""),
  "steps": ([*SHORT, "--prompt=red big", "--show_steps"], ""),
  "colours": ([*SHORT, "--prompt=red big", "--show_steps"], COLOURS),
  "no colours": (
    [*SHORT, "--prompt=red big", "--show_steps"],
    COLOURS + "; import os; os.environ['NO_COLOR'] = '1'",
  ),
}
MISTAKES = {
  "unknown drafter 'nonsense': known ones are none, streams": (
    [RUN, "--prompt=a", "--drafter=nonsense"]
  ),
  "nothing: no such directory": ["--workdir=nothing", "--prompt=a"],
  "--workdir is needed": ["--prompt=a"],
  "--token_ids: token 99999999 is outside the vocabulary, which ends at": (
    [RUN, "--token_ids=99999999", "--json"]
  ),
  "do not fit the cache of 64": [RUN, "--token_ids=5 6", "--json"],
  "tokens and 62 new ones do not fit the cache of 64": (
    [RUN, "--prompt=red", "--max_new_tokens=62"]
  ),
  "is 2 deep but the drafts reach 1 tokens ahead": (
    [*SHORT, "--prompt=a", "--tree=deep.json"]
  ),
  "best_first tree of 900 nodes does not fit": (
    [*SHORT, "--prompt=a", "--tree_nodes=900"]
  ),
  "unknown tree 'oak'": [*SHORT, "--prompt=a", "--tree=oak"],
  "--tree=no.json: no such file": [*SHORT, "--prompt=a", "--tree=no.json"],
  "--tree=words.json: must hold a list of paths": (
    [*SHORT, "--prompt=a", "--tree=words.json"]
  ),
  "has no pruner": [*SHORT, "--prompt=a", "--kept_nodes=2"],
  "draft_length=4: this model has 1 streams": (
    [*SHORT, "--prompt=a", "--draft_length=4"]
  ),
  'bad.jsonl, line 2: needs either "prompt" or "token_ids"': (
    [*SHORT, "--prompts_file=bad.jsonl", "--json"]
  ),
  "no_tokenizer holds no tokenizer.json": (
    ["--workdir=no_tokenizer", "--prompt=a"]
  ),
  "has 270 tokens, but the model has": (
    ["--workdir=other_tokenizer", "--prompt=a"]
  ),
  "checkpoints/3 cannot be read": ["--workdir=torn", "--prompt=a"],
  "give one of --prompt": [*SHORT, "--prompt=a", "--token_ids=5"],
  "--show_steps": [*SHORT, "--prompt=a", "--json", "--show_steps"],
  "max_new_tokens=0 must be 1 or more": (
    [RUN, "--prompt=a", "--max_new_tokens=0"]
  ),
  "temperature must be": [*SHORT, "--prompt=a", "--temperature=-1"],
  "min_p must be in [0, 1]": [*SHORT, "--prompt=a", "--min_p=-1"],
  "repetition_penalty must be above 0": (
    [*SHORT, "--prompt=a", "--repetition_penalty=0"]
  ),
  "a stop sequence is empty": [*SHORT, "--prompt=a", "--stop="],
  "--stop is text, which this model has no tokenizer for": (
    ["--workdir=no_tokenizer", "--token_ids=5", "--stop=a"]
    + ["--max_new_tokens=4"]
  ),
  "accept=rejection: the shape of a best_first tree": (
    [*SHORT, "--prompt=a", "--accept=rejection", "--tree=best_first"]
  ),
  "prompt_lookup takes the most probable: use exact": (
    [*SHORT, "--prompt=a", "--accept=rejection", "--drafter=prompt_lookup"]
    + ["--tree_nodes=1"]
  ),
}


@pytest.fixture(scope="module")
def generated(folder):
  before = tree_of(folder)
  mistakes = {says: (args, "") for says, args in MISTAKES.items()}
  done = call_all("generate", GENERATE | mistakes, folder)
  assert tree_of(folder) == before  # generating writes nothing
  return done


def test_generate_prints_the_same_tokens_whoever_drafts(generated):
  none, drafted = (generated[d].objects() for d in ("none", "streams"))
  assert len(none) == 3 and generated["none"].err == ""
  for answer in none:
    assert answer.keys() == {
      "text", "token_ids", "target_calls", "tokens_per_call", "lossless"
    }  # fmt: skip
    assert answer["lossless"] is True
    assert answer["target_calls"] == len(answer["token_ids"]) <= 9
    assert answer["tokens_per_call"] == 1
  tokens = lambda answers: [(a["token_ids"], a["text"]) for a in answers]
  assert tokens(drafted) == tokens(none)
  assert len({tuple(a["token_ids"]) for a in none}) == 3


def test_generate_by_other_rules_of_acceptance(generated):
  assert all(a["lossless"] for a in generated["drawn"].objects())
  typical = generated["typical"].objects()
  assert len(typical) == 3
  assert all(a["lossless"] is False for a in typical)
  assert "accept=typical is NOT lossless" in generated["lossy"].out
  assert "lossless" not in generated["text"].out


def test_generate_without_a_tokenizer(generated):
  (answer,) = generated["ids"].objects()
  assert answer["text"] is None and len(answer["token_ids"]) == 4


def test_generate_shows_text_steps_and_counts(generated):
  bare = generated["bare"].out
  text, counts = generated["text"].out.rsplit("\n", 2)[:2]
  assert text + "\n" == bare
  words = counts.split()
  tokens, calls = int(words[0]), int(words[3])
  assert counts.startswith(f"{tokens} tokens in {calls} calls, ")
  assert f"{tokens / calls:.2f} tokens per call" in counts
  steps = generated["steps"].out.rsplit("\n", 2)[0]
  assert steps.startswith("[") and steps.endswith("]")
  assert 1 < steps.count("][") + 1 <= calls
  assert steps[1:-1].replace("][", "") == text
  coloured = generated["colours"].out.rsplit("\n", 2)[0]
  assert coloured.endswith("\x1b[0m")
  pieces = coloured.split("\x1b[0m")[:-1]
  assert len({piece[:5] for piece in pieces}) == 2  # in turns
  assert all(a[:5] != b[:5] for a, b in zip(pieces, pieces[1:]))
  assert "".join(piece[5:] for piece in pieces) == text
  assert "\x1b" not in generated["no colours"].out


@pytest.mark.parametrize("says", MISTAKES)
def test_generate_says_a_mistake_in_one_line(generated, says):
  one_line(generated[says], says)


# -- benchmark ---------------------------------------------------------------

MEASURE = [*SHORT, "--prompts=3", "--tree_nodes=3,2"]
# Streams emit another second token than plain decoding does.
WRONG = """
from spec_stream import bench
right = bench.collect
def wrong(state):
  made = right(state)
  if state.tree.num_nodes > 1:
    made[0].token_ids[1] += 1
  return made
bench.collect = wrong
"""
FIELDS = (
  "method dataset mode num_streams num_stream_layers tree tree_nodes accept "
  "temperature batch prompts tokens target_calls tokens_per_call ms_per_token "
  "ms_to_first_token tokens_per_second speedup speedup_low speedup_high "
  "speedup_request identical extra_params compile_seconds recompiles device "
  "dtype jax commit seed run_id step_ms step_cost max_tie_margin "
  "tokens_per_call_by_position accept_by_depth date command baseline"
).split()


# A model of costs with two sizes, measured in a moment.
QUICK = """
from spec_stream import auto
auto.SIZES, auto.TIMED, auto.PROMPTS, auto._SECONDS = (2, 3), (2, 3), 3, 0
"""


@pytest.fixture(scope="module")
def benchmarked(folder):
  for name in ("asked", "lossy", "auto"):
    shutil.copytree(folder / "run", folder / name)
  asked = ("red", "sport"), ("big old", "art"), ("new", "sport")
  lines = [
    json.dumps({"question_id": i, "category": category, "turns": [text]})
    for i, (text, category) in enumerate(asked)
  ]
  (folder / "q.jsonl").write_text("\n".join(lines))
  return call_all(
    "benchmark",
    {
      "unknown drafter 'medusae'": ([RUN, "--drafters=none,medusae"], ""),
      "--tree_nodes=4,x": ([RUN, "--tree_nodes=4,x"], ""),
      "repeats=0 must be": ([RUN, "--repeats=0"], ""),
      "unknown split 'tests'": ([RUN, "--split=tests"], ""),
      "good": (MEASURE, ""),
      "asked": (
        ["--workdir=asked", "--max_new_tokens=9", "--tree_nodes=3"]
        + ["--questions=q.jsonl", "--prompts=0"],
        "",
      ),
      "--chat and --turns go with": ([*MEASURE, "--turns=2"], ""),
      "auto": (
        ["--workdir=auto", "--max_new_tokens=9", "--prompts=2", "--tree=auto"]
        + ["--tree_nodes=3"],
        QUICK,
      ),
      "measure on another one": (
        [*MEASURE, "--tree=auto", "--split=validation"],
        "",
      ),
      "leave --kept_nodes out": (
        [*MEASURE, "--tree=auto", "--kept_nodes=2"],
        "",
      ),
      "which --refill does not time apart": (
        [*MEASURE, "--roofline", "--refill"],
        "",
      ),
      "--accept is not for plain decoding": (
        [*MEASURE, "--drafters=none", "--accept=typical"],
        "",
      ),
      "typical": (
        ["--workdir=lossy", "--max_new_tokens=9", "--prompts=2"]
        + ["--accept=typical", "--temperature=1.5", "--tree_nodes=3"]
        + ["--roofline"],
        "",
      ),
      "wrong": (
        [*MEASURE, "--prompts=2", "--tree_nodes=3", "--explain_differences"],
        WRONG,
      ),  # the last
    },
    folder,
  )


def test_benchmark_prints_a_table_and_adds_its_rows(folder, benchmarked):
  good = benchmarked["good"]
  assert good.code == 0, good
  path = folder / "run" / "results.jsonl"
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  first, second = results.by_run(rows)  # neither took the other's away
  results.check(rows, path)
  names = ["none", "none (no streams)", "none (A against A)", "streams"]
  assert [r["method"] for r in first] == [*names, "streams"]
  assert [r["tree_nodes"] for r in first] == [1, 1, 1, 3, 2]
  assert [r["method"] for r in second] == names
  for row in first:
    assert not [f for f in FIELDS if f not in row]
    assert row["recompiles"] == 0 and row["prompts"] == 3
    assert row["identical"] == (None if "no str" in row["method"] else 1)
    assert row["command"].startswith("launch/benchmark.py --workdir=run")
  assert first[2]["noise_low"] <= first[2]["noise_high"]
  table = good.out.splitlines()
  assert table[0].startswith("method") and len(table) == 7
  assert "Speed-ups are against 'none" in table[-1]
  assert "A against A" in table[-1] and first[0]["device"] in table[-1]
  trace = json.loads((folder / "run" / "trace.json").read_text())
  trace_view.check(trace, "trace.json")
  assert max(len(step["nodes"]) for step in trace["steps"]) == 3


def test_benchmark_of_questions_ends_with_their_categories(folder, benchmarked):
  asked = benchmarked["asked"]
  assert asked.code == 0, asked
  *table, header, sport, art, note = asked.out.splitlines()
  assert len(table) == 5 and "3 prompts of q, " in note
  assert header.split() == "category prompts streams, 3 nodes".split()
  (sport, two, x), (art, one, y) = sport.split(), art.split()
  assert (sport, two, art, one) == ("sport", "2", "art", "1")
  row = json.loads(
    (folder / "asked/results.jsonl").read_text().splitlines()[-1]
  )
  assert row["dataset"] == "q" and row["prompts"] == 3
  low, high = sorted((float(x), float(y)))
  assert low - 0.01 <= row["tokens_per_call"] <= high + 0.01


def test_benchmark_fails_where_tokens_differ(folder, benchmarked):
  wrong = benchmarked["wrong"]
  assert wrong.code == 1 and " 0.0%" in wrong.out
  (line,) = [x for x in wrong.err.splitlines() if x.startswith("BUG: ")]
  assert "streams (3 nodes) departs" in line and "new token 1" in line
  lines = (folder / "run" / "differences.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in lines]
  assert [(d["method"], d["position"]) for d in found] == [("streams", 1)] * 2
  assert not any(d["plain_in_batch"] or d["plain_in_tree"] for d in found)
  assert "In 0 of 2 plain decoding departs" in wrong.out


def test_benchmark_marks_what_is_not_lossless(folder, benchmarked):
  done = benchmarked["typical"]
  assert done.code == 0, done
  assert "accept=typical is NOT lossless" in done.out
  lines = (folder / "lossy" / "results.jsonl").read_text().splitlines()
  *plain, row = [json.loads(line) for line in lines]
  assert (row["accept"], row["lossless"], row["identical"]) == (
    "typical",
    False,
    None,
  )
  assert all(r["lossless"] and r["accept"] == "exact" for r in plain)
  trace = json.loads((folder / "lossy" / "trace.json").read_text())
  assert trace["lossless"] is False


def test_benchmark_holds_steps_against_their_limits(folder, benchmarked):
  lines = (folder / "lossy" / "results.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 4  # plain with and without streams, its twin, streams
  plain, tree = rows[0], rows[-1]
  assert tree["step_flops"] > plain["step_flops"]
  for row in rows:
    read = row["step_bytes"] / row["read_rate"]
    multiply = row["step_flops"] / row["matrix_rate"]
    assert row["limit_ms"] == pytest.approx(1e3 * max(read, multiply))
    assert row["read_share"] == pytest.approx(1e3 * read / row["step_ms"])
    assert {"verify/ffw", "verify/head", "accept"} <= set(row["stage_ms"])
  assert "draft" in tree["stage_ms"] and "draft" not in plain["stage_ms"]
  assert "measured here" in benchmarked["typical"].out
  assert "streams, 3 nodes" in benchmarked["typical"].out


def test_benchmark_puts_what_was_predicted_beside(folder, benchmarked):
  done = benchmarked["auto"]
  assert done.code == 0, done
  assert "predicted" in done.out.splitlines()[0]
  assert "--tree=auto: " in done.err
  lines = (folder / "auto" / "results.jsonl").read_text().splitlines()
  *_, fixed, chosen = [json.loads(line) for line in lines]
  assert (fixed["method"], fixed["tree_nodes"]) == ("streams", 3)
  assert fixed["predicted_speedup"] > 0
  assert fixed["predicted_tokens_per_call"] >= 1
  assert chosen["method"] in ("streams (auto)", "none (auto)")
  assert chosen["identical"] == 1
  assert (folder / "auto" / "cost_model.json").exists()


def test_benchmark_says_a_mistake_in_one_line(benchmarked):
  for says, done in benchmarked.items():
    if says not in ("good", "wrong", "asked", "typical", "auto"):
      one_line(done, says)


# -- evaluate ----------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(folder, benchmarked):
  shutil.copytree(folder / "run", folder / "scored")
  workdir = "--workdir=scored"
  return call_all(
    "evaluate",
    {
      "unknown drafter 'x'": ([workdir, "--drafter=x"], ""),
      "unknown split 'tests'": ([workdir, "--split=tests"], ""),
      "batch=0": ([workdir, "--batch=0"], ""),
      "good": ([workdir, "--prompts=3", "--max_new_tokens=6"], ""),
      "nowhere: no such directory": ([workdir, "--against=nowhere"], ""),
      "is given twice": ([workdir, "--against=next_token,./scored"], ""),
      "have different tokenizers": (
        [workdir, "--against=another_tokenizer"],
        "",
      ),
      "compared": (
        [workdir, "--prompts=3", "--max_new_tokens=6", "--tree_nodes=3"]
        + ["--against=next_token"],
        "",
      ),
    },
    folder,
  )


def test_evaluate_scores_and_shows_samples(folder, evaluated):
  good = evaluated["good"]
  assert good.code == 0, good
  quality = json.loads((folder / "scored" / "quality.json").read_text())
  assert quality["prompts"] == 3 and quality["dataset"] == "restaurants"
  assert 0 <= quality["rougeLsum"] <= quality["rouge1"] <= 100
  assert {"commit", "step", "date", "split", "max_new_tokens"} <= set(quality)
  assert good.out.count("reference  ") == 2
  last = good.out.splitlines()[-1]
  assert f"ROUGE-1 {quality['rouge1']:.2f}" in last and "best of" in last


def test_evaluate_puts_runs_side_by_side(folder, evaluated, benchmarked):
  done = evaluated["compared"]
  assert done.code == 0 and "warning" not in done.err, done
  header, streams, plain = done.out.splitlines()
  assert header.startswith("run") and "ROUGE-Lsum" in header
  assert streams.startswith("scored") and plain.startswith("next_token")
  found = json.loads((folder / "scored" / "comparison.json").read_text())
  assert found["prompts"] == 3 and found["warnings"] == []
  first, second = found["runs"]
  quality = json.loads((folder / "scored" / "quality.json").read_text())
  assert first["rougeLsum"] == quality["rougeLsum"]
  assert first["identical"] == 1 and first["extra_params"] > 0
  rows = (folder / "scored" / "results.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  newest = [r for r in rows if r["tree_nodes"] == 3][-1]
  assert first["speedup"] == newest["speedup"]
  assert f"{newest['speedup']:.2f}" in streams
  assert second["speedup"] is None and second["tokens_per_call"] == 1
  assert second["extra_params"] == 0 and plain.split().count("-") == 2


def test_evaluate_says_a_mistake_in_one_line(evaluated):
  for says in set(evaluated) - {"good", "compared"}:
    one_line(evaluated[says], says)


# -- help --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "benchmark", "evaluate"])
def test_help_is_quick_and_about_our_flags(name):
  done = subprocess.run(
    [sys.executable, LAUNCH / f"{name}.py", "--help"],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0 and done.stderr == ""
  for flag in ("--workdir", "--tree_nodes", "--max_new_tokens"):
    assert f"\n  {flag}\n" in done.stdout
  assert f"launch/{name}.py --workdir=" in done.stdout
  assert "--logtostderr" not in done.stdout  # of a library
  assert max(map(len, done.stdout.splitlines())) <= 80
