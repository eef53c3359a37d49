"""Flags that all decoding launchers share, and what they stand for."""

import dataclasses

from absl import flags

from common import UserError
from spec_stream import json_text
from spec_stream.drafters import registry
from spec_stream.rules import RULES

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run, as launch/train.py wrote it."
)
TREE = flags.DEFINE_string(
  "tree",
  "best_first",
  "Shape of the drafts: best_first, beam (redrafter's), cartesian (every node "
  "has --tree_width children), chain, FILE.json with a list of paths such as "
  "[[0], [1], [0, 0]] (ranks among a stream's candidates), or auto: the size "
  "that is fastest on this device, by a model of costs that is measured once "
  "and kept in --workdir; no draft where none pays.",
)
TREE_WIDTH = flags.DEFINE_integer(
  "tree_width",
  0,
  "Candidates per stream or node, and beams. 0: 3 for cartesian, all that can "
  "matter for best_first, the root of --tree_nodes for trees that grow level "
  "by level.",
)
DRAFT_LENGTH = flags.DEFINE_integer(
  "draft_length",
  0,
  "Tokens to draft ahead; 0: as many as there are streams or heads, or what "
  "the drafter does by itself.",
)
KEPT_NODES = flags.DEFINE_integer(
  "kept_nodes",
  0,
  "Nodes that the early-exit pruner lets into the top layers; 0: all.",
)
PRUNE_THRESHOLD = flags.DEFINE_float(
  "prune_threshold",
  0.0,
  "Prune a child that the early exit finds less probable than this after its "
  "parent; 0: none.",
)
ACCEPT = flags.DEFINE_enum(
  "accept",
  "exact",
  RULES,
  "What of a draft is accepted. exact: the tokens that plain decoding draws "
  "under the same seed. rejection: drafts are drawn at random and the output "
  "is distributed as that of plain decoding (streams; chains, if --tree names "
  "no other fixed shape). "
  "typical: NOT lossless, what the target finds likely enough.",
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Most tokens to decode for a prompt."
)


def define_checkpoint():
  """Flags of launchers that also decode a Hugging Face directory; -> a function
  that reads them: what `requests.load` is to be told beside the workdir.

  It takes alone=True where --workdir is no place for results, and so only one
  of the two can be meant.
  """
  checkpoint = flags.DEFINE_string(
    "checkpoint", "", "A Hugging Face directory, in place of a run."
  )
  dtype = flags.DEFINE_string(
    "dtype", "", "With --checkpoint: float32 or bfloat16; empty: its own."
  )
  max_positions = flags.DEFINE_integer(
    "max_positions",
    0,
    "With --checkpoint: most tokens of a prompt and its answer; 0: its own.",
  )

  def read(alone: bool = False) -> dict:
    if alone and bool(WORKDIR.value) == bool(checkpoint.value):
      many = "not both" if checkpoint.value else "here is neither"
      raise UserError(
        f"--workdir is needed, or --checkpoint in its place: {many}"
      )
    if not checkpoint.value and (dtype.value or max_positions.value):
      raise UserError("--dtype and --max_positions go with --checkpoint=DIR")
    return {
      "checkpoint": checkpoint.value,
      "dtype": dtype.value,
      "max_positions": max_positions.value,
    }

  return read


def load_run(source: dict):
  """The run of --workdir, or the checkpoint that `source` names as a run."""
  from spec_stream import checkpoints

  rest = {name: x for name, x in source.items() if name != "checkpoint"}
  if source["checkpoint"]:
    return checkpoints.load_checkpoint(source["checkpoint"], **rest)
  return checkpoints.load_run(WORKDIR.value)


def define_sampling():
  """Flags of launchers that may sample; -> a function that reads them."""
  temperature = flags.DEFINE_float(
    "temperature", 0.0, "Sampling temperature; 0: greedy."
  )
  top_k = flags.DEFINE_integer(
    "top_k", 0, "Sample among the k most probable tokens; 0: all."
  )
  top_p = flags.DEFINE_float(
    "top_p", 1.0, "Sample among the most probable tokens that reach p; 1: all."
  )
  min_p = flags.DEFINE_float(
    "min_p",
    0.0,
    "Sample among the tokens at least so probable, relative to the most "
    "probable one; 0: all.",
  )
  penalty = flags.DEFINE_float(
    "repetition_penalty",
    1.0,
    "Makes tokens of prompt and output less probable, above 1; 1: none.",
  )
  seed = flags.DEFINE_integer("seed", 0, "Seed of the sampling noise.")
  return lambda: {
    "temperature": temperature.value,
    "top_k": top_k.value,
    "top_p": top_p.value,
    "min_p": min_p.value,
    "repetition_penalty": penalty.value,
    "seed": seed.value,
  }


DRAFTERS_HELP = (
  f"{', '.join(registry.DRAFTERS)}; one with weights of another run as "
  "NAME=DIR, or as NAME if they lie in WORKDIR/drafters/NAME."
)


def split(drafter: str) -> tuple[str, str]:
  """NAME or NAME=DIR -> (name, directory); refuses an unknown name."""
  name, _, directory = drafter.partition("=")
  registry.get(name)
  return name, directory


def own(drafter: str, run, workdir: str) -> tuple:
  """-> (the drafter's own weights, if they are not those of the run; where they
  are from)."""
  from spec_stream import rivals

  name, directory = split(drafter)
  found = rivals.load_all({name: directory}, run, workdir)
  return found.get(name, (None, ""))


def make(drafter: str, tree_nodes: int = 0):
  """The drafter of the flags; it is checked against a model when used."""
  from spec_stream.models.prune import Prune
  from spec_stream.tree import TreeSpec

  name, _ = split(drafter)
  kind, paths = TREE.value, ()
  if kind.endswith(".json"):
    kind, paths = "paths", _read_paths(kind)
  if name == "redrafter" and (
    kind == "auto" or not flags.FLAGS["tree"].present
  ):
    kind = "beam"
  elif kind == "auto":  # of the sizes beside the automatic one
    kind = "best_first"
  if ACCEPT.value == "rejection" and not flags.FLAGS["tree"].present:
    kind = "chain"
  drafter = registry.get(name).of(
    TreeSpec(kind, tree_nodes, TREE_WIDTH.value, paths),
    DRAFT_LENGTH.value,
    Prune(KEPT_NODES.value, PRUNE_THRESHOLD.value),
  )
  if name == "none":
    return drafter
  return dataclasses.replace(drafter, rule=ACCEPT.value)


def make_all(drafters: list[str], tree_nodes: list[str]) -> tuple[list, dict]:
  """A drafter for each of the names and numbers of nodes, plain ones left out;
  and {name: directory, "" where none was given}.

  tree_nodes: as --tree_nodes has them; none stands for the shape's own.
  """
  asked = {}
  for name, directory in map(split, drafters):
    if name != "none" and asked.setdefault(name, directory) != directory:
      raise UserError(f"--drafters names {name} twice: once for each table")
  try:
    nodes = [int(n) for n in tree_nodes]
  except ValueError:
    raise UserError(
      f"--tree_nodes={','.join(tree_nodes)}: must be whole numbers such as "
      "4,8,16"
    ) from None
  nodes = list(dict.fromkeys(nodes)) or [0]
  if drafters:  # or those of the run, which is not read yet
    _check_used(asked)
  return [make(name, n) for name in asked for n in nodes], asked


def is_automatic() -> bool:
  """Whether --tree=auto. Raises: UserError for flags that it leaves no room."""
  if TREE.value != "auto":
    return False
  for flag in ("tree_width", "draft_length", "kept_nodes", "prune_threshold"):
    if flags.FLAGS[flag].present:
      raise UserError(f"--tree=auto chooses the tree: leave --{flag} out")
  return True


def automatic(run, directory: str, drafters: dict, settings):
  """-> (the model of costs, what it predicts to be the fastest drafter).

  Args:
    run: the target.
    directory: where the model of costs is kept.
    drafters: {name: (own weights or None, where they are from)}.
    settings: `bench.Settings` of what is to be decoded.
  """
  from spec_stream import auto
  from spec_stream.drafters.none import NoDraft
  from spec_stream.progress import Progress

  costs, known = auto.of_run(
    run, directory, drafters, settings, ACCEPT.value, Progress
  )
  return costs, costs.best(known, NoDraft().resolve(run.model.config))


def _check_used(names):
  """Refuses flags that none of the drafters heeds."""
  chains = {"prompt_lookup", "lookahead", "none"}
  for flag, heeded in (
    ("kept_nodes", {"streams"}),
    ("prune_threshold", {"streams"}),
    ("tree_width", set(registry.DRAFTERS) - chains),
    ("accept", set(registry.DRAFTERS) - {"none"}),
  ):
    if flags.FLAGS[flag].present and not heeded & set(names):
      raise UserError(
        f"--{flag} is not for {', '.join(names) or 'plain decoding'}: leave it "
        "out"
      )


def _read_paths(file: str):
  from spec_stream.tree import check_paths

  try:
    with open(file, encoding="utf-8") as stream:
      paths = json_text.parse(stream.read())
  except FileNotFoundError as e:
    raise UserError(f"--tree={file}: no such file") from e
  except ValueError as e:
    raise UserError(f"--tree={file}: not JSON ({e})") from e
  if not isinstance(paths, list) or not all(isinstance(p, list) for p in paths):
    raise UserError(
      f"--tree={file}: must hold a list of paths such as [[0], [1], [0, 0]]"
    )
  return check_paths(paths)
