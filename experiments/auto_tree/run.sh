#!/usr/bin/env bash
# What --tree=auto predicts, beside what is measured, at batches of 1 to 16.
#
#   experiments/auto_tree/run.sh DATA [WORKDIR] [BATCH ...]
#
# DATA: a directory with the E2E-NLG files. WORKDIR: default runs/auto_tree.
# BATCH: default 1 2 4 8 16. A second run trains and calibrates no more, and
# measures again.
set -euo pipefail
data=$(realpath "${1:?give a directory with the E2E-NLG files}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${2:-runs/auto_tree}
batches=("${@:3}")
[ ${#batches[@]} -gt 0 ] || batches=(1 2 4 8 16)
python=${PYTHON:-python}

# Main stream without its streams (the paper's first version): plain decoding of
# this model is then the fastest there is, and drafts can be turned off.
"$python" launch/train.py --config=configs/e2e_nlg.py --workdir="$work" \
  --config.data.manual_dir="$data" --config.data.data_dir="$work/data" \
  --config.model.streams.main_attends_streams=False --config.train.steps=700
for batch in "${batches[@]}"; do
  "$python" launch/benchmark.py --workdir="$work" --prompts=64 \
    --max_new_tokens=64 --batch="$batch" --tree=auto \
    --tree_nodes=2,3,4,6,8,12,16,24
done
"$python" experiments/auto_tree/errors.py "$work/results.jsonl"
