"""What is read off programs: bytes, loops, collectives, copies."""

import jax
import jax.numpy as jnp
import pytest

from spec_stream import hlo

WEIGHT = jax.ShapeDtypeStruct((512, 512), jnp.float32)
ROW = jax.ShapeDtypeStruct((4, 512), jnp.float32)
SMALL = 64 * 2**10  # of activations, against a megabyte of weights


def program(function, *args, donate=()):
  compiled = jax.jit(function, donate_argnums=donate).lower(*args).compile()
  found = hlo.Program(compiled.as_text())
  name = found.loop() if found.loops() else found.entry
  return found.traffic(name), found, name


def loop(body):
  """Runs until a value says so: of a length that is not known before."""

  def run(x, *args):
    state = jax.lax.while_loop(
      lambda state: state[0].sum() < 9, lambda s: body(*s), (x, *args)
    )
    return state

  return run


def test_a_weight_is_read_once_each_turn():
  turn = lambda x, w: (jnp.tanh(x @ w), w)
  moved, found, name = program(loop(turn), ROW, WEIGHT)
  assert name in found.loops()
  assert 2**20 <= moved.bytes < 2**20 + SMALL


def test_a_loop_of_known_length_counts_each_turn():
  def scanned(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, 5)[0]

  moved, found, name = program(scanned, ROW, WEIGHT)
  assert found.loops() == [] and name == found.entry
  assert 5 * 2**20 <= moved.bytes < 5 * (2**20 + SMALL)


def test_what_is_updated_in_place_is_not_read():
  def turn(x, at, cache):
    row = jax.lax.dynamic_update_slice(cache, x[:1], (at[0], 0))
    return x + 1, at + 1, row

  at = jax.ShapeDtypeStruct((1,), jnp.int32)
  moved, found, name = program(loop(turn), ROW, at, WEIGHT, donate=(0, 2))
  assert found.copies(name, 2**20) == []
  assert moved.bytes < SMALL


def test_what_is_sliced_is_read_in_part():
  turn = lambda x, w: (x + w[:4] * jnp.sum(w[5, :7]), w)
  moved, *_ = program(loop(turn), ROW, WEIGHT)
  assert moved.bytes < SMALL


def test_a_copy_is_found():
  both = lambda w: (w.T + 0, w)
  text = "\n".join(
    [
      "ENTRY %main (p: f32[2,3]) -> f32[2,3] {",
      "  %p = f32[2,3]{1,0} parameter(0)",
      "  %q = f32[2,3]{1,0:S(1)} copy(%p)",
      "  ROOT %c = f32[2,3]{0,1} copy(%p)",
      "}",
    ]
  )
  assert hlo.Program(text).copies("main", 24) == ["c"]
  assert hlo.Program(text).copies("main", 25) == []
  # To on-chip memory it is a read alone.
  assert hlo.Program(text).traffic("main").bytes == 24 + 48
  moved, *_ = program(both, WEIGHT)
  assert moved.bytes >= 2 * 2**20


def test_what_an_accelerator_brings_on_chip_is_read_once():
  text = """
%fused (p0: bf16[8,4], p1: f32[4]) -> f32[8] {
  %p0 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  ROOT %r = f32[8]{0:S(1)} reduce(%p0, %p1), to_apply=%add
}

%body (s: (bf16[8,4], f32[4])) -> (bf16[8,4], f32[4]) {
  %s = (bf16[8,4]{1,0}, f32[4]{0}) parameter(0)
  %w = bf16[8,4]{1,0} get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %cs = (bf16[8,4]{1,0:S(1)}, bf16[8,4]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %ss = ((bf16[8,4]{1,0}), bf16[2,4]{1,0:S(1)}, s32[]) slice-start(%w)
  %sd = bf16[2,4]{1,0:S(1)} slice-done(%ss)
  %cd = bf16[8,4]{1,0:S(1)} copy-done(%cs)
  %f = f32[8]{0:S(1)} fusion(%cd, %x), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"70"}
  ROOT %t = (bf16[8,4]{1,0}, f32[4]{0}) tuple(%w, %x)
}

ENTRY %main (s: (bf16[8,4], f32[4])) -> (bf16[8,4], f32[4]) {
  %s = (bf16[8,4]{1,0}, f32[4]{0}) parameter(0)
  ROOT %l = (bf16[8,4]{1,0}, f32[4]{0}) while(%s), condition=%c, body=%body
}
"""
  found = hlo.Program(text)
  assert found.loops() == ["body"]
  # The copy, the slice, and the fusion's operand that lies outside.
  assert found.traffic("body") == hlo.Traffic(64 + 16 + 16, (), 70)
  assert found.traffic(found.entry) == found.traffic("body")
  known = text.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
  )
  three = hlo.Program(known)
  assert three.loops() == []
  assert three.traffic(three.entry) == found.traffic("body").times(3)


@pytest.mark.parametrize("first, last", [(0, 5), (2, 7), (0, 1), (3, 4)])
def test_a_loop_says_how_often_it_turns_by_its_condition(first, last):
  def turns(x, w):
    return jax.lax.fori_loop(first, last, lambda i, x: jnp.tanh(x @ w), x)

  text = jax.jit(turns).lower(ROW, WEIGHT).compile().as_text()
  bare = hlo.Program(text.replace("known_trip_count", "unknown"))
  assert bare.loops() == []
  known = hlo.Program(text)
  assert bare.traffic(bare.entry) == known.traffic(known.entry)
  assert last - first <= known.traffic(known.entry).bytes / 2**20


def test_a_bound_that_is_not_known_is_none():
  def turns(x, w, n):
    return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ w), x)

  count = jax.ShapeDtypeStruct((), jnp.int32)
  _, found, name = program(turns, ROW, WEIGHT, count)
  assert found.loops() == [name]


@pytest.mark.parametrize(
  "line, kind, size",
  [
    ("f32[4,8]{1,0:T(8,128)} all-reduce(%x), to_apply=%a", "all-reduce", 128),
    ("(bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x)", "all-gather", 64),
    ("bf16[4,8]{1,0} all-gather-done(%b)", "", 0),
    ("(f32[8]{0}, f32[16]{0}) all-reduce(%x, %x)", "all-reduce", 96),
    ('f32[4]{0} add(%x, %x), metadata={op_name="all-reduce(x)"}', "", 0),
  ],
)
def test_collectives(line, kind, size):
  text = (
    "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    f"  ROOT %r = {line}\n}}"
  )
  expected = ((kind, 1, size),) if kind else ()
  assert hlo.Program(text).traffic("main").collectives == expected


def test_talk_with_the_host_is_found():
  def talk(x):
    jax.debug.print("{}", x)
    return x + 1

  text = jax.jit(talk).lower(jnp.zeros(3)).compile().as_text()
  assert hlo.host_transfers(text)


def test_the_dearest_branch_counts():
  text = """
%a (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%x)
}

%b (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  %m = f32[8]{0} copy(%y)
  ROOT %o = f32[8]{0} negate(%m)
}

ENTRY %main (i: s32[], x: f32[8]) -> f32[8] {
  %i = s32[] parameter(0)
  %p = f32[8]{0} parameter(1)
  ROOT %r = f32[8]{0} conditional(%i, %p, %p), BRANCHES
}
"""
  for words in (
    "branch_computations={%a, %b}",
    "true_computation=%a, false_computation=%b",
  ):
    found = hlo.Program(text.replace("BRANCHES", words))
    assert found.traffic("main").bytes == 2 * 64
    assert found.copies("main", 32) == ["m"]
    assert found.copies("main", 33) == []


def test_a_start_of_two_operands_counts_both_results():
  text = """
ENTRY %main (a: f32[2], b: f32[3]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %s = ((f32[2]{0}, f32[3]{0}), (f32[4]{0}, f32[6]{0})) all-gather-start(%a, %b)
}
"""
  found = hlo.Program(text).traffic("main").collectives
  assert found == (("all-gather", 1, 40),)


def test_what_is_fused_or_a_tuple_counts():
  text = """
%scattered (x: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%x), dimensions={0}
}

ENTRY %main (a: f32[8], i: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %i = s32[] parameter(1)
  %f = f32[4]{0} fusion(%a), kind=kCustom, calls=%scattered
  %f-done = f32[4]{0:S(1)} fusion(%f), kind=kCustom, calls=%scattered
  %m = f32[4]{0:S(1)} fusion(%f), kind=kOutput, calls=%scattered
  %k = (f32[2]{0}, s32[2]{0}) custom-call(%a), custom_call_target="TopK"
  %d = ((f32[8]{0}, s32[]), f32[3]{0:S(1)}, u32[]) dynamic-slice-start(%a, %i)
}
"""
  found = hlo.Program(text).traffic("main")
  assert found.collectives == (("reduce-scatter", 1, 16),)
  # The fusion's 8 and 4; the call's 8 and 2 times two; of the slice its 3.
  assert found.bytes == 4 * (8 + 4 + 8 + 4 + 3)


def test_a_fusion_moves_nothing_of_a_collective_that_is_under_way():
  text = """
%start (x: f32[8]) -> (f32[8], f32[32]) {
  %x = f32[8]{0} parameter(0)
  %g = f32[32]{0} all-gather(%x), dimensions={0}
  ROOT %t = (f32[8]{0}, f32[32]{0}) custom-call(%x, %g)
}

%meanwhile (x: f32[8], y: f32[32], z: f32[2]) -> (f32[2], f32[8], f32[32]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[32]{0} parameter(1)
  %z = f32[2]{0} parameter(2)
  %g = f32[32]{0} all-gather(%x), dimensions={0}
  %n = f32[2]{0} negate(%z)
  ROOT %t = (f32[2]{0}, f32[8]{0}, f32[32]{0}, f32[32]{0}) tuple(%n, %x, %y, %g)
}

%done (x: f32[8], y: f32[32]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %y = f32[32]{0} parameter(1)
  %g = f32[32]{0} all-gather(%x), dimensions={0}
  ROOT %c = f32[32]{0} custom-call(%x, %y, %g)
}

ENTRY %main (a: f32[8], b: f32[2]) -> f32[32] {
  %a = f32[8]{0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %a-start = (f32[8]{0}, f32[32]{0}) fusion(%a), kind=kCustom, calls=%start
  %s0 = f32[8]{0} get-tuple-element(%a-start), index=0
  %s1 = f32[32]{0} get-tuple-element(%a-start), index=1
  %m = (f32[2], f32[8], f32[32], f32[32]) fusion(%s0, %s1, %b), calls=%meanwhile
  %s2 = f32[8]{0} get-tuple-element(%m), index=1
  %s3 = f32[32]{0} get-tuple-element(%m), index=3
  ROOT %the-done = f32[32]{0} fusion(%s2, %s3), kind=kCustom, calls=%done
}
"""
  found = hlo.Program(text).traffic("main")
  assert found.collectives == (("all-gather", 1, 128),)
  assert found.bytes == 4 * (8 + 32 + 2 + 2)


def test_of_a_fusion_what_it_writes_is_a_copy():
  text = """
%read (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %order = f32[8]{0} copy(%p)
  ROOT %n = f32[8]{0} negate(%order)
}

%write (q: f32[8]) -> (f32[8], f32[8]) {
  %q = f32[8]{0} parameter(0)
  %written = f32[8]{0} copy(%q)
  %m = f32[8]{0} negate(%q)
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%m, %written)
}

ENTRY %main (x: f32[8]) -> (f32[8], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%read
  ROOT %g = (f32[8]{0}, f32[8]{0}) fusion(%f), kind=kLoop, calls=%write
}
"""
  assert hlo.Program(text).copies("main", 32) == ["written"]
