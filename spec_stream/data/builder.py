"""What the builders that read files share: finding, splitting, downloading."""

import abc
import collections
import fnmatch
import hashlib
import os
from collections.abc import Iterator

import tensorflow_datasets as tfds

from spec_stream.data.source import pairs_info
from spec_stream.errors import UserError

SPLITS = ("train", "validation", "test")
# In place of a split: a file that holds all of them.
WHOLE = "whole"


def jsonl(split: str) -> tuple[str, str]:
  """The names that a split has in each data set in its plain form."""
  return f"{split}.jsonl.gz", f"{split}.jsonl"


class PairsBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
  """A data set of (prompt, completion) pairs out of text files.

  FILES: split -> names it may have in a manual_dir, the original one first.
  WHOLE_FILES: patterns of one file with all splits; what falls where follows
    from a hash of each pair's group: 2% validation, 2% test.
  URLS: split (or WHOLE) -> address of the original file; empty: manual only.

  files: paths found by `find_files`, of a release at hand; without, downloads.
  """

  VERSION = tfds.core.Version("1.0.0")
  FILES: dict[str, tuple[str, ...]] = {}
  WHOLE_FILES: tuple[str, ...] = ()
  URLS: dict[str, str] = {}

  def __init__(self, *, files: dict[str, str] | None = None, **settings):
    self._files = files
    super().__init__(**settings)

  @abc.abstractmethod
  def pairs(self, path: str, name: str) -> Iterator[tuple[str, str, str]]:
    """(group, prompt, completion) of one file; a bad row is a UserError.

    Pairs of a group go to one split. name: see `rows.read`.
    """

  def _info(self):
    return pairs_info(self)

  def _split_generators(self, dl_manager):
    paths, names = self._files, collections.defaultdict(str)
    if not paths:
      names = {s: os.path.basename(url) for s, url in self.URLS.items()}
      try:
        paths = dl_manager.download(self.URLS)
      except Exception as e:  # TFDS raises what its HTTP library raises
        raise UserError(
          f"cannot download {self.name} ({type(e).__name__}): put its files "
          "into a directory and name it with --config.data.manual_dir=DIR"
        ) from e
    if WHOLE in paths:
      path, name = os.fspath(paths[WHOLE]), names[WHOLE]
      return {s: self._generate_examples(path, name, s) for s in SPLITS}
    return {
      split: self._generate_examples(os.fspath(path), names[split])
      for split, path in paths.items()
    }

  def _generate_examples(self, path: str, name: str, split: str = ""):
    count = 0
    for group, prompt, completion in self.pairs(path, name):
      if split in ("", split_of(group)):
        yield count, {"prompt": prompt, "completion": completion}
        count += 1
    if not count:
      part = f" that falls into the {split} split: give a file for each split"
      raise UserError(f"{name or path} holds no example{part if split else ''}")


def split_of(group: str) -> str:
  """The split of a group, the same everywhere: 2% validation, 2% test."""
  digest = hashlib.sha256(group.encode()).digest()
  percent = int.from_bytes(digest[:8]) % 100
  return "validation" if percent < 2 else "test" if percent < 4 else "train"


def find_files(made: type[PairsBuilder], directory: str) -> dict[str, str]:
  """Path of each split, or of the WHOLE, in a manual_dir, or a UserError."""
  if not os.path.isdir(directory):
    raise UserError(f"data.manual_dir: no directory {directory}")
  is_file = lambda name: os.path.isfile(os.path.join(directory, name))
  there = sorted(filter(is_file, os.listdir(directory)))
  chosen, missing = {}, ""
  for split, names in made.FILES.items():
    chosen[split] = next((name for name in names if name in there), None)
    if chosen[split] is None:
      missing = missing or f"none of {', '.join(names)}"
  if missing:
    patterns = made.WHOLE_FILES
    whole = {x for pattern in patterns for x in fnmatch.filter(there, pattern)}
    if len(whole) != 1:
      alone = f", and not one file {' or '.join(patterns)}" if patterns else ""
      raise UserError(f"data.manual_dir: {directory} has {missing}{alone}")
    chosen = {WHOLE: whole.pop()}
  return {s: os.path.join(directory, name) for s, name in chosen.items()}
