"""The scripts of experiments/step_cost, and what runs them on a GPU."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import pytest
from compiler import compiled
from scripts import ROOT, script

from spec_stream import UserError, buckets, one_pass
from spec_stream.models import attention, four_bits, lora, native, panels


def test_steps_are_measured_against_their_limits(tmp_path, capsys):
  steps = script("step_cost", "steps.py")
  args = "--shape=tiny --lengths=20 --new=8 --prompts=2 --nodes=4 --kept=0,2"
  out = tmp_path / "rows.jsonl"
  assert steps.main([*args.split(), f"--out={out}"]) == 0
  table = capsys.readouterr().out
  assert table.splitlines()[0].split()[:3] == ["method", "nodes", "kept"]
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(r["method"], r["tree_nodes"], r["kept_nodes"]) for r in rows] == [
    ("none", 1, 0),
    ("none (A against A)", 1, 0),
    ("streams", 4, 0),
    ("streams", 4, 2),
  ]
  plain, again, whole, pruned = (r["step_bytes"] for r in rows)
  assert plain == again < whole < pruned  # by the streams, by the pruner
  plain, _, whole, pruned = (r["step_flops"] for r in rows)
  assert plain < pruned < whole
  assert all(0 < r["read_share"] and r["identical"] == 1 for r in rows)


def test_steps_in_two_passes(tmp_path, monkeypatch):
  monkeypatch.setattr(one_pass, "most_rows", one_pass.most_rows)  # restores
  monkeypatch.setattr(attention, "KERNEL_ON", ("cpu",))
  monkeypatch.setitem(attention.KERNELS, "cpu", "tree_attention")
  steps = script("step_cost", "steps.py")
  out = tmp_path / "rows.jsonl"
  args = "--shape=tiny --lengths=20 --new=8 --prompts=2 --nodes=4".split()
  args += ["--attention=dense"]  # a TPU's kernel would not run here
  for rows in "16", "15":
    assert steps.main([*args, f"--one_pass_rows={rows}", f"--out={out}"]) == 0
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  made = [r["one_pass"] for r in rows]
  assert made == [None, None, True, None, None, False]
  assert rows[2]["step_flops"] > rows[5]["step_flops"]
  assert all(r["identical"] == 1 for r in rows)
  assert {r["attention"] for r in rows} == {"dense"}


@compiled
def test_steps_by_either_product(tmp_path, monkeypatch):
  monkeypatch.setattr(native, "is_ready", native.is_ready)  # restores
  monkeypatch.setattr(one_pass, "most_rows", one_pass.most_rows)
  monkeypatch.setattr(lora, "_LARGE", 0)
  used, copies = [], []

  def count(of, into):
    multiply = of.matmul
    counting = lambda x, *args: into.append(len(x)) or multiply(x, *args)
    monkeypatch.setattr(of, "matmul", counting)

  count(panels, used)
  count(four_bits, copies)
  steps = script("step_cost", "steps.py")
  out = tmp_path / "rows.jsonl"
  args = "--shape=tiny --lengths=20 --new=8 --prompts=2 --nodes=4".split()
  args += ["--one_pass_rows=0"]  # as with copies
  jax.clear_caches()
  assert steps.main([*args, f"--out={out}"]) == 0
  # Plainly and of nodes; of the accepted one's streams.
  assert {1, 4} <= set(used) and set(copies) == {3}
  used.clear()
  copies.clear()
  jax.clear_caches()
  assert steps.main([*args, "--xla", f"--out={out}"]) == 0
  assert not used and not copies
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [r["panels"] for r in rows] == 3 * [True] + 3 * [False]
  assert [r["attention"] for r in rows] == 3 * ["kernel"] + 3 * ["dense"]
  flops = [r["step_flops"] for r in rows]
  assert flops[:3] == flops[3:]
  jax.clear_caches()  # or others would find this one's programs
  assert all(r["identical"] == 1 for r in rows)


@pytest.mark.slow
def test_what_is_for_a_gpu_runs_in_small(tmp_path):
  command = [ROOT / "experiments" / "gpu" / "run.sh", tmp_path / "o", "--tiny"]
  environ = {**os.environ, "PYTHON": sys.executable}
  done = subprocess.run(
    command, capture_output=True, text=True, env=environ, timeout=600
  )
  assert done.returncode == 0, done.stdout + done.stderr
  read = lambda name: [
    json.loads(line) for line in (tmp_path / "o" / name).open()
  ]
  names = ["device", "steps-tiny", "train", "benchmark"]
  assert [x["stage"] for x in read("stages.jsonl")] == names
  assert all(x["exit_code"] == 0 for x in read("stages.jsonl"))
  assert all(x["identical"] in (1, None) for x in read("results.jsonl"))
  assert [x["tree_nodes"] for x in read("steps.jsonl")] == [1, 1, 4, 8]
  wrong = subprocess.run(command[:1], capture_output=True, text=True)
  assert wrong.returncode == 2 and wrong.stderr.startswith("usage: ")
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 1 and "is not empty" in again.stderr


def test_steps_at_each_length_of_a_large_cache(tmp_path, capsys, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "experiments" / "step_cost")
  lengths = script("step_cost", "lengths.py")
  calls, step_ms = [], lengths.step_ms

  def timed(decoder, prompt, slots, new, room):
    assert (new, room) == (6, 100)
    ms, read = step_ms(decoder, prompt, slots, new, room)
    assert ms > 0
    nodes = decoder.drafter.tree.num_nodes if decoder.drafter.longest > 1 else 1
    calls.append((nodes, slots, len(prompt)))
    return float(len(calls)), read

  monkeypatch.setattr(buckets, "SMALLEST", 32)
  small = dataclasses.replace(lengths.SHAPES["tiny"], max_positions=128)
  monkeypatch.setitem(lengths.SHAPES, "tiny", small)
  monkeypatch.setattr(lengths, "step_ms", timed)
  args = "--shape=tiny --slots=0,176 --lengths=9,100 --nodes=4 --new=6"
  out = tmp_path / "rows.jsonl"
  args += " --room=100 --rounds=1"
  assert lengths.main([*args.split(), f"--out={out}"]) == 0
  assert calls == 2 * list(itertools.product((1, 4), (0, 176), (9, 100)))
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(r["method"], r["slots"], r["length"]) for r in rows] == [
    (method, slots, length)
    for method in ("plain", "4 nodes")
    for slots in (0, 176)
    for length in (9, 100)
  ]
  assert [r["step_ms"] for r in rows] == list(range(9, 17))
  assert [r["read"] for r in rows] == 2 * [32, 176, 176, 176]
  assert [r["to_longest"] for r in rows[:3]] == [9 / 10, 1, 11 / 12]
  assert len(capsys.readouterr().out.splitlines()) == 9
  for wrong, words in (
    ("--slots=100", "took a cache of 160, then"),
    ("--rounds=0", "--rounds must be"),
  ):
    with pytest.raises(UserError, match=words):
      lengths.main([*args.split(), wrong])


def test_ways_of_reading_a_cache_are_compiled(monkeypatch, capsys):
  monkeypatch.syspath_prepend(ROOT / "experiments" / "step_cost")
  monkeypatch.setattr(attention, "KERNEL_ON", ())
  ways = script("step_cost", "ways.py")
  args = "--target=cpu --shape=tiny --slots=256 --nodes=1 --layers=2"
  asked, decoding = [], ways.ahead.decoding

  def compiled(config, *args, **keys):
    asked.append((config.num_layers, config.quantize, keys["slots"]))
    return decoding(config, *args, **keys)

  monkeypatch.setattr(ways.ahead, "decoding", compiled)
  assert ways.main([*args.split(), "--quantize=,int8"]) == 0
  head, *rows = (x.split() for x in capsys.readouterr().out.splitlines())
  assert head[:5] == ["kernels", "nodes", "way", "MB", "copies"]
  assert [row[:3] for row in rows] == [
    ["float32", "1", "dense"],
    ["int8", "1", "dense"],
  ]
  assert asked == [(2, "", 256), (2, "int8", 256)]
  jax.clear_caches()


@pytest.mark.parametrize("ready", [True, False])
def test_products_are_timed_each_way(monkeypatch, capsys, ready):
  products = script("step_cost", "products.py")
  monkeypatch.setattr(native, "is_ready", lambda: ready)
  monkeypatch.setattr(products, "SIZES", ((4, 6),))
  monkeypatch.setattr(products, "HELD", 300)  # three kernels
  calls = []
  monkeypatch.setattr(
    products,
    "timer",
    lambda way, kernels, x: calls.append((x.shape, kernels)) or (lambda: 7.0),
  )
  assert products.main(["--rows=1,3"]) == 0
  said, lines = [], capsys.readouterr().out.splitlines()
  if not ready:
    said, lines = lines[:1], lines[1:]
  assert ["no C++ compiler" in x for x in said] == [True] * (not ready)
  assert [line.split()[4:] for line in lines[1:]] == [
    ["in", "first", "7", "7"],
    *[["panels", "7", "7"]] * ready,
    ["out", "first", "7", "7"],
    ["x", "W^T", "7", "7"],
  ]
  assert [x for x, _ in calls] == [(1, 4), (3, 4)] * (3 + ready)
  shapes = [[k.shape for k in kernels] for _, kernels in calls]
  ways = (4, 6), *[(2, 4, 16)] * ready, (6, 4), (6, 4)
  assert shapes == [3 * [shape] for shape in ways for _ in range(2)]


@pytest.mark.parametrize("ready", [True, False])
def test_rates_of_products(monkeypatch, capsys, ready):
  products = script("step_cost", "products.py")
  monkeypatch.setattr(native, "is_ready", lambda: ready)
  monkeypatch.setattr(products, "SIZES", ((8, 16), (4, 6)))
  monkeypatch.setattr(products, "HELD", 2000)
  monkeypatch.setattr(products, "SIDE", 4)
  monkeypatch.setattr(products, "timer", lambda *_: lambda: 0.001)
  monkeypatch.setattr(products, "numpy_timer", lambda *_: lambda: 0.004)
  assert products.main(["--rows=2,3", "--rates=2"]) == 0
  lines = capsys.readouterr().out.splitlines()[not ready :]
  ways = "in first", *["panels"] * ready, "out first", "x W^T", "NumPy"
  names = [f"{way}, {rows} rows" for rows in (2, 3) for way in ways]
  assert [line[:24].strip() for line in lines] == [
    *("XLA, squares", "NumPy, squares"),
    *names,
  ]
  of = lambda way, flops: flops / (4 if way == "NumPy" else 1)
  expected = [of(way, 2 * r * 8 * 16) for r in (2, 3) for way in ways]
  assert [int(line[24:29]) for line in lines] == [128, 32, *map(int, expected)]
