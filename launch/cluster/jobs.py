"""What the launchers of this folder share: what is run, and where.

Each of them takes a command of launch/ as one flag, looks at all that can be
wrong before it asks a cluster for anything, prints what it would run, and runs
it with --execute.
"""

import dataclasses
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from absl import flags

import common
from common import UserError

COMMAND = flags.DEFINE_string(
  "command",
  None,
  "What each host runs, such as 'launch/train.py --config=configs/e2e_nlg.py "
  "--workdir=/data/runs/e2e --config.data.data_dir=/data/tfds'.",
)
NAME = flags.DEFINE_string(
  "name", None, "Of the job: small letters, digits and hyphens."
)
EXECUTE = flags.DEFINE_bool("execute", False, "Run it, rather than print it.")
flags.mark_flags_as_required(["command", "name"])

MOUNT = "/data"  # where a bucket is seen
CHIPS_PER_HOST = 4  # of slices with several hosts, in all generations here


@dataclasses.dataclass(frozen=True)
class Generation:
  """A kind of TPU, as the clouds' tools name it.

  topologies: that can be asked for. single_host: those of one host. gke: label
  of the node pools. vm: prefix of the accelerator type, whose number counts
  `per_chip` for each chip. runtime: software of the VMs.
  """

  topologies: tuple[str, ...]
  gke: str
  vm: str
  per_chip: int
  runtime: str
  single_host: tuple[str, ...] = ("1x1", "2x2")


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
GENERATIONS = {
  "v4": Generation(
    _CUBES, "tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base", ("2x2x1",)
  ),
  "v5e": Generation(
    _FLAT, "tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite"
  ),
  "v5p": Generation(
    _CUBES, "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", ("2x2x1",)
  ),
  "v6e": Generation(_FLAT, "tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice: its generation and topology, such as v5e and 4x4."""

  kind: str
  topology: str

  @property
  def generation(self) -> Generation:
    return GENERATIONS[self.kind]

  @property
  def chips(self) -> int:
    chips = 1
    for size in self.topology.split("x"):
      chips *= int(size)
    return chips

  @property
  def hosts(self) -> int:
    if self.topology in self.generation.single_host:
      return 1
    return self.chips // CHIPS_PER_HOST

  @property
  def accelerator_type(self) -> str:
    """As gcloud names it: v5litepod-16."""
    of = self.generation
    return f"{of.vm}-{self.chips * of.per_chip}"


def parse_slice(text: str) -> Slice:
  """'v5e:4x4' -> a Slice. Raises: UserError."""
  kind, _, topology = text.partition(":")
  if kind not in GENERATIONS or not topology:
    raise UserError(
      f"--topology={text}: use KIND:TOPOLOGY such as v5e:4x4, KIND one of "
      f"{', '.join(GENERATIONS)}"
    )
  known = GENERATIONS[kind].topologies
  if topology not in known:
    raise UserError(
      f"--topology={text}: {kind} has no such slice; it has {', '.join(known)}"
    )
  return Slice(kind, topology)


def check_name(name: str):
  """Raises: UserError unless Kubernetes and gcloud take it."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
    raise UserError(
      f"--name={name}: use at most 40 small letters, digits and hyphens, the "
      "first a letter and the last no hyphen"
    )


def check_bucket(bucket: str):
  """-> the name alone. Raises: UserError unless it can be one of a bucket."""
  if not bucket:
    raise UserError(
      "--bucket is needed: all hosts write one --workdir; give the name of a "
      f"Cloud Storage bucket, which they see as {MOUNT}"
    )
  name = bucket.removeprefix("gs://")
  if "/" in name or not re.fullmatch(
    r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name
  ):
    raise UserError(f"--bucket={bucket}: give the name alone, such as my-runs")
  return name


def parse_command(
  text: str, devices: int, processes: int, mounted: bool
) -> list[str]:
  """The command as words, checked as far as can be done from here.

  Args:
    text: of --command.
    devices: that it will see, over all hosts.
    processes: that run it together, of which launch/train.py alone knows.
    mounted: whether its --workdir must lie in the bucket.

  Raises: UserError, among others where the mesh is not of so many devices.
  """
  try:
    words = shlex.split(text)
  except ValueError as e:
    raise UserError(f"--command: {e}") from e
  script = pathlib.Path(words[0] if words else "")
  if script.parts[:1] != ("launch",) or not (common.ROOT / script).is_file():
    raise UserError(
      f"--command={text:.60}: must begin with a command of this project, such "
      "as launch/train.py"
    )
  if processes > 1 and script.name != "train.py":
    raise UserError(
      f"--command: {processes} processes would run {script}, which is for one: "
      "ask for one GPU, or a slice of one host"
    )
  options = dict(_options(words[1:]))
  workdir = options.get("workdir", "")
  if not workdir:
    raise UserError(f"--command: {script} needs --workdir=DIR")
  if mounted and not workdir.startswith(f"{MOUNT}/"):
    raise UserError(
      f"--command: --workdir={workdir} would be lost with the hosts; the "
      f"bucket is {MOUNT}: use --workdir={MOUNT}/..."
    )
  if script.name in ("train.py", "sweep.py"):
    _check_mesh(options, devices)
  return words


def _options(words):
  for word in words:
    name, _, value = word.lstrip("-").partition("=")
    yield name, value


def _check_mesh(options: dict[str, str], devices: int):
  """Raises: UserError unless the mesh of the config has so many devices, and
  the batch can be split over it."""
  path, _, argument = options.get("config", "").partition(":")
  file = common.ROOT / path
  if not (path and file.is_file()):
    raise UserError(f"--command: --config={path}: no such file")
  spec = importlib.util.spec_from_file_location("config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([argument] if argument else []))
  counts = [f"mesh.{axis}" for axis in config.mesh]
  counts += ["data.batch_size", "train.accumulate"]
  for name, value in options.items():
    key = name.removeprefix("config.")
    if key in counts and not re.fullmatch(r"-?\d+", value):
      raise UserError(f"--command: --{name}={value}: must be a whole number")
    if key in counts:
      config.update_from_flattened_dict({key: int(value)})
    elif name.startswith("config.mesh."):
      raise UserError(
        f"--command: --{name}: the axes are {', '.join(config.mesh)}"
      )
  import jax

  from spec_stream import sharding

  sizes = sharding.sizes(**config.mesh, devices=devices)
  mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
  sharding.check_batch(mesh, config.data.batch_size, config.train.accumulate)


def run(what: str, command: list[str], text: str):
  """Prints `text`, or with --execute gives it to a command's standard input.

  Raises: UserError if the command is missing or fails.
  """
  if not EXECUTE.value:
    print(text, end="")
    print(f"# {what}: the same with --execute", file=sys.stderr)
    return
  try:
    subprocess.run(command, input=text, text=True, check=True)
  except FileNotFoundError as e:
    raise UserError(
      f"{command[0]} is not installed here; without --execute the {what} is "
      "printed"
    ) from e
  except subprocess.CalledProcessError as e:
    raise UserError(
      f"{shlex.join(command)} failed with exit code {e.returncode}"
    ) from e
