"""The manifest of a checkpoint: what it must hold, kept within it.

For each weight its shape, its dtype and a digest of its bits; of the whole the
model's settings and the hash of the tokenizer. Numbers on disk have no checksum
of their own: a flipped bit in a compressed block may be read as other numbers.

A digest is a sum of the bits, each word times an odd number of its place,
modulo 2**32. It changes with any one word, and is the same on whatever devices
and in whatever order it is computed.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from spec_stream import json_text
from spec_stream.errors import UserError


@jax.jit
def _digest(x: jax.Array) -> jax.Array:
  if x.dtype in (jnp.int4, jnp.bool_):  # without bits of their own to look at
    x = x.astype(jnp.int8)
  words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
  at = jnp.zeros(words.shape, jnp.uint32)
  for axis, length in enumerate(words.shape):
    place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    at = at * jnp.uint32(length) + place
  # Knuth's multiplier spreads neighbouring places over all odd numbers.
  odd = (at * jnp.uint32(2654435761)) | jnp.uint32(1)
  return jnp.sum(words.astype(jnp.uint32) * odd, dtype=jnp.uint32)


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """By path."""
  # One by one: on a mesh of CPU devices, programs with collectives that are in
  # flight together wait for one another's threads, and none of them ends.
  return {path: int(_digest(x)) for path, x in arrays.items()}


def shapes(arrays: Mapping[str, jax.Array]) -> dict[str, list]:
  """[shape, dtype] by path, as json gives it back; arrays may be abstract."""
  return {path: [list(x.shape), str(x.dtype)] for path, x in arrays.items()}


def leaves(tree) -> dict[str, jax.Array]:
  """The arrays of an optimizer's tree, by number: they have no paths."""
  return {str(i): x for i, x in enumerate(jax.tree.leaves(tree))}


def parse(text: str) -> dict:
  """Raises: ValueError unless it is one: an object, its groups objects too."""
  found = json_text.parse(text)
  groups = ("weights", "digests", "optimizer", "model")
  if not isinstance(found, dict) or not all(
    isinstance(found.get(name), dict | None) for name in groups
  ):
    raise ValueError("it must hold an object of objects")
  for path, x in (found.get("weights") or {}).items():
    if not (isinstance(x, list) and len(x) == 2 and isinstance(x[0], list)):
      raise ValueError(f"{path!r:.60} has no shape and type")
  return found


def check_shapes(manifest: Mapping, target: Mapping, where: str):
  """Raises: UserError if it is of other weights than `target`, by path."""
  kept, wanted = manifest.get("weights"), shapes(target)
  if kept is None or kept == wanted:
    return
  paths = sorted(p for p in {*kept, *wanted} if kept.get(p) != wanted.get(p))
  tell = lambda x: "none" if x is None else f"{x[1]}{x[0]}"
  raise UserError(
    f"{where} is of another model than its config.json: {len(paths)} weights "
    f"differ, such as {paths[0]}, saved {tell(kept.get(paths[0]))}, expected "
    f"{tell(wanted.get(paths[0]))}"
  )


ADVICE = (
  "remove it to fall back on an earlier one, or train again in a new --workdir"
)


def check_digests(
  kept: Mapping | None,
  arrays: Mapping,
  where: str,
  advice: str = ADVICE,
  group: str = "",
):
  """Raises: UserError if numbers are not those that were saved.

  kept: what `digests` gave; None for checkpoints from before there were any.
  group: what stands before paths in words.
  """
  if kept is None:
    return
  now = digests(arrays)
  wrong = sorted(path for path in now if kept.get(path) != now[path])
  if wrong:
    raise UserError(
      f"{where} is damaged: the numbers of {len(wrong)} arrays, such as "
      f"{group}{wrong[0]}, are not those that were saved; {advice}"
    )


def check_model(manifest: Mapping, model: Mapping, where: str):
  """Raises: UserError if settings of the model, as `to_dict` has them, have
  changed since. Those that only one of the two has are another version's."""
  before, now = _flat(manifest.get("model") or {}), _flat(model)
  changed = sorted(n for n in {*before} & {*now} if before[n] != now[n])
  if changed:
    name = changed[0]
    raise UserError(
      f"{where} is of another model than its config.json: {name} was "
      f"{before[name]!r:.40}, and there it is {now[name]!r:.40}"
    )


def _flat(group: Mapping, at: str = "model") -> dict:
  found = {}
  for name, value in group.items():
    if isinstance(value, Mapping):
      found |= _flat(value, f"{at}.{name}")
    else:
      found[f"{at}.{name}"] = value
  return found


def check_tokenizer(manifest: Mapping, tokenizer, where: str):
  """Raises: UserError unless it is the tokenizer that the run trained with."""
  kept = manifest.get("tokenizer")
  if kept and kept != tokenizer.hash():
    raise UserError(
      f"the tokenizer is not the one that {where} was trained with: put that "
      "one back"
    )
