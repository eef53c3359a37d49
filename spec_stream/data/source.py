"""Builders by name, and their examples as plain strings."""

import contextlib
import functools
import hashlib
import io
import os

from spec_stream.errors import UserError

NAMES = ("restaurants", "e2e_nlg")


def pairs_info(builder):
  """The features that all data sets here share: prompt and completion."""
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  return tfds.core.DatasetInfo(
    builder=builder,
    description=builder.__doc__,
    features=tfds.features.FeaturesDict({"prompt": text, "completion": text}),
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

  from spec_stream.data import e2e_nlg, restaurants

  tfds.display_progress_bar(False)
  settings = dict(data_dir=data_dir, file_format="array_record")
  if name == "restaurants":
    if manual_dir:
      raise UserError("data.manual_dir: 'restaurants' is generated, reads none")
    made = restaurants.Restaurants(**settings)
  elif manual_dir:
    files = e2e_nlg.find_files(os.path.abspath(os.path.expanduser(manual_dir)))
    settings["data_dir"] = os.path.join(data_dir, "manual", _fingerprint(files))
    made = e2e_nlg.E2eNlg(files=files, **settings)
  else:
    made = e2e_nlg.E2eNlg(**settings)
  if not os.path.exists(made.data_dir):
    print(f"preparing {name} in {made.data_dir}", flush=True)
  # TFDS writes beside the final folder and renames: a failure leaves nothing
  # that a later run would take for whole. What it prints is for notebooks.
  with contextlib.redirect_stdout(io.StringIO()):
    made.download_and_prepare()
  return made


@functools.lru_cache(maxsize=8)
def examples(
  name: str, data_dir: str, manual_dir: str, split: str
) -> tuple[tuple[str, str], ...]:
  """(prompt, completion) of a split, in the builder's order."""
  source = builder(name, data_dir, manual_dir).as_data_source(split)
  text = lambda x: x.decode() if isinstance(x, bytes) else str(x)
  return tuple(
    (text(row["prompt"]), text(row["completion"]))
    for row in (source[i] for i in range(len(source)))
  )


def _fingerprint(files: dict[str, str]) -> str:
  digest = hashlib.sha256()
  for split in sorted(files):
    with open(files[split], "rb") as file:
      digest.update(file.read())
  return digest.hexdigest()[:16]
