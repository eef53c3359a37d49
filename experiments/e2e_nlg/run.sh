#!/usr/bin/env bash
# E2E-NLG, real data: four trainings, four benchmarks, four evaluations.
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
    --config.data.manual_dir="$1" --workdir="$work/$2" "${@:3}"
}
own_outputs() {
  PYTHONPATH=. "$python" experiments/e2e_nlg/own_outputs.py \
    "$work/$1" "$work/$1_outputs"
}
bench() {
  "$python" launch/benchmark.py --workdir="$work/$1" --drafters=none,streams \
    --prompts=64 --repeats=2 --tree_nodes=4,8,16,32 "${@:2}"
}

# Shared mode, all weights (J = 3, N_s = 1).
train "$data" shared
# The same run goes on, on its own greedy outputs.
own_outputs shared
train "$work/shared_outputs" distilled \
  --config.train.init_from="$work/shared" --config.train.steps=400 \
  --config.train.learning_rate=1e-3 --config.train.warmup_steps=30 \
  --config.train.stream_weight=1.0
# The baseline: next-token training alone. It is also the base of lossless mode.
train "$data" base --config.train.objective=next_token
# Lossless mode: base frozen, streams and their adapters (J = 5, N_s = 4), on
# the base's greedy outputs.
own_outputs base
train "$work/base_outputs" lossless --config.train.init_from="$work/base" \
  --config.train.trainable=adapters --config.train.steps=600 \
  --config.train.warmup_steps=30 --config.model.streams.mode=lossless \
  --config.model.streams.num_streams=5 \
  --config.model.streams.num_stream_layers=4 \
  --config.model.streams.lora_rank=32

bench shared
bench distilled
bench lossless
bench lossless --draft_length=3
for run in base shared distilled lossless; do
  "$python" launch/evaluate.py --workdir="$work/$run" --drafter=none
done
for run in shared distilled lossless; do
  "$python" launch/report.py --workdir="$work/$run"
done
