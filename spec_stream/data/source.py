"""Builders by name, and their examples as plain strings."""

import contextlib
import functools
import hashlib
import importlib
import io
import os

from spec_stream.errors import UserError

# Name -> module and class of its builder, which names the files it reads
# (`builder.PairsBuilder`). A new data set is a line here, one in
# `formats`, and one in `evaluate.SCORERS`.
BUILDERS = {
  "restaurants": ("restaurants", "Restaurants"),
  "e2e_nlg": ("e2e_nlg", "E2eNlg"),
  "dialogsum": ("dialogsum", "Dialogsum"),
  "sql_create_context": ("sql_create_context", "SqlCreateContext"),
  "conversations": ("conversations", "Conversations"),
  "text_corpus": ("text_corpus", "TextCorpus"),
}
NAMES = tuple(BUILDERS)


def pairs_info(builder):
  """The features that all data sets here share: prompt and completion."""
  import tensorflow_datasets as tfds

  features = {n: tfds.features.Text() for n in ("prompt", "completion")}
  return tfds.core.DatasetInfo(
    builder=builder,
    description=builder.__doc__,
    features=tfds.features.FeaturesDict(features),
  )


def builder(name: str, data_dir: str, manual_dir: str = ""):
  """A prepared TFDS builder.

  Prepared data lies in data_dir. What came from a manual_dir lies under a
  fingerprint of its files: other files never meet data prepared before.

  Raises:
    UserError: unknown name, manual_dir missing or malformed, no download.
  """
  if name not in NAMES:
    raise UserError(f"unknown data set '{name}': use {' or '.join(NAMES)}")
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(False)
  module, class_name = BUILDERS[name]
  module = importlib.import_module(f"spec_stream.data.{module}")
  kind = getattr(module, class_name)
  settings = dict(data_dir=data_dir, file_format="array_record")
  if manual_dir:
    if not hasattr(kind, "FILES"):
      raise UserError(f"data.manual_dir: '{name}' is generated, reads none")
    from spec_stream.data.builder import find_files

    directory = os.path.abspath(os.path.expanduser(manual_dir))
    settings["files"] = files = find_files(kind, directory)
    settings["data_dir"] = os.path.join(data_dir, "manual", _fingerprint(files))
  elif hasattr(kind, "FILES") and not kind.URLS:
    raise UserError(
      f"'{name}' is read from files at hand: name their directory with "
      "--config.data.manual_dir=DIR"
    )
  made = kind(**settings)
  if not os.path.exists(made.data_dir):
    print(f"preparing {name} in {made.data_dir}", flush=True)
  # TFDS writes beside the final folder and renames: a failure leaves nothing
  # that a later run would take for whole. What it prints is for notebooks.
  with contextlib.redirect_stdout(io.StringIO()):
    try:
      made.download_and_prepare()
    except OSError:
      if not os.path.exists(made.data_dir):
        raise
      made = kind(**settings)  # another process was first
  return made


@functools.lru_cache(maxsize=8)
def examples(
  name: str, data_dir: str, manual_dir: str, split: str
) -> tuple[tuple[str, str], ...]:
  """(prompt, completion) of a split, in the builder's order.

  Raises:
    UserError: see `builder`; or the data set has no such split.
  """
  made = builder(name, data_dir, manual_dir)
  if split not in made.info.splits:
    raise UserError(
      f"'{name}' has no split '{split}', only {', '.join(made.info.splits)}"
    )
  source = made.as_data_source(split)
  return tuple(
    (text(row["prompt"]), text(row["completion"]))
    for row in (source[i] for i in range(len(source)))
  )


def text(value) -> str:
  """A text feature, which a data source may give as bytes."""
  return value.decode() if isinstance(value, bytes) else str(value)


def _fingerprint(files: dict[str, str]) -> str:
  digest = hashlib.sha256()
  for split in sorted(files):
    with open(files[split], "rb") as file:
      digest.update(file.read())
  # One file that is split here is other data than the same bytes for a split.
  if len(files) == 1:
    digest.update(next(iter(files)).encode())
  return digest.hexdigest()[:16]
