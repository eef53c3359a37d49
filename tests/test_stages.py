"""Whose time it is: the scope of each operation of the decoding loop."""

import dataclasses

import tiny

from spec_stream import (
  NoDraft,
  StreamDraft,
  TreeSpec,
  hlo,
  one_pass,
  stages,
  weights,
)
from spec_stream.decode import Decoder
from spec_stream.models.config import StreamConfig


def test_an_operation_without_a_name_is_of_what_reads_it():
  text = """
%body (s: f32[4]) -> f32[4] {
  %s = f32[4]{0} parameter(0)
  %d = f32[4]{0} dot(%s, %s)
  %q = f32[4]{0} add(%d, %s), metadata={op_name="x/while/body/verify/qkv/add"}
  %v = f32[4]{0} add(%q, %s), metadata={op_name="x/while/body/verify/add"}
  ROOT %r = f32[4]{0} add(%v, %s), metadata={op_name="x/while/body/draft/add"}
}
"""
  assert stages.scopes(hlo.Program(text)) == {
    "d": "verify/qkv",
    "q": "verify/qkv",
    "v": "verify",
    "r": "draft",
    "s": "verify/qkv",
  }


def test_a_kernel_of_a_gpu_is_of_its_instruction():
  text = """
%body (s: f32[4]) -> f32[4] {
  %s = f32[4]{0} parameter(0)
  %a.1 = f32[4]{0} add(%s, %s), metadata={op_name="x/while/body/accept/add"}
  ROOT %p.2 = f32[4]{0} abs(%a.1), metadata={op_name="x/while/body/KERNEL"}
}
""".replace("KERNEL", "verify/attend/tree_attention/pallas_call")
  program = hlo.Program(text)
  assert "verify/attend" in stages.scopes(program).values()
  assert stages.kernels(program, stages.scopes(program)) == {
    "s": "accept",
    "a_1": "accept",
    "p_2": "verify/attend",
    "tree_attention": "verify/attend",
  }


def test_time_goes_to_the_scope_of_what_it_was_spent_for():
  config = dataclasses.replace(tiny.MODEL, vocab_size=64)
  model = weights.to_model(config, weights.init(config, 0))
  decoder = Decoder(model, NoDraft())
  shares = []
  for _ in range(3):  # other work may stop an operation for a while
    found = stages.milliseconds(decoder, [[5, 6], [7]], max_new_tokens=9)
    assert {"verify/ffw", "verify/attend", "commit"} <= set(found)
    assert all(ms > 0 for ms in found.values())
    shares.append(found.get("rest", 0) / sum(found.values()))
  assert min(shares) < 1 / 4
  assert stages.milliseconds(decoder, [[5, 6]], max_new_tokens=1) == {}


def test_streams_after_acceptance_count_by_themselves(monkeypatch):
  monkeypatch.setattr(one_pass, "most_rows", lambda *_: 0)
  streams = StreamConfig(2, 1, mode="lossless")
  config = dataclasses.replace(tiny.MODEL, vocab_size=64, streams=streams)
  model = weights.to_model(config, weights.init(config, 0))
  decoder = Decoder(model, StreamDraft(TreeSpec("best_first", 4)))
  found = stages.milliseconds(decoder, [[5, 6]], max_new_tokens=9)
  assert found["streams"] > 0
