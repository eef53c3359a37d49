"""Drafts against a plain reading of each paper: NumPy, loops, no cache.

For each method `score(path)` gives what follows the root and the drafted tokens
`path`, computed from nothing but the weights and all tokens before; a plain
search over such scores must give the nodes that the compiled loop drafts, after
the prefill and after steps that accepted few and many tokens.
"""

import numpy as np
import pytest
import reference
from random_drafters import CASES, SHORT, make
from random_models import in_short
from reference import log_softmax

from spec_stream import weights as weights_lib
from spec_stream.decode import Decoder
from spec_stream.drafters import prompt_lookup

silu = lambda x: x / (1 + np.exp(-x))


def hidden_of(config, values, tokens):
  """Final hidden states [T, D] of a sequence."""
  above = [range(t + 1) for t in range(len(tokens))]
  order = list(range(len(tokens)))
  rows, _ = reference.forward(config, values, tokens, order, above, (), 0)
  return np.stack([rows[t, 0] for t in order])


def layers_of(config, values, tokens):
  """[L, T, D] main stream after each layer."""
  model = reference.Reading(config, values)
  rows = {(t, 0): values["embed/table"][x] for t, x in enumerate(tokens)}
  out = []
  for layer in range(config.num_layers):
    sees = lambda row: [(u, 0) for u in range(row[0] + 1)]
    rows = model.block(layer, rows, lambda row: row[0], sees)
    out.append(np.stack([rows[t, 0] for t in range(len(tokens))]))
  return np.stack(out)


def streams(config, values, own, before, root):
  """Streams whose logits take a term from the token before (no paper's)."""
  del own
  above = [range(t + 1) for t in range(len(before))]
  order, last = list(range(len(before))), len(before) - 1
  count = config.streams.num_streams
  rows, _ = reference.forward(
    config, values, before, order, above, [last], count
  )
  reading, embed = reference.Reading(config, values), values["embed/table"]

  def score(path):
    word = embed[[root, *path][-1]]
    more = word @ values["streams/correct_a"] @ values["streams/correct_b"]
    return reading.logits(rows[last, len(path) + 1]) + more

  return score


def medusa(config, values, own, before, root):
  del own, root
  h = hidden_of(config, values, before)[-1]
  blocks, bias = values["drafter/block_kernels"], values["drafter/block_bias"]
  heads = values["drafter/head_kernels"]
  layers = len(blocks) // len(heads)

  def score(path):
    j, x = len(path), h
    for layer in range(layers):
      at = j * layers + layer
      x = x + silu(x @ blocks[at] + bias[at])
    return x @ heads[j]

  return score


def hydra(config, values, own, before, root):
  del own
  h, embed = hidden_of(config, values, before)[-1], values["embed/table"]
  kernel, width = values["drafter/block_kernel"], config.width

  def score(path):
    j = len(path) + 1
    x = np.concatenate([h] + [embed[t] for t in [root, *path]])
    first = sum(1 + i for i in range(1, j)) * width
    y = x @ kernel[first : first + x.size] + values["drafter/block_bias"][j - 1]
    return (h + silu(y)) @ values["drafter/head_kernels"][j - 1]

  return score


def redrafter(config, values, own, before, root):
  del own
  h, embed = hidden_of(config, values, before)[-1], values["embed/table"]
  own = {k[8:]: v for k, v in values.items() if k.startswith("drafter/")}

  def score(path):
    s = embed[root]
    for token in path:
      s = s @ own["state_kernel"] + embed[token] @ own["word_kernel"]
      s = silu(s + own["state_bias"])
    x = np.concatenate([s, h])
    for kernel, bias in zip(own["block_kernels"], own["block_bias"]):
      x = x + silu(x @ kernel + bias)
    return x @ own["head_kernel"]

  return score


def draft_model(config, values, own, before, root):
  del config, values
  config, values = own.config, reference.numpy_weights(own)

  def score(path):
    hidden = hidden_of(config, values, [*before, root, *path])
    return reference.Reading(config, values).logits(hidden[-1])

  return score


def eagle(config, values, own, before, root):
  del own
  f = hidden_of(config, values, before)
  fuse = values.get("drafter/fuse_kernel")
  if fuse is not None:
    taps = dict(config.drafter.options)["fuse"]
    tapped = layers_of(config, values, before)[list(taps)]
    f = np.concatenate(list(tapped), -1) @ fuse
  renamed = {
    k.replace("drafter/block", "blocks/0"): v for k, v in values.items()
  }
  layer = reference.Reading(config, renamed)
  embed = values["embed/table"]
  join = lambda word, feature: (
    embed[word] @ values["drafter/word_kernel"]
    + feature @ values["drafter/feature_kernel"]
  )

  def score(path):
    features = list(f)  # of positions 0..; the token drawn from i is i + 1
    words = [*before[1:], root, *path]
    for _ in range(1 + len(path)):
      rows = {
        (i, 0): join(word, feature)
        for i, (word, feature) in enumerate(zip(words, features))
      }
      sees = lambda row: [(u, 0) for u in range(row[0] + 1)]
      out = layer.block(0, rows, lambda row: row[0], sees)
      features.append(out[len(features) - 1, 0])
    return layer.logits(features[-1])

  return score


# -- searches: {path: log-probability} of the nodes below the root -----------


def children(score, path, total, width):
  log_probs = log_softmax(score(path))
  best = np.argsort(-log_probs, kind="stable")[:width]
  return [((*path, int(t)), total + log_probs[t]) for t in best]


def by_level(score, drafter):
  """EAGLE-2: the best W of a level are expanded, the best nodes of all stay."""
  width, level, found = drafter.tree.width, [((), 0.0)], []
  for _ in range(drafter.longest - 1):
    level = [c for path, x in level for c in children(score, path, x, width)]
    found += level
    level = sorted(level, key=lambda node: -node[1])[:width]
  found.sort(key=lambda node: -node[1])
  return dict(found[: drafter.num_nodes - 1])


def beams(score, drafter):
  """Beam search, then every prefix of the beams once."""
  width, beams, seen = drafter.tree.width, [((), 0.0)], {}
  for _ in range(drafter.longest - 1):
    beams = [c for path, x in beams for c in children(score, path, x, width)]
    beams = sorted(beams, key=lambda node: -node[1])[:width]
    seen |= dict(beams)
  prefixes = {path[:n] for path, _ in beams for n in range(1, 1 + len(path))}
  return {path: seen[path] for path in prefixes}


def fixed(score, drafter):
  """Ranks along a given list of paths."""
  nodes = {(): ((), 0.0)}
  for ranks in drafter.tree.paths:
    path, total = nodes[ranks[:-1]]
    below = children(score, path, total, 1 + ranks[-1])
    nodes[ranks] = below[-1]
  return dict(list(nodes.values())[1:])


def product(score, drafter):
  """Heads that do not see what was drafted: the best of all combinations."""
  level, found = [((), 0.0)], []
  for _ in range(drafter.longest - 1):
    level = [
      ((*path, int(t)), total + x)
      for path, total in level
      for t, x in enumerate(log_softmax(score(path)))
    ]
    found += level
  found.sort(key=lambda node: -node[1])
  return dict(found[: drafter.num_nodes - 1])


READINGS = {
  "streams, corrected": (streams, by_level),
  "medusa": (medusa, product),
  "hydra": (hydra, by_level),
  "hydra, paths": (hydra, fixed),
  "redrafter": (redrafter, beams),
  "redrafter, chain": (redrafter, fixed),
  "draft_model": (draft_model, by_level),
  "eagle": (eagle, by_level),
  "eagle, fused": (eagle, fixed),
}


def drafted(tree, row):
  """{path: log-probability} of the living nodes below the root."""
  tokens, parents, log_prob = (
    np.asarray(x[row]) for x in (tree.tokens, tree.parents, tree.log_prob)
  )
  paths = {}
  for i in range(1, len(tokens)):
    if tokens[i] >= 0:
      nodes = reference.path_to(parents, i)[1:]
      paths[tuple(int(tokens[n]) for n in nodes)] = float(log_prob[i])
  return paths


@pytest.mark.parametrize("name", in_short(READINGS, SHORT))
def test_drafts_are_those_of_the_paper(x64, name):
  reading, search = READINGS[name]
  model, own = make(CASES[name], 3)
  decoder = Decoder(model, CASES[name].drafter, own)
  values = {
    k: np.asarray(v, np.float64)
    for k, v in weights_lib.to_weights(model).items()
  }
  prompts = [[3, 1, 4, 1, 5], [2]]
  state = decoder.start(prompts, max_new_tokens=12)
  for _ in range(3):
    for row, prompt in enumerate(prompts):
      count = int(state.num_tokens[row])
      emitted = np.asarray(state.tokens[row, :count]).tolist()
      before, root = [*prompt, *emitted[:-1]], emitted[-1]
      score = reading(model.config, values, own, before, root)
      want, got = search(score, decoder.drafter), drafted(state.tree, row)
      assert want.keys() == got.keys()
      np.testing.assert_allclose(
        [got[path] for path in want], list(want.values()), atol=1e-9
      )
    state = decoder.step(state)


# -- methods without weights -------------------------------------------------


def lookup(tokens, ngram, chains, ahead):
  """Saxena's search with lists: longest n-gram, then the most recent."""
  found = []
  for start in range(1, len(tokens)):
    n = 0
    while n < min(ngram, start) and tokens[start - 1 - n] == tokens[-1 - n]:
      n += 1
    if n:
      found.append((n, start))
  found.sort(reverse=True)
  return [tokens[s : s + ahead] for _, s in found[:chains]]


@pytest.mark.parametrize("seed", range(6))
def test_prompt_lookup(seed):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 30, 5)
  rows = [rng.integers(0, 3, n).tolist() for n in lengths]
  padded = np.full((5, 32), 7)
  for row, tokens in zip(padded, rows):
    row[: len(tokens)] = tokens
  got = prompt_lookup.lookup(padded, lengths, 3, 4, 5)
  for row, tokens in zip(np.asarray(got), rows):
    want = lookup(tokens, 3, 4, 5)
    assert [[t for t in chain if t >= 0] for chain in row][: len(want)] == want
    assert (row[len(want) :] == -1).all()


def test_lookahead(x64):
  """The window and the pool with lists, as the paper tells it: row l of the
  window is an older iterate; what is drawn after the last row joins it."""
  model, _ = make(CASES["lookahead"], 11)
  decoder = Decoder(model, CASES["lookahead"].drafter)
  values = reference.numpy_weights(model)
  width, rows = decoder.drafter.tree.width, decoder.drafter.length
  chains = decoder.drafter.chains
  reading, prompt = reference.Reading(model.config, values), [3, 1, 4, 1, 5]
  state = decoder.start([prompt], max_new_tokens=14)
  window = np.asarray(state.drafter.guesses[0]).tolist()
  pool = []
  for _ in range(6):
    count = int(state.num_tokens[0])
    emitted = np.asarray(state.tokens[0, :count]).tolist()
    context, grams = [*prompt, *emitted], []
    for j in range(width):
      column = [window[l][j] for l in range(rows)]
      seen = [*context, *window[0][:j], *column]
      logits = reading.logits(hidden_of(model.config, values, seen)[-1])
      grams.append((*column, int(np.argmax(logits))))
    pool = [gram for gram in pool if gram not in grams]
    pool += [g for i, g in enumerate(grams) if g not in grams[i + 1 :]]
    state = decoder.step(state)
    moved = int(state.num_tokens[0]) - count
    root = int(state.tokens[0, count + moved - 1])
    window = [[gram[l] for gram in grams] for l in range(1, rows + 1)]
    window = [row[moved - 1 :] + row[: moved - 1] for row in window]
    assert np.asarray(state.drafter.guesses[0]).tolist() == window
    want = [gram[1:] for gram in pool[::-1] if gram[0] == root][:chains]
    first = 1 + width * rows
    found = np.asarray(state.tree.tokens[0, first:]).reshape(chains, rows)
    assert [tuple(x) for x in found.tolist()[: len(want)]] == want
    assert (found[len(want) :] == -1).all()
