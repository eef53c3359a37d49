#!/usr/bin/env bash
# E2E-NLG, real data: three trainings, three benchmarks, three evaluations.
#
#   experiments/e2e_nlg/run.sh DATA [WORKDIR]
#
# DATA: a directory with the E2E-NLG files (trainset.csv ..., or *.jsonl.gz).
# WORKDIR: default runs/e2e_nlg. A second run goes on where the first stopped.
set -euo pipefail
data=$(realpath "${1:?give a directory with the E2E-NLG files}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${2:-runs/e2e_nlg}
python=${PYTHON:-python}
train() {
  "$python" launch/train.py --config=configs/e2e_nlg.py \
    --config.data.manual_dir="$data" --workdir="$work/$1" "${@:2}"
}
bench() {
  "$python" launch/benchmark.py --workdir="$work/$1" --drafters=none,streams \
    --prompts=64 --repeats=3 "${@:2}"
}

# The baseline: next-token training alone. It is also the base of lossless mode.
train base --config.train.objective=next_token
# Shared mode, all weights, the same number of steps (J = 3, N_s = 1).
train shared
# Lossless mode: base frozen, streams and their adapters (J = 5, N_s = 4).
train lossless --config.train.init_from="$work/base" \
  --config.train.trainable=adapters --config.train.steps=400 \
  --config.model.streams.mode=lossless --config.model.streams.num_streams=5 \
  --config.model.streams.num_stream_layers=4 \
  --config.model.streams.lora_rank=32

bench shared --tree_nodes=4,8,16,32
bench lossless --tree_nodes=4,8,16,32
bench lossless --tree_nodes=4,8,16,32 --num_streams=3
for run in base shared lossless; do
  "$python" launch/evaluate.py --workdir="$work/$run" --drafter=none
done
for run in shared lossless; do
  "$python" launch/report.py --workdir="$work/$run"
done
