"""Bad days: weights that are not finite, a full cache, drafters that lie."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from random_models import CASES, VOCAB, random_model

from spec_stream import checkpoints, weights
from spec_stream.decode import generate, stream
from spec_stream.drafters.base import TreeDrafter
from spec_stream.drafters.none import NoDraft
from spec_stream.errors import UserError
from spec_stream.tree import TokenTree, TreeSpec

CONFIG, DRAFTER = CASES["lossless"]
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def changed(model, path, change):
  values = weights.to_weights(model)
  values = {**values, path: change(np.array(values[path]))}
  return weights.to_model(model.config, values)


def tokens_of(*args, **options):
  return [x.token_ids for x in generate(*args, **options)]


# -- numbers that are not finite ----------------------------------------------


def test_logits_that_are_not_finite_end_with_words(x64):
  """In the row that meets them, from the prompt on or later."""
  drafter = NoDraft()
  model = random_model(UNTIED, 1)
  prompts, options = [[1, 2], [3, 4]], dict(max_new_tokens=12)
  whole = tokens_of(model, prompts, drafter, **options)
  later = next(t for t in whole[1] if t not in {1, 2, *whole[0]})
  for token, words in [(3, "after 1 new"), (later, r"after \d+ new")]:

    def spoil(table, token=token):
      table[token] = np.nan
      return table

    broken = changed(model, "embed/table", spoil)
    with pytest.raises(
      UserError, match=f"not finite {words} tokens of prompt 1"
    ):
      generate(broken, prompts, drafter, **options)
    assert tokens_of(broken, [[1, 2]], drafter, **options) == whole[:1]
    with pytest.raises(UserError, match="not finite"):
      list(stream(broken, [3, 4], drafter, **options))


@pytest.mark.parametrize("value", [np.nan, 1e300])
def test_broken_streams_give_words_or_the_tokens_of_plain_decoding(x64, value):
  """A NaN anywhere in a call is in all of it; a large number is one."""
  model = random_model(CONFIG, 2)
  broken = changed(model, "streams/embed", lambda x: np.full_like(x, value))
  prompts, options = [[1, 2], [3, 4]], dict(max_new_tokens=14)
  plain = tokens_of(model, prompts, NoDraft(), **options)
  assert tokens_of(broken, prompts, NoDraft(), **options) == plain
  if np.isfinite(value):
    assert tokens_of(broken, prompts, DRAFTER, **options) == plain
    return
  with pytest.raises(UserError, match="not finite"):
    generate(broken, prompts, DRAFTER, **options)


# -- drafters that lie --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Liar(TreeDrafter):
  """Chains of whatever tokens; those of a call are those of the next plus 1."""

  name = "liar"
  tokens: tuple[int, ...] = ()

  def resolve(self, config, own=None):
    return self.resolved(config, TreeSpec("chain").resolve(3, 4), 3)

  def propose(self, params, state, accepted):
    batch = len(accepted.root)
    row = lambda *x: jnp.broadcast_to(jnp.array(x), (batch, 4))
    said = jnp.broadcast_to(jnp.array(self.tokens), (batch, 3))
    tokens = jnp.concatenate([accepted.root[:, None], said], 1)
    depth = row(0, 1, 2, 3)
    return TokenTree(tokens, depth - 1, depth, depth * 1.0), state


@pytest.mark.parametrize(
  "said",
  [
    (VOCAB, VOCAB, VOCAB),
    (-7, 3, 3),
    *(
      pytest.param(said, marks=pytest.mark.slow)
      for said in [(2**31 - 1, 1, 2), (-(2**31), -1, 0), (4, VOCAB + 3, 4)]
    ),
  ],
)
def test_tokens_that_there_are_not(x64, said):
  model = random_model(CONFIG, 3)
  prompts, options = [[1, 2], [3, 4]], dict(max_new_tokens=14)
  plain = tokens_of(model, prompts, NoDraft(), **options)
  assert tokens_of(model, prompts, Liar(tokens=said), **options) == plain


# -- ends of the cache --------------------------------------------------------


def test_a_prompt_that_fills_the_cache(x64):
  model, most = random_model(CONFIG, 4), CONFIG.max_positions
  prompt = [i % VOCAB for i in range(most)]
  for new in (1, 5):
    fits = [prompt[: most - new]]
    plain = tokens_of(model, fits, NoDraft(), max_new_tokens=new)
    assert len(plain[0]) == new
    assert tokens_of(model, fits, DRAFTER, max_new_tokens=new) == plain
    # What is in the cache does not depend on its size.
    wide = dataclasses.replace(CONFIG, max_positions=2 * most)
    wide = weights.to_model(wide, weights.to_weights(model))
    assert tokens_of(wide, fits, DRAFTER, max_new_tokens=new) == plain
    with pytest.raises(UserError, match="do not fit the cache of 64"):
      generate(model, fits, DRAFTER, max_new_tokens=new + 1)


# -- vocabulary that is padding -----------------------------------------------


@pytest.mark.parametrize(
  "warmth", [0.0, pytest.param(1.5, marks=pytest.mark.slow)]
)
def test_padding_of_the_vocabulary_is_never_drawn(x64, warmth):
  """Though its logits are the highest, in target and streams."""
  known = VOCAB - 3

  def raised(head):
    head[:, known:] *= 50
    return head

  model = changed(random_model(UNTIED, 5), "head/kernel", raised)
  prompts = [[1, 2], [3, 4]]
  options = dict(max_new_tokens=14, seed=3, temperature=warmth)
  free = tokens_of(model, prompts, NoDraft(), **options)
  assert any(t >= known for row in free for t in row)
  config = dataclasses.replace(UNTIED, known_tokens=known)
  padded = weights.to_model(config, weights.to_weights(model))
  plain = tokens_of(padded, prompts, NoDraft(), **options)
  assert all(t < known for row in plain for t in row)
  assert tokens_of(padded, prompts, DRAFTER, **options) == plain


def test_a_model_knows_the_tokens_of_its_tokenizer():
  class Words:
    vocab_size, eos_ids = 9, ()

  assert checkpoints._with_known(CONFIG, Words).known_tokens == 9
  Words.eos_ids = (9,)  # an end that only a config file knows
  assert checkpoints._with_known(CONFIG, Words).known_tokens == 10
  Words.vocab_size = VOCAB
  assert checkpoints._with_known(CONFIG, Words).known_tokens == 0
