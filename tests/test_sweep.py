"""Sweeps: commands, order, what is done, and a kill half way.

The launchers here are a few lines, each of which writes what it did; the code
around them is the real one.
"""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import hf_models
import pytest

from spec_stream import metrics, sweep
from spec_stream.errors import UserError
from spec_stream.sweep import Run

ROOT = pathlib.Path(__file__).parent.parent
# Commands at small scale, where a base is trained first, and at the paper's.
ABLATIONS = {
  "sampling": (10, 9),
  "similarity": (3, 2),
  "stream_count": (15, 14),
  "stream_identity": (25, 48),
  "stream_layers": (41, 40),
  "tree_width": (19, 19),
}
# In the short run; the others are slow.
SHORT = [
  ("stream_count", "small"),
  ("tree_width", "small"),
  ("sampling", "paper"),
]
TRAIN = """
import os, pathlib, sys, time
options = dict(a[2:].split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(options["workdir"])
(workdir / "pid").write_text(str(os.getpid()))
with open(workdir.parent / "ran.txt", "a") as file:
  print("train", workdir.name, file=file)
trigger = workdir.parent / f"do_{workdir.name}"
what = trigger.read_text() if trigger.exists() else ""
if what == "break once":
  trigger.unlink()
  sys.exit("Traceback: it broke")
if what == "mistake":
  sys.exit("error: steps must be 1 or more")
if what == "sleep":
  print("asleep", flush=True)
  try:
    time.sleep(60)
  except KeyboardInterrupt:
    (workdir / "saved").touch()
    sys.exit(130)
"""
BENCHMARK = """
import json, pathlib, sys, time
options = dict(a[2:].split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(options["workdir"])
with open(workdir.parent / "ran.txt", "a") as file:
  print("benchmark", workdir.name, options["tree_nodes"], file=file)
with open(workdir / "results.jsonl", "a") as file:
  for method in ("none", "none (A against A)", "streams"):
    row = {"method": method, "run_id": time.time_ns(), "tokens_per_call": 2.0}
    row["run_id"] = f"{pathlib.Path(__file__)}{options['tree_nodes']}"
    row["tree_nodes"] = int(options["tree_nodes"])
    print(json.dumps(row), file=file)
"""
CONFIG = """
from ml_collections import ConfigDict

from configs import _base
from spec_stream.sweep import Run


def get_config():
  return _base.base()


def sweep():
  yield Run("base", {"train.objective": "next_token"})
  for count in range(1, 7):
    yield Run(
      f"streams_{count}",
      {"model.streams.num_streams": count, "train.init_from": "{base}"},
      benchmark=[{"tree_nodes": 4}, {"tree_nodes": 8}],
    )
"""
RUNS = [
  Run("b", {"train.init_from": "{a}"}, benchmark=[{"tree_nodes": (4, 8)}]),
  Run("a", {"train.steps": 3}, evaluate=[{"prompts": 5}]),
]


def test_a_run_comes_after_what_it_needs():
  found = sweep.tasks(RUNS, "c.py", {"data.seed": 1}, ["--prompts=2"])
  assert [task.name for task in found] == ["a", "b"]
  assert [task.needs for task in found] == [(), ("a",)]
  assert found[1].commands == (
    ("launch/train.py", "--config=c.py", "--config.data.seed=1")
    + ("--config.train.init_from={a}", "--workdir={b}"),
    ("launch/benchmark.py", "--tree_nodes=4,8", "--prompts=2")
    + ("--workdir={b}",),
  )
  assert sweep.fill(found[1].commands[0], "w")[-2:] == [
    "--config.train.init_from=w/a",
    "--workdir=w/b",
  ]
  assert sweep.select(found, ["b"]) == found
  assert sweep.select(found, ["a"]) == found[:1]
  with pytest.raises(UserError, match="'c' is no run of the sweep: a, b"):
    sweep.select(found, ["c"])


@pytest.mark.parametrize(
  "runs, message",
  [
    ([Run("a"), Run("a")], "two runs are named 'a'"),
    ([Run("a/b")], "'a/b' names no run"),
    ([Run("")], "names no run"),
    ([Run("a", {"k": "{b}"})], "needs {b}, and no run is named so"),
    (
      [Run("a", {"k": "{b}"}), Run("b", {"k": "{a}"})],
      "need one another: a, b",
    ),
  ],
)
def test_runs_that_cannot_be(runs, message):
  with pytest.raises(UserError, match=message):
    sweep.tasks(runs, "c.py")


def test_what_is_left_of_a_run(tmp_path):
  two = [{"tree_nodes": 4}, {"tree_nodes": 8}]
  (task,) = sweep.tasks([Run("a", benchmark=two)], "c.py")
  train, small, large = task.commands
  (tmp_path / "a").mkdir()
  results = tmp_path / "a" / "results.jsonl"
  metrics.append_jsonl(results, [{"method": "none", "run_id": "1"}])
  assert sweep.missing(task, tmp_path) == [train, small, large]
  sweep.record(task, small, tmp_path)  # of weights that are not known
  assert sweep.missing(task, tmp_path) == [train, small, large]
  sweep.record(task, train, tmp_path)
  assert sweep.missing(task, tmp_path) == [small, large]
  sweep.record(task, small, tmp_path)
  assert sweep.missing(task, tmp_path) == [large]
  # A benchmark that was killed after its rows and before its record.
  metrics.append_jsonl(results, [{"method": "none", "run_id": "2"}])
  metrics.append_jsonl(results, [{"method": "none", "run_id": "3"}])
  sweep.record(task, large, tmp_path)
  assert sweep.missing(task, tmp_path) == []
  found = sweep.rows([task], tmp_path)
  assert [(r["run_id"], r["set"]) for r in found] == [
    ("1", {"tree_nodes": "4"}),
    ("3", {"tree_nodes": "8"}),
  ]
  # Moved as a whole it is still done; trained anew, its benchmarks are old.
  moved = tmp_path.rename(tmp_path.with_name("moved"))
  assert sweep.missing(task, moved) == []
  sweep.record(task, train, moved)
  assert sweep.missing(task, moved) == [small, large]
  with open(moved / "a" / "sweep.jsonl", "a") as file:
    file.write('{"command": ["launch/tr')  # torn by a kill
  assert sweep.missing(task, moved) == [small, large]
  with open(moved / "a" / "sweep.jsonl", "w") as file:
    file.write('{"command": 3}\n')
  with pytest.raises(UserError, match="a line without its 'command'"):
    sweep.missing(task, moved)


def test_a_base_that_was_trained_again(tmp_path):
  base, run = sweep.tasks(RUNS, "c.py")
  for name in "ab":
    (tmp_path / name).mkdir()
  sweep.record(base, base.commands[0], tmp_path, date="1")
  sweep.record(run, run.commands[0], tmp_path, date="2")
  assert len(sweep.missing(run, tmp_path)) == 1  # its benchmark
  sweep.record(base, base.commands[0], tmp_path, date="3")
  with pytest.raises(UserError, match="a was trained again since b started"):
    sweep.missing(run, tmp_path)


# -- the launcher -------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  """A checkout whose launchers do nothing but write that they ran."""
  (tmp_path / "launch").mkdir()
  for name in ("common", "sweep", "sweeping", "local"):
    text = (ROOT / "launch" / f"{name}.py").read_text()
    (tmp_path / "launch" / f"{name}.py").write_text(text)
  (tmp_path / "launch" / "train.py").write_text(TRAIN)
  (tmp_path / "launch" / "benchmark.py").write_text(BENCHMARK)
  (tmp_path / "spec_stream").symlink_to(ROOT / "spec_stream")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / "c.py").write_text(CONFIG)
  (tmp_path / "out").mkdir()
  return tmp_path


def start(folder, *args):
  return subprocess.Popen(
    [sys.executable, "launch/sweep.py", "--config=c.py", *args]
    + ["--workdir=out"] * ("--workdir" not in " ".join(args)),
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(folder)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def call(folder, *args):
  process = start(folder, *args)
  out, err = process.communicate(timeout=120)
  return process.returncode, out, err


def ran(folder):
  path = folder / "out" / "ran.txt"
  return path.read_text().splitlines() if path.exists() else []


def until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.05)


ALL = ["train base"] + [
  line
  for i in range(1, 7)
  for line in (f"train streams_{i}", f"benchmark streams_{i} 4")
  + (f"benchmark streams_{i} 8",)
]


def table(out):
  return out[out.index("done: ") :]


def test_a_sweep_runs_once_and_then_has_nothing_to_do(folder):
  code, out, err = call(folder)
  assert (code, err) == (0, "")
  assert ran(folder) == ALL
  assert "streams_6: benchmark done in 0:00; 0 of 19 command(s)" in out
  rows = table(out).splitlines()
  columns = ["run", "num_streams", "tree_nodes", "method"]
  assert rows[2].split()[:4] == columns
  assert len(rows) == 3 + 6 * 2 * 2  # plain and streams, the noise left out
  again = call(folder)
  assert again == (0, table(out), "")
  assert ran(folder) == ALL


def test_print_gives_the_commands_that_are_left(folder):
  code, out, _ = call(folder, "--executor=print", "--runs=streams_2")
  assert code == 0 and ran(folder) == []
  lines = out.splitlines()
  assert [line.split()[1] for line in lines] == [
    "launch/train.py",
    "launch/train.py",
    "launch/benchmark.py",
    "launch/benchmark.py",
  ]
  assert lines[1].endswith(
    "--config.model.streams.num_streams=2 "
    "--config.train.init_from=out/base --workdir=out/streams_2"
  )
  assert call(folder, "--runs=streams_2")[0] == 0
  assert ran(folder) == ALL[:1] + ALL[4:7]
  code, out, _ = call(folder, "--executor=print")
  assert len(out.splitlines()) == len(ALL) - 4


@pytest.mark.slow
def test_a_job_for_each_run_that_can_start(folder):
  shutil.copytree(ROOT / "launch" / "cluster", folder / "launch" / "cluster")
  args = ("--executor=slurm", "--job=--partition=gpu", "--retries=2")
  code, out, err = call(folder, *args)
  assert code == 0 and "# streams_6 waits for base\n" in err
  assert out.count("#SBATCH --job-name=sweep-base-") == 1
  assert out.count("#!/usr/bin/env bash") == 1
  assert "#SBATCH --partition=gpu" in out and "ntasks-per-node=1\n" in out
  (line,) = [line for line in out.splitlines() if line.startswith("srun")]
  command = line.split(".venv/bin/python ")[1].removesuffix(" &").split()
  assert command[0] == "launch/sweep.py"
  assert command[1:] == (
    ["--config=c.py", "--workdir=out", "--retries=2", "--runs=base"]
    + ["--noneeds"]
  )
  other = [*command[1:-2], "--runs=streams_2", "--noneeds"]
  code, _, err = call(folder, *other)
  assert code == 1 and "streams_2 needs base, which is not done in out" in err
  assert call(folder, *command[1:])[0] == 0 and ran(folder) == ["train base"]
  code, out, _ = call(folder, *args)
  assert out.count("#!/usr/bin/env bash") == 6
  assert call(folder, *other)[0] == 0
  code, out, _ = call(folder, *args)
  assert out.count("#!/usr/bin/env bash") == 5 and "sweep-streams-2" not in out
  code, out, err = call(folder, "--executor=jobset", "--job=--image=i")
  assert code == 1 and "error: --topology is needed" in err


@pytest.mark.slow
def test_killed_half_way_it_goes_on_with_what_is_left(folder):
  other = call(folder, "--workdir=whole")[1]
  (folder / "out" / "do_streams_3").write_text("sleep")
  process = start(folder)
  log = folder / "out" / "streams_3" / "log.txt"
  until(lambda: log.exists() and "asleep" in log.read_text())
  process.kill()
  process.communicate()
  before = ran(folder)
  assert before == ALL[:8]
  # The training outlived the sweep: it is waited for, not run beside itself.
  process = start(folder)
  until(lambda: "waiting for it" in process.stdout.readline())
  time.sleep(0.5)
  others = [line for line in ran(folder) if "streams_3" in line]
  assert others == ["train streams_3"]
  (folder / "out" / "do_streams_3").unlink()
  pid = int((folder / "out" / "streams_3" / "pid").read_text())
  os.kill(pid, signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  again = ran(folder)
  assert again.count("train streams_3") == 2
  assert sorted(again) == sorted([*ALL, "train streams_3"])
  # The report is that of a sweep that was not killed.
  assert table(out) == table(other)


def test_a_signal_reaches_the_command_and_stops_the_sweep(folder):
  (folder / "out" / "do_base").write_text("sleep")
  process = start(folder)
  log = folder / "out" / "base" / "log.txt"
  until(lambda: log.exists() and "asleep" in log.read_text())
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM and err == ""
  assert "stopped: base" in out and "waiting: streams_1," in out
  assert (folder / "out" / "base" / "saved").exists()
  assert ran(folder) == ["train base"]


def test_what_breaks_is_retried_and_what_is_wrong_is_not(folder):
  (folder / "out" / "do_streams_1").write_text("break once")
  (folder / "out" / "do_streams_2").write_text("mistake")
  code, out, _ = call(folder, "--processes=2")
  assert code == 1
  assert "streams_1: train broke (exit code 1): once more" in out
  words = (
    "streams_2: train failed (exit code 1): error: steps must be 1 or more"
  )
  assert words in out
  assert ran(folder).count("train streams_1") == 2
  assert ran(folder).count("train streams_2") == 1
  assert "done: base, streams_1, streams_3," in out
  assert "failed: streams_2\n" in out
  (folder / "out" / "do_streams_2").unlink()
  assert call(folder)[0] == 0
  assert ran(folder)[-3:] == ALL[4:7]


def test_what_needs_a_failed_run_is_skipped(folder):
  (folder / "out" / "do_base").write_text("mistake")
  code, out, _ = call(folder)
  assert code == 1 and ran(folder) == ["train base"]
  assert "skipped: streams_1, streams_2," in out
  assert "streams_1: skipped: it needs base" in out


@pytest.mark.parametrize(
  "change, args, message",
  [
    (("num_streams", "num_streamz"), (), "sets 'model.streams.num_streamz'"),
    (("range(1, 7)", '"x"'), (), "num_streams=x: "),
    pytest.param(
      ("next_token", "next"),
      (),
      "'base': train.objective is 'next': use one",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ("def sweep", "def swept"),
      (),
      "c.py has no sweep()",
      marks=pytest.mark.slow,
    ),
    ((), ("--runs=base,nothing",), "--runs: 'nothing' is no run of the sweep"),
  ],
)
def test_a_mistake_is_one_line_before_anything_runs(
  folder, change, args, message
):
  if change:
    (folder / "c.py").write_text(CONFIG.replace(*change))
  code, out, err = call(folder, *args)
  assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
  assert message in err and out == "" and ran(folder) == []


def test_there_is_a_count_of_each_ablation():
  files = (ROOT / "configs" / "ablations").glob("[!_]*.py")
  assert {path.stem for path in files} == set(ABLATIONS)


@pytest.mark.parametrize(
  "name, scale",
  [
    case if case in SHORT else pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(ABLATIONS, ("small", "paper"))
  ],
)
def test_the_ablations_can_be_run(name, scale, tmp_path):
  args = [f"--config=configs/ablations/{name}.py:{scale}"]
  if scale == "paper":  # of the depth of a 7B model
    shape = {**hf_models.BASE, "intermediate_size": 48, "num_hidden_layers": 32}
    text = json.dumps({**shape, "model_type": "llama"})
    (tmp_path / "config.json").write_text(text)
    args.append(f"--config.model.checkpoint={tmp_path}")
  done = subprocess.run(
    [sys.executable, "launch/sweep.py", "--executor=print", "--workdir=w"]
    + args,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and done.stderr == ""
  count = ABLATIONS[name][scale == "paper"]
  assert len(done.stdout.splitlines()) == count
  assert "{" not in done.stdout  # every directory is filled in
