"""Plain readings of the core, to compare with: NumPy, loops, no batch.

The last part is no reading but a yardstick: one forward pass over whole
sequences, as in training, compiled once per config and shared by the tests.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_stream import weights as weights_lib
from spec_stream.models.transformer import causal_mask
from spec_stream.models.transformer import forward as model_forward

# -- trees: lists of tokens, parents and depths; node 0 is the root ----------


def ancestors(parents):
  """For each node the set of nodes on its path, itself included."""
  sets = []
  for i, parent in enumerate(parents):
    sets.append({i} | (sets[parent] if parent >= 0 else set()))
  return sets


def path_to(parents, node):
  """Nodes from the root to `node`."""
  path = [node]
  while parents[path[0]] >= 0:
    path.insert(0, parents[path[0]])
  return path


def random_tree(rng, size, longest, vocab, dead=0.0):
  """-> tokens, parents, depth. Siblings differ; some nodes may be dead."""
  tokens, parents, depth = [int(rng.integers(vocab))], [-1], [0]
  while len(tokens) < size:
    parent = int(rng.integers(len(tokens)))
    siblings = {t for t, p in zip(tokens, parents) if p == parent}
    token = int(rng.integers(vocab))
    if depth[parent] + 1 >= longest or token in siblings:
      continue
    tokens.append(-1 if rng.random() < dead else token)
    parents.append(parent)
    depth.append(depth[parent] + 1)
  return tokens, parents, depth


def best_first(log_probs, tokens, num_nodes):
  """The best nodes of the whole product, by building all of it.

  log_probs, tokens: [J][C]. -> [(token, parent, depth, score)], root first,
  with token None. Ties as documented in `tree.best_first`.
  """
  num_streams, width = np.shape(log_probs)
  level = [((), 0.0)]  # (ranks, score), in order of ranks
  nodes = []
  for g in range(num_streams):
    level = [
      ((*ranks, c), score + log_probs[g][c] if ranks else log_probs[g][c])
      for ranks, score in level
      for c in range(width)
    ]
    nodes += level
  nodes.sort(key=lambda node: -node[1])  # stable: the shallower first
  nodes = [((), 0.0), *nodes[: num_nodes - 1]]
  index = {ranks: i for i, (ranks, _) in enumerate(nodes)}
  return [
    (
      tokens[len(ranks) - 1][ranks[-1]] if ranks else None,
      index[ranks[:-1]] if ranks else -1,  # KeyError if the set is not closed
      len(ranks),
      score,
    )
    for ranks, score in nodes
  ]


def fixed_tree(log_probs, tokens, paths):
  """The same form for a fixed list of paths, each after its parent."""
  index = {(): 0} | {tuple(path): i for i, path in enumerate(paths, 1)}
  return [(None, -1, 0, 0.0)] + [
    (
      tokens[len(path) - 1][path[-1]],
      index[tuple(path[:-1])],
      len(path),
      sum(log_probs[g][rank] for g, rank in enumerate(path)),
    )
    for path in paths
  ]


def candidates(logits, width):
  """log-probabilities and tokens [J][width] of logits [J, V], best first."""
  log_probs = log_softmax(np.asarray(logits))
  order = np.argsort(-log_probs, -1, kind="stable")[:, :width]
  return np.take_along_axis(log_probs, order, -1).tolist(), order.tolist()


def build(spec, logits):
  """Nodes of the tree of a resolved TreeSpec; the whole of `TreeSpec.build`."""
  log_probs, tokens = candidates(logits, spec.width)
  if spec.kind == "best_first":
    return best_first(log_probs, tokens, spec.num_nodes)
  return fixed_tree(log_probs, tokens, spec.paths)


def accept(tokens, parents, draws):
  """Walks from the root to the child that was drawn, while there is one."""
  path = [0]
  while True:
    here = path[-1]
    below = [
      i for i, p in enumerate(parents) if p == here and tokens[i] == draws[here]
    ]
    if not below:
      return path
    path.append(below[0])


def prune(tokens, parents, logits, threshold):
  """Probability of the path to each node; 0 where the node is dropped."""
  probs = np.exp(log_softmax(np.asarray(logits, np.float64)))
  path = []
  for token, parent in zip(tokens, parents):
    if parent < 0:
      path.append(1.0)
      continue
    step = probs[parent, token] if token >= 0 else 0.0
    path.append(path[parent] * step if step >= threshold else 0.0)
  return np.array(path)


# -- sampling ----------------------------------------------------------------


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def penalize(logits, seen, penalty):
  """One row [V]; seen: the tokens of prompt and output."""
  out = np.array(logits, np.float64)
  for token in set(seen):
    x = out[token]
    out[token] = x / penalty if x > 0 else x * penalty
  return out


def filter_logits(logits, top_k, top_p, min_p=0.0):
  """One distribution [V]: what top-k, top-p, min-p exclude is -inf."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  order = order[: top_k or None]
  probs = np.exp([logits[i] - logits[order[0]] for i in order])
  probs /= probs.sum()
  kept, mass = [], 0.0
  for token, prob in zip(order, probs):
    if kept and top_p < 1 and mass >= top_p:
      break
    kept.append(token)
    mass += prob
  first = logits[order[0]]
  kept = [i for i in kept if np.exp(logits[i] - first) >= min_p]
  return np.array(
    [x if i in kept else -np.inf for i, x in enumerate(logits)], np.float64
  )


# -- the model, one row at a time (paper eq. 1-3, 9) -------------------------


class Reading:
  """Hidden states of one sequence; see `forward`."""

  def __init__(self, config, weights):
    self.config = config
    self.weights = {k: np.asarray(v, np.float64) for k, v in weights.items()}

  def linear(self, name, x, outputs, stream):
    x = x.reshape(-1)
    y = x @ self.weights[f"{name}/kernel"].reshape(x.size, -1)
    streams = self.config.streams
    if f"{name}/lora_a" in self.weights and (
      stream or streams.mode == "shared"
    ):
      a = self.weights[f"{name}/lora_a"].reshape(x.size, -1)
      b = self.weights[f"{name}/lora_b"].reshape(a.shape[1], -1)
      y = y + streams.lora_alpha / streams.lora_rank * (x @ a @ b)
    return y.reshape(outputs)

  def norm(self, name, x):
    mean = np.mean(x**2) + self.config.norm_eps
    return x / np.sqrt(mean) * self.weights[f"{name}/scale"]

  def logits(self, x):
    if self.config.tie_embeddings:
      return self.weights["embed/table"] @ x
    return x @ self.weights["head/kernel"]

  def early_logits(self, x):
    x = x + x @ self.weights["pruner/a"] @ self.weights["pruner/b"]
    return self.logits(self.norm("final_norm", x))

  def insert(self, x, j):
    """Stream j of a main row x."""
    if "streams/map_a" in self.weights:
      x = x + x @ self.weights["streams/map_a"] @ self.weights["streams/map_b"]
    if self.config.streams.stream_id == "embedding":
      x = x + self.weights["streams/embed"][j - 1]
    return x

  def block(self, layer, rows, position, sees):
    """rows: {(t, j): [D]}, j = 0 for main; sees(row) -> rows."""
    c, name = self.config, f"blocks/{layer}"
    half = c.head_dim // 2
    frequency = c.rope_theta ** (-np.arange(half) / half)
    turn = lambda x, angle: (lambda z: np.concatenate([z.real, z.imag], -1))(
      (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    )
    q, k, v = {}, {}, {}
    for row, x in rows.items():
      shape = (c.num_kv_heads, c.groups + 2, c.head_dim)
      x = self.norm(f"{name}/attention_norm", x)
      qkv = self.linear(f"{name}/attention/qkv", x, shape, row[1] > 0)
      angle = position(row) * frequency
      q[row] = turn(qkv[:, :-2], angle)
      k[row] = turn(qkv[:, -2], angle)
      v[row] = qkv[:, -1]
      if c.streams.stream_id == "rotation":
        v[row] = turn(v[row], c.streams.rotation_eps * row[1])
    out = {}
    for row, x in rows.items():
      keys = sees(row)
      y = np.zeros((c.num_kv_heads, c.groups, c.head_dim))
      for head, group in itertools.product(*map(range, y.shape[:2])):
        scores = [q[row][head, group] @ k[key][head] for key in keys]
        weight = np.exp(log_softmax(np.array(scores) / c.head_dim**0.5))
        y[head, group] = sum(w * v[key][head] for w, key in zip(weight, keys))
      stream = row[1] > 0
      x = x + self.linear(f"{name}/attention/out", y, c.width, stream)
      y = self.norm(f"{name}/ffw_norm", x)
      y = self.linear(f"{name}/ffw/gate_up", y, (2, c.ffw_dim), stream)
      y = y[0] / (1 + np.exp(-y[0])) * y[1]
      out[row] = x + self.linear(f"{name}/ffw/down", y, c.width, stream)
    return out


def forward(config, weights, tokens, positions, above, carriers, num_streams):
  """-> ({(t, j): final-normed hidden}, {t: hidden at the insertion layer}).

  tokens, positions: [T]; above[t]: the positions that t may attend to, itself
  included; carriers: which positions carry streams.
  """
  model, streams = Reading(config, weights), config.streams
  rows = {
    (t, 0): model.weights["embed/table"][token]
    for t, token in enumerate(tokens)
  }
  early = {}

  def position(row):
    ahead = row[1] if streams.stream_position == "future" else 0
    return positions[row[0]] + ahead

  def sees(row):
    t, j = row
    main = [(u, 0) for u in above[t]]
    if j:
      return main + [(t, i) for i in range(1, j + 1)]
    attends = streams.mode == "shared" and streams.main_attends_streams
    return main + [(t, i) for i in range(1, num_streams + 1)] * (
      attends and (t, 1) in rows
    )

  for layer in range(config.num_layers):
    if layer == config.num_layers - streams.num_stream_layers:
      early = {t: x for (t, _), x in rows.items()}
      rows |= {
        (t, j): model.insert(early[t], j)
        for t in carriers
        for j in range(1, num_streams + 1)
      }
    rows = model.block(layer, rows, position, sees)
  return {row: model.norm("final_norm", x) for row, x in rows.items()}, early


# -- one forward pass over whole sequences, as in training -------------------

ROWS, LENGTH = 32, 32  # one static shape


@functools.partial(jax.jit, static_argnames="graphdef")
def _sequences(graphdef, state, tokens, lengths, first):
  model = nnx.merge(graphdef, state)
  order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  inside = order < lengths[:, None]
  at = jnp.where(inside & (order >= first[:, None]), order, -1)
  out = model_forward(
    model, tokens, order, causal_mask(inside.astype(jnp.int32)), streams=at
  )
  flat = out.streams.reshape(tokens.shape[0], -1, out.streams.shape[-1])
  streams = model.logits(flat).reshape(*out.streams.shape[:3], -1)
  return model.logits(out.main), streams, out.kv


def sequences(model, rows, first):
  """Logits of main [T, V] and streams [T, J, V] of each row, and all kv.

  rows: at most 32 lists of at most 32 tokens; first: per row, from which
  position on streams are attached.
  """
  tokens = np.zeros((ROWS, LENGTH), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  rest = [1] * (ROWS - len(rows))
  lengths = np.array([len(row) for row in rows] + rest, np.int32)
  first = np.array([*first, *rest], np.int32)
  main, streams, kv = _sequences(*nnx.split(model), tokens, lengths, first)
  return np.asarray(main), np.asarray(streams), kv


def numpy_weights(model):
  return {k: np.asarray(v) for k, v in weights_lib.to_weights(model).items()}
