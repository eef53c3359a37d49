"""Sizes of prompts, outputs and caches: few, so that requests share programs.

A step reads all slots of the cache. So where much may be generated, the cache
begins with few of them and is doubled as it fills, by a program for each size.
"""

import operator

from spec_stream.errors import UserError

SMALLEST = 256  # slots that a cache is made with at once, if it may need them


def round_up(length: int) -> int:
  """16, 32, 64, ...: the next power of two."""
  return max(16, 1 << (length - 1).bit_length())


def bucket(length: int, max_positions: int) -> int:
  """That a length is rounded up to; no length is above max_positions."""
  return min(round_up(length), max_positions)


def whole(prompt: int, new: int) -> int:
  """Slots of the longest output; new: tokens and a draft."""
  return -(-(prompt + new) // 16) * 16


def first(least: int, most: int) -> int:
  """Slots to begin with: a power of two or 1.5 times one, or all."""
  if least >= most:
    return least
  least = max(least, SMALLEST)
  size = round_up(least)
  if 3 * size >= 4 * least:
    size = 3 * size // 4
  return _or_all(size, most)


def larger(slots: int, most: int) -> int:
  """The size after `slots`, which stay if they are all."""
  return max(slots, _or_all(2 * slots, most))


def _or_all(slots: int, most: int) -> int:
  """No program more for a last quarter."""
  return slots if 4 * slots <= 3 * most else most


def check(slots: int, max_positions: int, longest: int) -> int:
  """Slots that a user asked for, rounded up.

  longest: nodes of a draft's longest path. Raises: UserError if they are more
  than a model of max_positions needs, or no number of slots.
  """
  most = whole(2 * round_up(max_positions), longest)
  try:
    wrong = not 0 <= operator.index(slots) <= most
  except TypeError:
    wrong = True
  if wrong:
    raise UserError(
      f"slots={slots} must be a whole number from 0 to {most}, what prompts "
      f"and outputs of model.max_positions={max_positions} need"
    )
  return whole(slots, 0)
