"""Continuous batching inside the compiled loop: rows that are done go on with
the next request.

A batch of B rows serves N requests. As soon as a row is done, its output is
put away, the next prompt is prefilled and takes the row's place: cache, tree,
drafter's state, noise and limits. Shapes are static, nothing leaves the device
between the first call and the last, and no row waits for the longest of its
batch. A request gives what it gives alone.

Letters: B row, N request, P prompt bucket, A longest path.
"""

import flax.struct
import jax
import jax.numpy as jnp

from spec_stream.drafters.base import Drafter, Params
from spec_stream.sampling import Sampling
from spec_stream.step import DecodeState, prefill, step


@flax.struct.dataclass
class Requests:
  prompt: jax.Array  # [N, P] int32
  length: jax.Array  # [N] tokens of each prompt
  limit: jax.Array  # [N] most tokens to emit
  end_token: jax.Array  # [E], of all
  stop: jax.Array | None  # [S, V], of all
  sampling: Sampling  # of [N] requests

  def take(self, at: jax.Array) -> tuple:
    """What `prefill` is to be told of the requests `at` [n]."""
    pick = lambda x: x[at]
    return (
      self.prompt[at],
      self.length[at],
      self.limit[at],
      self.end_token,
      self.stop,
      jax.tree.map(pick, self.sampling),
    )


@flax.struct.dataclass
class Served:
  """Outputs are as those of a DecodeState of N rows."""

  state: DecodeState  # of the B rows
  request: jax.Array  # [B] which one each row serves; N for none
  following: jax.Array  # the next to be served
  passes: jax.Array  # calls of the target by the loop; prefills are not
  # One row more than there are requests, for rows that serve none.
  tokens: jax.Array  # [N + 1, ...]
  calls: jax.Array
  num_tokens: jax.Array
  accepts: jax.Array
  broken: jax.Array


def serve(
  params: Params,
  drafter: Drafter,
  requests: Requests,
  batch: int,
  slots: int,
  num_new: int,
) -> Served:
  """Serves all requests with `batch` rows, at most as many as there are."""
  count = len(requests.length)
  first = jnp.arange(batch)
  start = lambda at: prefill(
    params, drafter, *requests.take(at), slots=slots, num_new=num_new
  )
  state = start(first)
  like = lambda x: jnp.zeros((count + 1, *x.shape[1:]), x.dtype)
  served = Served(
    state=state,
    request=first,
    following=jnp.int32(batch),
    passes=jnp.int32(0),
    tokens=like(state.tokens),
    calls=like(state.calls),
    num_tokens=like(state.num_tokens),
    accepts=like(state.accepts),
    broken=like(state.broken),
  )

  def refill(served: Served) -> Served:
    row = jnp.argmax(served.request == count)
    state = _put(served.state, row, start(served.following[None]))
    return served.replace(
      state=state,
      request=served.request.at[row].set(served.following),
      following=served.following + 1,
    )

  def turn(served: Served) -> Served:
    served = _put_away(served, count)
    served = jax.lax.while_loop(
      lambda s: (s.request == count).any() & (s.following < count),
      refill,
      served,
    )
    state = step(params, drafter, served.state)
    return served.replace(state=state, passes=served.passes + 1)

  more = lambda s: (~s.state.done).any() | (s.following < count)
  return _put_away(jax.lax.while_loop(more, turn, served), count)


def _put_away(served: Served, count: int) -> Served:
  """The outputs of rows that are done, which then serve none."""
  state = served.state
  at = jnp.where(state.done, served.request, count)
  put = lambda old, new: old.at[at].set(new)
  return served.replace(
    request=jnp.where(state.done, count, served.request),
    tokens=put(served.tokens, state.tokens),
    calls=put(served.calls, state.calls),
    num_tokens=put(served.num_tokens, state.num_tokens),
    accepts=put(served.accepts, state.accepts),
    broken=put(served.broken, state.broken),
  )


def _put(state: DecodeState, row: jax.Array, one: DecodeState) -> DecodeState:
  """The state with `one`, of one row, in the place of a row."""
  alone = lambda x: x.replace(end_token=None, stop=None)  # those of all rows
  put = lambda old, new: jax.lax.dynamic_update_index_in_dim(
    old, new[0], row, 0
  )
  return jax.tree.map(put, alone(state), alone(one)).replace(
    end_token=state.end_token, stop=state.stop
  )
