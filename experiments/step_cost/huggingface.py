"""Plain decoding here and by transformers' generate: same weights, same tokens.

  python experiments/step_cost/huggingface.py [--new=64 --prompt=100 --turns=3]

A Llama of random weights (86 M) is made by transformers, saved, and read here.
Both decode one prompt greedily, in turns within one process; of each the best
time per new token, prefill taken off (a run of one token). Needs transformers.
"""

import argparse
import sys
import tempfile
import time

import jax
import numpy as np

from spec_stream import NoDraft
from spec_stream.decode import Decoder
from spec_stream.hf import checkpoint

SHAPE = dict(
  vocab_size=16384,
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  num_key_value_heads=4,
  intermediate_size=2048,
  max_position_embeddings=2048,
  tie_word_embeddings=True,
)


def ours(directory, prompt, new):
  """-> a call that decodes so many tokens."""
  decoder = Decoder(checkpoint.load(directory), NoDraft())

  def call(count):
    state = decoder.start([prompt], max_new_tokens=new)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    if count > 1:
      state = decoder.finish(state)
    tokens = np.asarray(state.tokens)[0, :count].tolist()
    return tokens, time.perf_counter() - begin

  return call


def theirs(directory, prompt, cache):
  import torch
  from transformers import AutoModelForCausalLM

  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  model = AutoModelForCausalLM.from_pretrained(directory).eval().to(device)
  ids = torch.tensor([prompt], device=device)

  def call(count):
    begin = time.perf_counter()
    with torch.no_grad():
      out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
      )
    tokens = out[0, len(prompt) :].tolist()  # waits for the device
    return tokens, time.perf_counter() - begin

  return call


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--new", type=int, default=64)
  parser.add_argument("--prompt", type=int, default=100)
  parser.add_argument("--turns", type=int, default=3)
  args = parser.parse_args(argv)
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  with tempfile.TemporaryDirectory() as directory:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SHAPE)).float()
    made.generation_config.eos_token_id = None
    made.save_pretrained(directory)
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, SHAPE["vocab_size"], args.prompt).tolist()
    calls = {
      "here": ours(directory, prompt, args.new),
      "transformers, dynamic cache": theirs(directory, prompt, None),
      "transformers, static cache": theirs(directory, prompt, "static"),
    }
    whole = {name: [] for name in calls}
    first = {name: [] for name in calls}
    tokens = {}
    for turn in range(args.turns + 1):
      for name, call in calls.items():
        _, one = call(1)
        tokens[name], many = call(args.new)
        if turn:  # the first compiles
          first[name].append(one)
          whole[name].append(many)
  per_token = {
    name: (min(whole[name]) - min(first[name])) / (args.new - 1)
    for name in calls
  }
  print("| | ms per token | of ours | same tokens |\n|---|---|---|---|")
  for name, seconds in per_token.items():
    same = tokens[name] == tokens["here"]
    print(
      f"| {name} | {1e3 * seconds:.2f} | {seconds / per_token['here']:.2f} | "
      f"{'yes' if same else 'NO'} |"
    )
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
