#!/usr/bin/env bash
# What a GPU has to say, in one command on a bare machine, in 9 minutes at
# most:
#
#   experiments/gpu/run.sh OUT [--tiny]
#
# Needs Python with the packages of setup.py and jax for CUDA, and no network
# (PYTHON=... names another interpreter than python3). Writes to OUT, which must
# be new or empty: a .log for each stage, steps.jsonl and results.jsonl (rows of
# the benchmarks), and stages.jsonl (name, exit code, seconds of each stage). A
# stage that fails or runs out of its time does not stop the next, and none is
# begun after 9 minutes; the exit code is 1 if one failed.
# --tiny: shapes for a try on a CPU.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2:---tiny}" != --tiny ]; then
  echo "usage: experiments/gpu/run.sh OUT [--tiny]" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
if [ -n "$(ls -A "$out")" ]; then
  echo "error: $out is not empty: give a new folder for the results" >&2
  exit 1
fi
cd "$here" || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
failed=0 deadline=$(($(date +%s) + 540))

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 begin code
  shift 2
  begin=$(date +%s)
  if [ $((deadline - 15 - begin)) -lt "$limit" ]; then
    limit=$((deadline - 15 - begin))
  fi
  if [ "$limit" -lt 5 ]; then
    echo "== $name: no time left"
    echo "no time left" >"$out/$name.log"
    printf '{"stage": "%s", "exit_code": null, "seconds": 0}\n' "$name" \
      >>"$out/stages.jsonl"
    failed=1
    return
  fi
  echo "== $name, $limit s at most"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  printf '{"stage": "%s", "exit_code": %d, "seconds": %d}\n' \
    "$name" "$code" $(($(date +%s) - begin)) >>"$out/stages.jsonl"
  [ "$code" = 0 ] || failed=1
}

steps() { # NAME SECONDS SHAPE NODES, other arguments
  local name=$1 limit=$2 shape=$3 nodes=$4
  shift 4
  stage "$name" "$limit" "$python" experiments/step_cost/steps.py \
    --shape="$shape" --nodes="$nodes" --stages --out="$out/steps.jsonl" "$@"
}

train() { # SECONDS, other arguments
  local limit=$1
  shift
  stage train "$limit" "$python" launch/train.py \
    --config=configs/restaurants.py --workdir="$out/run" \
    --config.data.data_dir="$out/data" "$@"
}

wanted=gpu
[ "${2:-}" = --tiny ] && wanted=any
stage device 60 "$python" -c 'import sys, jax, jaxlib, flax
print("jax", jax.__version__, "jaxlib", jaxlib.__version__,
      "flax", flax.__version__, [d.device_kind for d in jax.devices()])
sys.exit(sys.argv[1] not in ("any", jax.default_backend()))' "$wanted"
if [ "$failed" = 1 ]; then
  echo "error: no GPU that $python, jax and flax can use; --tiny does without" \
    "(see $out/device.log)" >&2
  exit 1
fi
if [ "$wanted" = any ]; then
  steps steps-tiny 120 tiny 4,8 --prompts=2 --new=8 --lengths=20
  train 120 --config.train.steps=3 --config.train.save_every=3 \
    --config.model.width=64 --config.model.num_layers=2 \
    --config.model.ffw_dim=128 --config.data.seq_len=192 \
    --config.data.stream_positions=96
  nodes=4 prompts=2
else
  # Programs of tests are many and small: to tune each would take minutes.
  workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
  stage tests 120 env JAX_PLATFORMS=cuda,cpu \
    XLA_FLAGS=--xla_gpu_autotune_level=0 \
    "$python" -m pytest -q "${workers[@]}" -m gpu tests/test_gpu.py
  steps steps-7b 110 7b 8,32 --prompts=3 --new=64
  steps steps-1b 100 1b 8,32 --prompts=3 --new=64
  if timeout 20 "$python" -c 'import torch, transformers
assert torch.cuda.is_available()' 2>/dev/null; then
    stage transformers 90 "$python" experiments/step_cost/huggingface.py
  else
    echo "== transformers: not installed for this GPU, left out"
  fi
  # Wide enough that a step is bound by memory, small enough for a minute.
  train 90 --config.model.width=1024 --config.model.num_layers=12 \
    --config.model.ffw_dim=2816 --config.model.num_heads=16 \
    --config.model.num_kv_heads=8 --config.train.learning_rate=1e-3 \
    --config.data.batch_size=16 --config.model.dtype=bfloat16
  nodes=4,16 prompts=32
fi
stage benchmark 100 "$python" launch/benchmark.py --workdir="$out/run" \
  --drafters=none,streams --tree_nodes="$nodes" --prompts="$prompts"
if [ -f "$out/run/results.jsonl" ]; then
  cp "$out/run/results.jsonl" "$out/results.jsonl"
fi
cat "$out/stages.jsonl"
exit "$failed"
