"""Weights and the state of training on disk: the one place that knows orbax.

    <workdir>/checkpoints/<step>/ weights, optimizer, data (the iterator), meta
    <workdir>/base/               weights that training does not move, if any
    <workdir>/base.json           their digests

`meta` is a manifest (see `manifest`), which must be that of the run that is
loaded and of the numbers that are read. A checkpoint is
written beside its final name and renamed when complete, so a kill never leaves
half of one. Weights are a flat dict by path (see `weights`).
"""

import contextlib
import functools
import json
import logging
import pathlib
import shutil
import sys
import traceback
import warnings

import jax
import orbax.checkpoint as ocp

from spec_stream import manifest
from spec_stream.errors import UserError, short
from spec_stream.weights import Weights

_QUIET = ("orbax", "absl", "jax", "array_record", "grain")
# Of what is under way when a read fails, see `_silence`.
_READERS = ("orbax", "OCDBT", "TensorStore")
_NEVER_AWAITED = (
  "coroutine '(_read_array_index_and_device_put|_read_and_create_array|"
  "async_deserialize|_read_shard)' was never awaited"
)


def _directory(workdir) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / "checkpoints"


def steps(workdir) -> list[int]:
  """Steps of the complete checkpoints, ascending."""
  directory = _directory(workdir)
  if not directory.is_dir():
    return []
  return sorted(
    int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit()
  )


class Saver:
  """Saves in the background and keeps the last `keep` checkpoints.

  with Saver(workdir, keep=2) as saver:
    saver.save(step, weights, opt_state, iterator)

  tokenizer, model: its hash, and the settings of `to_dict`, for the manifest.
  """

  def __init__(self, workdir, keep: int, tokenizer: str = "", model=None):
    _silence()
    self._about = {"tokenizer": tokenizer, "model": model}
    self._directory = _directory(workdir)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def save(self, step: int, weights: Weights, opt_state, iterator):
    """iterator: the grain iterator as it stands after the batch of `step`."""
    import grain

    self._manager.save(
      step,
      args=ocp.args.Composite(
        weights=ocp.args.StandardSave(weights),
        optimizer=ocp.args.StandardSave(opt_state),
        data=grain.checkpoint.CheckpointSave(iterator),
        meta=ocp.args.JsonSave(
          {
            "step": step,
            **self._about,
            "weights": manifest.shapes(weights),
            "digests": manifest.digests(weights),
            "optimizer": manifest.digests(manifest.leaves(opt_state)),
          }
        ),
      ),
    )

  def restore(self, step: int, weights: Weights, opt_state, iterator):
    """-> (weights, opt_state) like those given, placed as they are.

    The iterator is set in place: all processes saved the same, so any number of
    them reads it. Raises: UserError if it cannot be read.
    """
    with _readable(self._directory / str(step)):
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          weights=ocp.args.StandardRestore(_abstract(weights)),
          optimizer=ocp.args.StandardRestore(_abstract(opt_state)),
          meta=ocp.args.JsonRestore(),
        ),
      )
      data = self._directory / str(step) / "data"
      found = next(data.glob("process_0-of-*.json"))
      iterator.set_state(json.loads(found.read_text()))
      kept = manifest.parse(json.dumps(restored.meta))
    where = str(self._directory / str(step))
    opt_state = manifest.leaves(restored.optimizer)
    manifest.check_digests(kept.get("digests"), restored.weights, where)
    manifest.check_digests(
      kept.get("optimizer"), opt_state, where, group="optimizer/"
    )
    return restored.weights, restored.optimizer

  def wait(self):
    """Returns when what was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def read_manifest(workdir, step: int) -> dict:
  """What `meta` says; nothing where there is none, as in older checkpoints.

  Raises: UserError if it is damaged.
  """
  path = _directory(workdir) / str(step) / "meta" / "metadata"
  if not path.is_file():
    return {}
  with _readable(path.parent.parent):
    return manifest.parse(path.read_text())


def read_weights(workdir, step: int, target: dict) -> Weights:
  """The weights of a checkpoint, by path.

  target: abstract weights with their shardings, of all that it must hold.
  Raises: UserError if it is damaged or of another model.
  """
  kept = read_manifest(workdir, step)
  directory = _directory(workdir) / str(step)
  manifest.check_shapes(kept, target, str(directory))
  _silence()
  with _readable(directory), ocp.StandardCheckpointer() as reader:
    found = reader.restore(directory / "weights", target)
  manifest.check_digests(kept.get("digests"), found, str(directory))
  return found


def _base(workdir) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / "base"


def write_base(workdir, frozen: Weights):
  """Keeps what training does not move, once, beside the checkpoints."""
  digests = _base(workdir).with_suffix(".json")
  digests.unlink(missing_ok=True)
  if not frozen:  # nor may that of an abandoned run stay
    shutil.rmtree(_base(workdir), ignore_errors=True)
    return
  _silence()
  with ocp.StandardCheckpointer() as writer:
    writer.save(_base(workdir), frozen, force=True)
  found = manifest.digests(frozen)
  if jax.process_index() == 0:
    digests.write_text(json.dumps(found) + "\n")


def read_base(workdir, target: dict) -> Weights:
  """What `write_base` kept; nothing if it kept nothing.

  target: abstract weights by path with their shardings, among them these.
  """
  if not _base(workdir).is_dir():
    return {}
  _silence()
  names = _names(_base(workdir))
  with _readable(_base(workdir)), ocp.StandardCheckpointer() as reader:
    found = reader.restore(_base(workdir), {p: target[p] for p in names})
  advice = "copy it from where the run was whole, or train again"
  kept, where = _base_digests(workdir), str(_base(workdir))
  manifest.check_digests(kept, found, where, advice)
  return found


def _base_digests(workdir) -> dict | None:
  path = _base(workdir).with_suffix(".json")
  if not path.is_file():  # of an earlier version
    return None
  try:
    return manifest.parse(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path} is damaged ({e}): remove it, and the weights of "
      f"{_base(workdir)} are read unchecked"
    ) from e


def _names(directory: pathlib.Path) -> list[str]:
  """Paths of the weights in a directory of orbax."""
  with _readable(directory), ocp.StandardCheckpointer() as reader:
    return list(reader.metadata(directory).item_metadata)


def _abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


@contextlib.contextmanager
def _readable(directory: pathlib.Path):
  """Whatever orbax or tensorstore raises becomes one line with the path."""
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    raise UserError(
      f"the checkpoint {directory} cannot be read ({short(e)}); remove it to "
      "fall back on an earlier one, or train again in a new --workdir"
    ) from e


def _silence():
  """Libraries tell much, and a failed read more.

  Orbax closes the event loop of a read when one of its arrays cannot be read.
  The other reads end later, in threads of their own, and would print one
  traceback each beside the one line that says what was wrong.
  """
  for name in _QUIET:
    logging.getLogger(name).setLevel(logging.ERROR)
  logging.getLogger("asyncio").addFilter(_is_news)
  warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
  hook = sys.unraisablehook
  if getattr(hook, "func", None) is not _unraisable:
    sys.unraisablehook = functools.partial(_unraisable, hook)


def _is_news(record: logging.LogRecord) -> bool:
  text = record.getMessage()
  if "exception was never retrieved" not in text:
    return True
  through = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
  reader = any(map(_is_of_orbax, (frame.filename for frame in through)))
  return not (reader or any(word in text for word in _READERS))


def _is_of_orbax(filename: str) -> bool:
  return "orbax" in pathlib.Path(filename).parts


def _unraisable(otherwise, caught):
  if caught.object is None and str(caught.exc_value) == "Event loop is closed":
    return
  code = getattr(caught.object, "cr_code", None)  # a coroutine never ended
  if code and _is_of_orbax(code.co_filename):
    return
  otherwise(caught)
