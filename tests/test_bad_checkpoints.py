"""Checkpoints, data files and settings that are wrong: one line, no traceback.

A small Llama is written by hand, then broken in one way at a time. Each case
goes through the launcher that would meet it, in one process for each launcher,
or through the library where a launcher adds nothing.
"""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
import safetensors.numpy
from test_launch import call_all, one_line

from spec_stream import checkpoints, evaluate, storage
from spec_stream.data import chat_prompts, pipeline
from spec_stream.data.tokenizer import Tokenizer
from spec_stream.errors import UserError
from spec_stream.hf import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
WEIGHTS = "model.safetensors"
TOKENIZER = Tokenizer.train(["red green blue"] * 3, 280)
CONFIG = dict(
  model_type="llama",
  vocab_size=280,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=1,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-6,
  rope_theta=10000.0,
  bos_token_id=1,
  eos_token_id=3,
)


def tensors() -> dict[str, np.ndarray]:
  layer = "model.layers.0."
  shapes = {
    "model.embed_tokens.weight": (280, 16),
    layer + "input_layernorm.weight": (16,),
    layer + "self_attn.q_proj.weight": (16, 16),
    layer + "self_attn.k_proj.weight": (8, 16),
    layer + "self_attn.v_proj.weight": (8, 16),
    layer + "self_attn.o_proj.weight": (16, 16),
    layer + "post_attention_layernorm.weight": (16,),
    layer + "mlp.gate_proj.weight": (24, 16),
    layer + "mlp.up_proj.weight": (24, 16),
    layer + "mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (280, 16),
  }
  rng = np.random.default_rng(0)
  return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def write(directory: pathlib.Path, values=None, **config) -> pathlib.Path:
  """A whole checkpoint; config: changed keys, None to leave one out."""
  directory.mkdir(parents=True)
  config = {k: v for k, v in (CONFIG | config).items() if v is not None}
  (directory / "config.json").write_text(json.dumps(config))
  values = tensors() if values is None else values
  safetensors.numpy.save_file(values, directory / WEIGHTS)
  TOKENIZER.save(str(directory / "tokenizer.json"))
  return directory


def header(change=lambda entries: None, size: int | None = None) -> bytes:
  """The file of weights with its header changed; size: what it claims."""
  data = safetensors.numpy.save(tensors())
  (length,) = struct.unpack("<Q", data[:8])
  entries = json.loads(data[8 : 8 + length])
  change(entries)
  text = json.dumps(entries).encode()
  claimed = len(text) if size is None else size
  return struct.pack("<Q", claimed) + text + data[8 + length :]


def absurd(**fields):
  return lambda entries: entries["model.norm.weight"].update(fields)


# -- checkpoints, through launch/generate.py ---------------------------------


def lost_shard(directory):
  (directory / checkpoint.INDEX).write_text(
    json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}})
  )


def put(name: str, content: str | bytes):
  data = content.encode() if isinstance(content, str) else content
  return lambda directory: (directory / name).write_bytes(data)


def changed(**config):
  return put("config.json", json.dumps(CONFIG | config))


def weights(change):
  """Other tensors in the file: change(tensors by name)."""

  def write_them(directory):
    values = tensors()
    change(values)
    safetensors.numpy.save_file(values, directory / WEIGHTS)

  return write_them


def without(name: str):
  return lambda directory: (directory / name).unlink()


HEAD, NORM = "lm_head.weight", "model.norm.weight"
BROKEN = {
  "holds no *.safetensors weights": without(WEIGHTS),
  "it has pytorch_model.bin: convert": lambda d: (d / WEIGHTS).rename(
    d / "pytorch_model.bin"
  ),
  "holds no config.json": without("config.json"),
  "config.json is not JSON": put("config.json", "{"),
  "names model-00002.safetensors, which is not in": lost_shard,
  "model_type 'mamba' is not implemented": changed(model_type="mamba"),
  "not implemented: clip_qkv=8": changed(clip_qkv=8),
  "rope_type='yarn' is not implemented": changed(
    rope_scaling={"rope_type": "yarn", "factor": 2.0}
  ),
  "rope_theta=0.0 must be above 0": changed(rope_theta=0),
  "hidden_size='16' must be a whole number": changed(hidden_size="16"),
  "describes no model": changed(num_attention_heads=0),
  "is no size of a model": changed(num_hidden_layers=10**30),
  f"lacks 1 tensor(s): {NORM}": weights(lambda values: values.pop(NORM)),
  "has, beyond its config.json, 1 tensor(s): model.extra": weights(
    lambda values: values.update({"model.extra": values[NORM]})
  ),
  f"{NORM} is 3, but config.json makes it 16": weights(
    lambda values: values.update({NORM: values[NORM][:3]})
  ),
  f"{NORM} is I32, not one of": weights(
    lambda values: values.update({NORM: values[NORM].astype(np.int32)})
  ),
  "it holds no tokenizer": without("tokenizer.json"),
  "not a tokenizer file": put("tokenizer.json", "{}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """ "good" checkpoints and those of BROKEN, b0, b1, ..."""
  folder = tmp_path_factory.mktemp("checkpoints")
  good = write(folder / "good")
  for i, change in enumerate(BROKEN.values()):
    shutil.copytree(good, folder / f"b{i}")
    change(folder / f"b{i}")
  large = {n: x[:264] if len(x) == 280 else x for n, x in tensors().items()}
  write(folder / "small", large, vocab_size=264)
  config = json.dumps({"chat_template": "{{ messages[0]['content'] }} !"})
  shutil.copytree(good, folder / "chat")
  (folder / "chat" / "tokenizer_config.json").write_text(config)
  question = {"question_id": 1, "category": "c", "turns": ["red", "blue"]}
  lines = [json.dumps(question | {"question_id": i}) for i in range(3)]
  lines[1] = lines[1].replace("red", "green")
  (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
  return folder


ASK = ["--prompt=red", "--max_new_tokens=4"]
JSON = ["--max_new_tokens=4", "--json"]
GENERATE = {
  "ids": ["--checkpoint=good", "--token_ids=5 17 30", *JSON],
  "ids, no tokenizer": [
    f"--checkpoint=b{list(BROKEN).index('it holds no tokenizer')}",
    "--token_ids=5 17 30",
    *JSON,
  ],
  "plain": ["--checkpoint=chat", "--prompt=red", *JSON],
  "written": ["--checkpoint=chat", "--prompt=red !", *JSON],
  "chat": ["--checkpoint=chat", "--prompt=red", "--chat", *JSON],
  "file": ["--checkpoint=good", "--prompts_file=questions.jsonl", *JSON],
  "green": ["--checkpoint=good", "--prompt=green", *JSON],
  "bfloat16": ["--checkpoint=good", "--dtype=bfloat16", *ASK],
}
MISTAKES = {
  "tokens, but the model has 264": ["--checkpoint=small", *ASK],
  "not both": ["--checkpoint=good", "--workdir=good", *ASK],
  "here is neither": ASK,
  "this model has no streams": [
    "--checkpoint=good", "--drafter=streams", *ASK
  ],
  "no streams: use": ["--checkpoint=good", "--tree_nodes=4", *ASK],
  "go with --checkpoint": ["--workdir=good", "--dtype=float32", *ASK],
  "no chat template; leave it out": ["--checkpoint=good", "--chat", *ASK],
  "--token_ids: --chat puts text": [
    "--checkpoint=good", "--chat", "--token_ids=5", *JSON
  ],
  "new ones do not fit the cache of 4 ": [
    "--checkpoint=good", "--max_positions=4", *ASK
  ],
  "model.dtype is 'half'": ["--checkpoint=good", "--dtype=half", *ASK],
  "nowhere: no such directory": ["--checkpoint=nowhere", *ASK],
}  # fmt: skip


@pytest.fixture(scope="module")
def generated(folder):
  broken = {says: [f"--checkpoint=b{i}", *ASK] for i, says in enumerate(BROKEN)}
  calls = GENERATE | MISTAKES | broken
  return call_all("generate", {k: (v, "") for k, v in calls.items()}, folder)


@pytest.mark.parametrize("says", [*BROKEN, *MISTAKES])
def test_a_broken_checkpoint_is_one_line(generated, says):
  one_line(generated[says], says)


def test_a_whole_checkpoint_decodes_without_streams(generated):
  (ids,), (bare,) = (
    generated[x].objects() for x in ("ids", "ids, no tokenizer")
  )
  assert bare == ids | {"text": None} and ids["text"] is not None
  assert ids["tokens_per_call"] == 1 and len(ids["token_ids"]) == 4
  assert "1.00 tokens per call" in generated["bfloat16"].out


def test_a_chat_template_goes_around_the_prompt(generated):
  chat, written, plain = (
    generated[x].objects() for x in ("chat", "written", "plain")
  )
  assert chat == written and chat != plain


def test_first_turns_of_questions_are_prompts(generated):
  answers = generated["file"].objects()
  assert len(answers) == 3 and answers[0] == answers[2]
  assert answers[1:2] == generated["green"].objects() != answers[:1]


# -- files of weights --------------------------------------------------------

WHOLE = safetensors.numpy.save(tensors())
TEXT = 8 + struct.unpack("<Q", WHOLE[:8])[0]  # where the numbers begin


@pytest.mark.parametrize(
  "data",
  [
    *(WHOLE[:n] for n in (0, 7, 8, 100, TEXT - 1, TEXT, TEXT + 9)),
    WHOLE[: len(WHOLE) // 2],
    WHOLE[:-1],
    WHOLE + b"more",
    header(size=2**63),
    header(size=10**9),
    header(absurd(shape=[2**40])),
    header(absurd(shape=[2**40, 2**40])),
    header(absurd(data_offsets=[0, 2**50])),
    header(absurd(shape=[-1])),
    header(absurd(dtype="Q7")),
    struct.pack("<Q", 4) + b"{{{{",
    struct.pack("<Q", 60_000) + b"[" * 60_000,
  ],
)
def test_damaged_weights_are_one_line(folder, tmp_path, data):
  directory = tmp_path / "c"
  shutil.copytree(folder / "good", directory)
  (directory / WEIGHTS).write_bytes(data)
  with pytest.raises(UserError, match="cannot be read .*copy it again") as e:
    checkpoints.load_checkpoint(directory)
  assert "\n" not in str(e.value) and WEIGHTS in str(e.value)


# -- benchmark ---------------------------------------------------------------

QUESTIONS = ["--questions=questions.jsonl", "--max_new_tokens=4"]
BENCHMARK = {
  "measured": ["--checkpoint=good", "--workdir=out", *QUESTIONS, "--turns=2"],
  "is a run of its own": ["--checkpoint=good", "--workdir=good", *QUESTIONS],
  "give --questions=FILE": ["--checkpoint=good", "--workdir=new"],
  "--workdir is needed": ["--checkpoint=good", *QUESTIONS],
  "is a file": ["--checkpoint=good", "--workdir=questions.jsonl", *QUESTIONS],
  "--turns=3 must be 1 or 2": [
    "--checkpoint=good", "--workdir=new", *QUESTIONS, "--turns=3"
  ],
  "--questions=no: no such file": [
    "--checkpoint=good", "--workdir=new", "--questions=no"
  ],
  "no chat template": [
    "--checkpoint=good", "--workdir=new", *QUESTIONS, "--chat"
  ],
  "this model has no streams": [
    "--checkpoint=good", "--workdir=new", *QUESTIONS, "--drafters=streams"
  ],
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmarked(folder):
  calls = {says: (args, "") for says, args in BENCHMARK.items()}
  done = call_all("benchmark", calls, folder)
  assert not (folder / "new").exists()  # a mistake leaves nothing behind
  return done


@pytest.mark.slow
def test_a_checkpoint_is_measured_on_questions(folder, benchmarked):
  assert benchmarked["measured"].code == 0, benchmarked["measured"]
  rows = (folder / "out" / "results.jsonl").read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  assert [row["method"] for row in rows] == ["none", "none (A against A)"]
  # Two of the three first turns are alike, and so are the second ones.
  assert {row["prompts"] for row in rows} == {4}
  assert {row["dataset"] for row in rows} == {"questions"}
  assert {(row["turns"], row["chat"]) for row in rows} == {(2, False)}


@pytest.mark.slow
@pytest.mark.parametrize("says", [x for x in BENCHMARK if x != "measured"])
def test_benchmark_refuses_in_one_line(benchmarked, says):
  one_line(benchmarked[says], says)


# -- training ----------------------------------------------------------------

BASE = f"--config={ROOT}/configs/restaurants.py"
TINY = [
  "width=16", "num_layers=1", "num_heads=2", "num_kv_heads=1", "head_dim=8",
  "ffw_dim=16", "streams.num_streams=1", "streams.num_stream_layers=1",
]  # fmt: skip
TINY = [BASE, *(f"--config.model.{x}" for x in TINY)]
TINY += [f"--config.data.{x}" for x in ("vocab_size=270", "batch_size=2")]
TINY += [f"--config.train.{x}" for x in ("steps=2", "log_every=1")]
TALKS = [
  *TINY,
  "--config.data.dataset=conversations",
  "--config.data.manual_dir=talks",
  "--config.data.data_dir=prepared",
]
LOSSLESS = [
  "--config.train.trainable=adapters",
  "--config.model.streams.mode=lossless",
  "--config.model.streams.lora_rank=2",
  "--config.model.streams.lora_layers=streams",
  "--config.train.init_from=base",
]
TRAIN = {
  "base": [*TALKS, "--workdir=base", "--config.train.objective=next_token"],
  "lossless": [*TALKS, "--workdir=lossless", *LOSSLESS],
  "give model.checkpoint or train.init_from, not both": [
    BASE, "--workdir=x", "--config.model.checkpoint=good",
    "--config.train.init_from=base",
  ],
  "train.segment=48 must divide data.seq_len=256": [
    *TALKS, "--workdir=x", "--config.train.segment=48"
  ],
  "holds no config.json": [
    BASE, "--workdir=x", "--config.model.checkpoint=talks"
  ],
  "talks/train.json, line 17: not JSON": [
    *TALKS[:-2], "--workdir=x", "--config.data.manual_dir=broken/talks",
    "--config.data.data_dir=prepared",
  ],
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(folder):
  for split in ("train", "validation", "test"):
    talks = [
      {
        "id": f"{split}{i}",
        "conversations": [
          {"from": "human", "value": "red?"},
          {"from": "gpt", "value": "green"},
        ],
      }
      for i in range(20)
    ]
    for name, text in (
      ("talks", json.dumps(talks)),
      ("broken/talks", "[\n" * 16 + "oops"),
    ):
      (folder / name).mkdir(parents=True, exist_ok=True)
      (folder / name / f"{split}.json").write_text(text)
  calls = {says: (args, "") for says, args in TRAIN.items()}
  return call_all("train", calls, folder, small_data=False)


def test_conversations_train_a_base_and_lossless_streams(
  folder, trained, monkeypatch
):
  monkeypatch.chdir(folder)
  for name in ("base", "lossless"):
    assert trained[name].code == 0, trained[name]
    assert storage.steps(folder / name) == [2]
  base, run = (checkpoints.load_run(folder / x) for x in ("base", "lossless"))
  assert run.config["data"]["dataset"] == "conversations"
  assert base.model.config.streams.num_streams == 0
  assert run.model.config.streams.mode == "lossless"
  a, b = (np.asarray(r.model.embed.table[...]) for r in (base, run))
  np.testing.assert_array_equal(a, b)  # the base, to the bit
  prompts = pipeline.prompts(pipeline.DataConfig(**run.config["data"]), "test")
  assert prompts == [("USER: red?\nASSISTANT:", [" green"] * 20)]


@pytest.mark.parametrize("says", [*TRAIN][2:])
def test_training_refuses_in_one_line(folder, trained, says):
  done = trained[says]
  assert done.code == 1 and says in done.err, done
  assert done.err.count("\n") == 1 and done.err.startswith("error: ")
  assert not storage.steps(folder / "x")


# -- data files --------------------------------------------------------------

ROWS = {
  "e2e_nlg": {"mr": "a", "ref": "b"},
  "dialogsum": {"dialogue": "a", "summary": "b", "fname": "c"},
  "sql_create_context": {"context": "a", "question": "b", "answer": "c"},
  "conversations": {"id": "a", "conversations": []},
  "text_corpus": {"text": "a"},
}


@pytest.mark.parametrize("name", ROWS)
def test_line_17_of_a_data_file_is_named(tmp_path, name):
  lines = [json.dumps(ROWS[name])] * 30
  lines[16] = lines[16][:-3]
  (tmp_path / "in").mkdir()
  for split in ("train", "validation", "test"):
    (tmp_path / "in" / f"{split}.jsonl").write_text("\n".join(lines))
  config = pipeline.DataConfig(
    dataset=name,
    data_dir=str(tmp_path / "out"),
    manual_dir=str(tmp_path / "in"),
  )
  with pytest.raises(UserError, match=r"\.jsonl, line 17: not JSON") as e:
    pipeline.examples(config, "test")
  assert "\n" not in str(e.value)


def test_line_17_of_a_question_file_is_named(tmp_path):
  row = {"question_id": 1, "category": "a", "turns": ["b"]}
  lines = [json.dumps(row)] * 30
  lines[16] = lines[16][:-3]
  (tmp_path / "q.jsonl").write_text("\n".join(lines))
  with pytest.raises(UserError, match=r"\.jsonl, line 17: not JSON") as e:
    list(chat_prompts.read(str(tmp_path / "q.jsonl")))
  assert "\n" not in str(e.value)


def test_sql_that_does_not_parse_is_counted_and_scored():
  outputs = ["SELECT ((", "select a from t", "\x00'\"", ""]
  references = [["SELECT (("], ["SELECT a FROM t"], ["SELECT 1"], ["]["]]
  got = evaluate.score("sql_create_context", outputs, references)
  assert (got["unparsed"], got["unparsed_references"]) == (3, 2)
  assert got["exact_match"] == 50  # the same text, parsed or not
