"""A row for each program: does it fit a chip, and what does a step cost?"""

import dataclasses
import math
import re

import jax
from jax.sharding import Mesh

from spec_stream import ahead, hlo, roofline, sharding
from spec_stream.data.pipeline import DataConfig
from spec_stream.drafters.none import NoDraft
from spec_stream.drafters.streams import StreamDraft
from spec_stream.errors import UserError
from spec_stream.models.config import ModelConfig
from spec_stream.text_table import table
from spec_stream.train import start
from spec_stream.train.config import TrainConfig
from spec_stream.tree import TreeSpec

_LLAMA = dict(head_dim=128, tie_embeddings=False, norm_eps=1e-5)
# Of the published config.json files.
SHAPES = {
  "llama2_7b": dict(
    **_LLAMA,
    vocab_size=32000,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    ffw_dim=11008,
    max_positions=4096,
  ),
  "llama3_8b": dict(
    **_LLAMA,
    vocab_size=128256,
    width=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffw_dim=14336,
    max_positions=8192,
    rope_theta=500000.0,
  ),
  "llama2_70b": dict(
    **_LLAMA,
    vocab_size=32000,
    width=8192,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    ffw_dim=28672,
    max_positions=4096,
  ),
}


def chip(topology: str) -> roofline.Chip:
  """Of 'v5e:4x4', a v5e. Raises: UserError."""
  kind, _, rest = topology.partition(":")
  if kind not in roofline.CHIPS or not re.fullmatch(r"\d+(x\d+)+", rest):
    raise UserError(
      f"--topology={topology}: use KIND:TOPOLOGY such as v5e:4x4, KIND one of "
      f"{', '.join(roofline.CHIPS)}"
    )
  return roofline.CHIPS[kind]


def mesh(topology: str, sizes: dict) -> Mesh:
  """Of all chips of the slice. Raises: UserError."""
  return ahead.make_mesh(f"tpu:{topology}", tuple(sizes.values()))


def configure(
  given: dict, shape: str = ""
) -> tuple[ModelConfig, DataConfig, TrainConfig]:
  """As `train.start.configure`, with the base of a published shape.

  Raises: UserError.
  """
  if shape and shape not in SHAPES:
    raise UserError(f"--shape={shape}: use one of {', '.join(SHAPES)}")
  if shape:  # of a base that is named, and not read
    given["model"]["checkpoint"] = ""
    given["train"]["init_from"] = given["train"]["init_from"] or "BASE"
  model, data, train = start.configure(given)
  if shape:
    kinds = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    model = dataclasses.replace(model, **SHAPES[shape], **kinds)
  return model, data, train


def with_streams(model: ModelConfig, count: int) -> ModelConfig:
  streams = dataclasses.replace(model.streams, num_streams=count)
  return dataclasses.replace(model, streams=streams)


def training(
  model: ModelConfig,
  data: DataConfig,
  train: TrainConfig,
  place: Mesh,
  of: roofline.Chip,
) -> dict:
  """A row for the training step of configs as given."""
  sharding.check_batch(place, data.batch_size, train.accumulate)
  places = data.stream_positions or data.seq_len
  sizes = (data.batch_size, data.seq_len, places)
  about = {
    "program": f"train {data.batch_size} x {data.seq_len}",
    "num_streams": model.streams.num_streams,
  }
  rows = data.batch_size // (place.shape["data"] * place.shape["fsdp"])
  names = dict(zip(("rows", "seq_len", "stream_positions"), sizes))
  try:
    step, _, _, flops = ahead.train_step(model, train, place, **names)
  except Exception as e:
    return about | _too_large(e, of, _train_advice(train, rows, model))
  row = about | _account(step, flops, place, of)
  if not row["fits"]:
    row["advice"] = _advice(row, of, _train_advice(train, rows, model))
  return row


def decoding(
  model: ModelConfig,
  place: Mesh,
  of: roofline.Chip,
  batch: int,
  slots: int,
  nodes: int,
) -> dict:
  """A row for one step of the decoding loop."""
  drafter = NoDraft()
  if model.streams.num_streams:
    drafter = StreamDraft(TreeSpec("best_first", nodes))
  else:
    nodes = 1
  about = {
    "program": f"decode {batch} x {slots}, {nodes} nodes",
    "num_streams": model.streams.num_streams,
  }
  advice = "raise mesh.tensor, or lower --slots or --batch"
  try:
    made = ahead.decoding(
      model, drafter, place, slots=slots, prompt=slots // 2, batch=batch
    )
  except Exception as e:
    return about | _too_large(e, of, advice)
  _, loop, _, state, flops = made
  row = about | _account(loop, flops, place, of, layer_bytes(state))
  if not row["fits"]:
    row["advice"] = _advice(row, of, advice)
  return row


def _account(
  compiled, flops: int, place: Mesh, of: roofline.Chip, cached: int = 0
) -> dict:
  """What a step takes of a chip; cached: of a decoding loop, whose step is one
  turn, bytes of a layer's keys or values."""
  memory = ahead.memory(compiled)
  row = {
    "fits": memory["total"] <= of.memory,
    "memory": memory,
    "chip_memory": of.memory,
    "flops": flops / place.size,
  }
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as error:  # libtpu may be newer than jaxlib
    return row | {"unread": " ".join(str(error).split())[:200]}
  program = hlo.Program(text)
  step = program.loop() if cached else program.entry
  traffic = program.traffic(step)
  cost = roofline.Cost(row["flops"], traffic, of)
  if cached:
    row["cache_copies"] = len(program.copies(step, cached))
  return row | {
    "bytes": traffic.bytes,
    "collectives": {k: [n, size] for k, n, size in traffic.collectives},
    "compiler_cycles": traffic.cycles,
    "host_transfers": len(hlo.host_transfers(text)),
    "parts_ms": {name: 1e3 * x for name, x in cost.parts.items()},
    "roofline_ms": 1e3 * cost.seconds,
    "bound": cost.bound,
  }


def layer_bytes(state) -> int:
  """Of a layer's keys or values on one chip."""
  return min(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(state.cache.layers)
  )


def _train_advice(train: TrainConfig, rows: int, model: ModelConfig) -> str:
  """The settings that would free memory, those that cost nothing first."""
  ways = []
  if not train.remat:
    ways.append("train.remat=True")
  if not train.remat_logits:
    ways.append("train.remat_logits=True")
  if not train.segment:
    ways.append("train.segment=128")
  if rows > 1:
    ways.append(f"train.accumulate={rows} (there are {rows} rows a chip)")
  ways.append("a larger mesh.fsdp or mesh.tensor")
  if train.trainable != "all" and not model.quantize:
    ways.append("model.quantize=int8")
  return "set " + ", or ".join(ways)


def _advice(row: dict, of: roofline.Chip, ways: str) -> str:
  memory = row["memory"]
  held, more = memory["arguments"] / 1e9, memory["temporaries"] / 1e9
  if memory["arguments"] > of.memory:
    ways = "its arguments alone do: raise mesh.fsdp or mesh.tensor"
  return (
    f"{row['program']}, J={row['num_streams']}: {memory['total'] / 1e9:.1f} GB "
    f"a chip of {of.memory / 1e9:.1f} ({held:.1f} of weights and state, "
    f"{more:.1f} of temporaries); {ways}"
  )


# How the TPU compiler says so.
_SIZE = r"([\d.]+[KMGT]?)"
_USED = (
  re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
  re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)


def _too_large(error: Exception, of: roofline.Chip, ways: str) -> dict:
  """A row for a program that the compiler refused for its size.

  Raises: the error, if it was of another kind.
  """
  text = " ".join(str(error).split())
  found = next(filter(None, (form.search(text) for form in _USED)), None)
  if "RESOURCE_EXHAUSTED" not in text or not found:
    raise error
  used, limit = found.groups()
  return {
    "fits": False,
    "used": used,
    "chip_memory": of.memory,
    "advice": f"the compiler used {used} of {limit} a chip; {ways}",
  }


def render(rows: list[dict]) -> str:
  """A line for each program; ratios are to the first row of its program."""
  base = {}
  for row in rows:  # by what is compiled, whatever the tree
    base.setdefault(row["program"].split()[0], row)
  columns = {name: [] for name in _COLUMNS}
  for row in rows:
    first = base[row["program"].split()[0]]
    for name, cell in _COLUMNS.items():
      columns[name].append(cell(row, first))
  return table(columns, ("program", "bound by"))


def _number(name: str, scale: float, form: str):
  return lambda row, _: form.format(row[name] / scale) if name in row else "-"


def _memory(name: str):
  return lambda row, _: (
    f"{row['memory'][name] / 1e9:.2f}" if "memory" in row else "-"
  )


def _ratio(name: str):
  def cell(row, first):
    known = row.get(name) is not None and first.get(name)
    return f"{row[name] / first[name]:.2f}" if known else "-"

  return cell


def _total(row, _):
  return f"{row['memory']['total'] / 1e9:.2f}" if "memory" in row else "> all"


def _moved(row, _):
  if "collectives" not in row:
    return "-"
  count = sum(n for n, _ in row["collectives"].values())
  size = sum(b for _, b in row["collectives"].values())
  return f"{count}, {size / 1e6:.0f} MB" if count else "none"


_COLUMNS = {
  "program": lambda row, _: row["program"],
  "J": lambda row, _: str(row["num_streams"]),
  "held GB": _memory("arguments"),
  "temp GB": _memory("temporaries"),
  "chip GB": _total,
  "of": lambda row, _: f"{row['chip_memory'] / 1e9:.1f}",
  "fits": lambda row, _: "yes" if row["fits"] else "NO",
  "GFLOP": _number("flops", 1e9, "{:,.1f}"),
  "ratio": _ratio("flops"),
  "bytes GB": _number("bytes", 1e9, "{:.2f}"),
  "ratio ": _ratio("bytes"),
  "collectives": _moved,
  "host, cache copies": lambda row, _: (
    f"{row['host_transfers']}, {row['cache_copies']}"
    if "cache_copies" in row
    else "-"
  ),
  "roofline ms": _number("roofline_ms", 1, "{:.2f}"),
  "bound by": lambda row, _: row.get("bound", "-"),
}
