#!/usr/bin/env bash
# Every drafter beside the same targets: E2E-NLG and SQL, real data.
#
#   experiments/rivals/run.sh DATA [WORKDIR]
#
# DATA, WORKDIR: of experiments/paper_tasks/run.sh, which must have run on
# e2e_nlg and sql_create_context: its runs `next` are the targets. A second run
# goes on where the first stopped.
set -euo pipefail
data=$(realpath "${1:?give a directory with the data sets}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${2:-runs/paper_tasks}
python=${PYTHON:-python}
declare -A folder=([e2e_nlg]=e2e_nlg
  [sql_create_context]=sql_create_context_rederived)

train() {  # CONFIG NAME FLAGS...
  "$python" launch/train.py --config="configs/$1" \
    --config.data.manual_dir="$data/${folder[$task]}" \
    --config.data.data_dir="$work/data" --workdir="$work/$task/rivals/$2" \
    "${@:3}"
}
beside() {  # NAME DRAFTER FLAGS...
  train "rivals.py:$task/$2" "$1" --config.train.init_from="$work/$task/next" \
    "${@:3}"
}
streams() {  # NAME FLAGS...
  train paper_tasks.py:$task "$1" --config.train.init_from="$work/$task/next" \
    --config.train.trainable=adapters --config.model.streams.mode=lossless \
    --config.model.streams.num_stream_layers=3 \
    --config.model.streams.lora_rank=32 --config.train.steps=200 \
    --config.train.stream_weight=1.0 --config.train.target=main "${@:2}"
}
bench() {  # NAME FLAGS...
  "$python" launch/benchmark.py --workdir="$rivals/$1" --prompts=64 \
    --tree_nodes=4,16,32 "${@:2}"
}
options=--config.model.drafter.options
corrected=--config.model.streams.correction_rank=16

for task in e2e_nlg sql_create_context; do
  rivals=$work/$task/rivals
  for name in medusa hydra redrafter eagle; do beside $name $name; done
  beside eagle3 eagle $options.length=3 "$options.fuse=(0,1,3)" \
    $options.regression=0.0 $options.weight=1.0
  # One layer of half the width, on the text, from scratch.
  train paper_tasks.py:$task draft_model --config.train.objective=next_token \
    --config.data.tokenizer="$work/tokenizer.json" --config.model.width=96 \
    --config.model.num_layers=1 --config.model.num_heads=2 \
    --config.model.num_kv_heads=1 --config.model.ffw_dim=256 \
    --config.model.streams.num_stream_layers=1 --config.train.steps=500
  streams streams
  streams streams_corrected $corrected
  # With more steps: 500 for all, and for streams all four layers.
  longer=--config.train.steps=500
  layers=--config.model.streams.num_stream_layers=4
  beside medusa_500 medusa $longer
  streams streams_500 $longer $layers
  streams streams_corrected_500 $longer $layers $corrected

  every=none,streams,prompt_lookup,lookahead
  for name in draft_model medusa hydra redrafter eagle; do
    every+=,$name=$rivals/$name
  done
  bench streams --drafters="$every"
  bench streams --drafters=none,eagle="$rivals/eagle3"
  bench streams_corrected
  bench streams_500 --drafters=none,streams,medusa="$rivals/medusa_500"
  bench streams_corrected_500
  "$python" launch/calibrate.py --workdir="$rivals/medusa" --tree_nodes=16 \
    --out="$rivals/medusa_tree.json"
  "$python" launch/benchmark.py --workdir="$rivals/medusa" --prompts=64 \
    --tree="$rivals/medusa_tree.json"
done
