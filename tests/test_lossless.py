"""The property above all: the tokens of plain decoding, whatever the draft.

Random models, trees, modes, prompts, lengths, limits, seeds, temperatures: in
float64 without a single difference; in float32 with none but ties.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import (
  CASES,
  MODES,
  MOST,
  VOCAB,
  as_float32,
  differences,
  in_short,
  random_model,
  random_requests,
  row,
)

from spec_stream import weights
from spec_stream.decode import Decoder, collect, generate, stream
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.models import lora, transformer
from spec_stream.tree import TreeSpec

SEEDS = st.integers(0, 2**32 - 1)
# Some row must be sampled and filtered, so that each example runs one program.
FORCED = dict(temperature=0.9, top_k=3, repetition_penalty=1.2)


def requests(seed):
  prompts, options = random_requests(seed)
  for name, value in FORCED.items():
    options[name] = np.array([value, *options[name][1:]])
  return prompts, options


def check_counts(out, limit, end_token, stop):
  """tokens == target calls + accepted, up to what end and limit cut."""
  tokens, accepted = len(out.token_ids), sum(out.accepts[1:])
  cut = out.target_calls + accepted - tokens
  assert 0 <= cut < len(out.accepts)
  assert tokens <= limit
  ends = [i for i, token in enumerate(out.token_ids) if token == end_token]
  assert ends in ([], [tokens - 1])
  pairs = list(zip(out.token_ids, out.token_ids[1:]))
  stops = [i + 1 for i, pair in enumerate(pairs) if list(pair) in stop]
  assert stops in ([], [tokens - 1])
  if cut:  # only a row that came to its end loses tokens
    assert ends or stops or tokens == limit
  assert out.accepts[0] == out.target_calls - 1
  assert out.calls == sorted(out.calls)
  assert out.calls[-1] == out.target_calls - 1


@pytest.mark.parametrize("name", in_short(CASES, MODES))
def test_tokens_are_those_of_plain_decoding(x64, name):
  config, drafter = CASES[name]
  accepted = []

  @settings(max_examples=12)
  @given(SEEDS)
  def check(seed):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    plain = generate(model, prompts, NoDraft(), **options)
    fast = generate(model, prompts, drafter, **options)
    for i, (a, b) in enumerate(zip(plain, fast)):
      assert a.token_ids == b.token_ids
      assert a.target_calls == len(a.token_ids)
      limit, end = options["max_new_tokens"][i], options["end_token"]
      check_counts(b, limit, end, options["stop"])
      accepted.append(sum(b.accepts[1:]))

  check()
  assert sum(accepted) > 0  # or nothing was tested


def test_tokens_where_kernels_are_laid_out(x64, monkeypatch):
  """As those of large models are on a CPU, of the target and of its streams."""
  config, drafter = CASES["lossless"]
  accepted = 0
  for seed in range(3):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    plain = generate(model, prompts, NoDraft(), **options)
    graph, state = nnx.split(model)
    on_device = nnx.merge(graph, jax.tree.map(jnp.asarray, state))
    with monkeypatch.context() as patch:
      patch.setattr(lora, "_LARGE", 0)
      laid = transformer.for_decoding(on_device)
    assert laid.blocks[-1].ffw.down.out_first
    fast = generate(laid, prompts, drafter, **options)
    assert [x.token_ids for x in fast] == [x.token_ids for x in plain]
    accepted += sum(sum(x.accepts[1:]) for x in fast)
  assert accepted


@pytest.mark.parametrize("name", in_short(MODES))
def test_greedy_program_and_streaming(x64, name):
  config, drafter = CASES[name]
  for seed in range(4):
    model = random_model(config, seed)
    prompts, options = random_requests(seed)
    greedy = {k: options[k] for k in ("max_new_tokens", "end_token")}
    plain = generate(model, prompts, NoDraft(), **greedy)
    fast = generate(model, prompts, drafter, **greedy)
    assert [x.token_ids for x in plain] == [x.token_ids for x in fast]
    steps = list(stream(model, prompts[0], drafter, **row(greedy, 0)))
    assert sum((x.token_ids for x in steps), []) == plain[0].token_ids
    assert len(steps) == fast[0].target_calls
    for x in steps[1:]:
      assert x.path[0] == 0 and len(x.path) >= len(x.token_ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared, pruned", "lossless"])
def test_a_row_in_a_batch_gives_what_it_gives_alone(x64, name):
  config, drafter = CASES[name]
  for seed in range(3):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    together = generate(model, prompts, drafter, **options)
    for i, expected in enumerate(together):
      one = {**row(options, i)}
      # The same program for each row: a sampled, filtered companion.
      pair = {
        k: v if k in ("end_token", "stop") else np.array([v, options[k][0]])
        for k, v in one.items()
      }
      alone = generate(model, [prompts[i], prompts[0]], drafter, **pair)[0]
      assert alone == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_float32_differs_in_ties_alone(name):
  config, drafter = CASES[name]
  config = as_float32(config)
  for seed in range(25):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    plain = generate(model, prompts, NoDraft(), **options)
    fast = generate(model, prompts, drafter, **options)
    found = differences(model, prompts, plain, fast, options)
    assert all(x.margin < 1e-4 for x in found), list(map(str, found))


def test_limits_and_ends_inside_a_path(x64):
  """A model whose every head says the same: the whole chain is accepted."""
  config, _ = CASES["shared, first version"]
  values = weights.to_weights(random_model(config, 0))
  # Every residual branch is zero, and so is the rest of the stream but for one
  # element, equal for all tokens: logits are the same everywhere.
  values = {path: np.zeros_like(x) for path, x in values.items()}
  table = np.zeros((VOCAB, config.width))
  table[:, 0], table[7, 1] = 1.0, 1.0
  values["embed/table"] = table
  values["final_norm/scale"] = np.ones(config.width)
  values["streams/embed"] = np.zeros_like(values["streams/embed"])
  values["streams/embed"][:, 1] = 1.0  # streams are sure of token 7
  model = weights.to_model(config, values)
  drafter = StreamDraft(TreeSpec("chain"))
  prompt = [7, 7]  # its own embedding makes token 7 the best
  plain = generate(model, [prompt], NoDraft(), max_new_tokens=9)[0]
  assert plain.token_ids == [7] * 9
  for limit in range(1, 10):
    out = generate(model, [prompt], drafter, max_new_tokens=limit)[0]
    assert out.token_ids == [7] * limit
    assert out.target_calls == 1 + -(-(limit - 1) // 4)
  out = generate(model, [prompt], drafter, max_new_tokens=9, end_token=7)[0]
  assert out.token_ids == [7] and out.target_calls == 1


@pytest.mark.slow
def test_stop_sequences_inside_a_path(x64):
  """What plain decoding gives without stops, up to the first that is in it."""
  config, drafter = CASES["shared, main attends"]
  cut = 0
  for seed in range(2):
    model = random_model(config, seed)
    prompts, options = requests(seed)
    options |= {"max_new_tokens": MOST, "end_token": -1, "stop": ()}
    plain = [
      x.token_ids for x in generate(model, prompts, NoDraft(), **options)
    ]
    for at in range(2, 6):
      stop = [plain[0][at - 2 : at], [VOCAB - 1, plain[1][at], plain[1][at]]]
      options["stop"] = stop
      for name in (NoDraft(), drafter):
        for whole, x in zip(plain, generate(model, prompts, name, **options)):
          ends = [
            i
            for i in range(1, MOST + 1)
            if any(whole[max(0, i - len(s)) : i] == s for s in stop)
          ]
          assert x.token_ids == whole[: min(ends, default=MOST)]
          cut += len(x.token_ids) < MOST
  assert cut > 10


def test_finish_is_start_and_steps(x64):
  """The compiled loop and single steps are the same function."""
  config, drafter = CASES["lossless"]
  prompts, options = requests(3)
  decoder = Decoder(random_model(config, 3), drafter)
  looped = collect(decoder.finish(decoder.start(prompts, **options)))
  state = decoder.start(prompts, **options)
  while not state.done.all():
    state = decoder.step(state)
  assert collect(state) == looped
