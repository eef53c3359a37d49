#!/usr/bin/env bash
# The paper's three tasks, real data: one pretraining, then for each task three
# trainings and two ablations, their benchmarks, and a comparison.
#
#   experiments/paper_tasks/run.sh DATA [WORKDIR] [TASK ...]
#
# DATA: a directory with english_novels, e2e_nlg, dialogsum and
# sql_create_context_rederived. WORKDIR: default runs/paper_tasks. TASK: default
# all three. A second run goes on where the first stopped.
set -euo pipefail
data=$(realpath "${1:?give a directory with the four data sets}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=${2:-runs/paper_tasks}
tasks=("${@:3}")
[ ${#tasks[@]} -gt 0 ] || tasks=(e2e_nlg sql_create_context dialogsum)
python=${PYTHON:-python}
declare -A folder=([text_corpus]=english_novels [e2e_nlg]=e2e_nlg
  [dialogsum]=dialogsum [sql_create_context]=sql_create_context_rederived)
declare -A steps=([e2e_nlg]=500 [dialogsum]=300 [sql_create_context]=600)
declare -A lossless_steps=([e2e_nlg]=500 [dialogsum]=300
  [sql_create_context]=500)

train() {  # TASK RUN FLAGS...
  "$python" launch/train.py --config="configs/paper_tasks.py:$1" \
    --config.data.manual_dir="$data/${folder[$1]}" \
    --config.data.data_dir="$work/data" --workdir="$work/$2" "${@:3}"
}
lossless() {  # RUN FLAGS...; streams through all four layers
  train "$task" "$task/$1" --config.train.init_from="$work/$task/next" \
    --config.train.trainable=adapters --config.model.streams.mode=lossless \
    --config.model.streams.num_stream_layers=4 \
    --config.model.streams.lora_rank=32 \
    --config.train.steps="${lossless_steps[$task]}" \
    --config.train.stream_weight=1.0 --config.train.target=main "${@:2}"
}
bench() {  # RUN
  "$python" launch/benchmark.py --workdir="$work/$1" --prompts=64 \
    --tree_nodes=4,16
}

mkdir -p "$work"
[ -f "$work/tokenizer.json" ] ||
  PYTHONPATH=. "$python" experiments/paper_tasks/tokenizer.py "$data" \
    "$work/tokenizer.json" --data_dir="$work/data"
train text_corpus base --config.data.tokenizer="$work/tokenizer.json"

tune() {  # RUN FLAGS...; all weights, from the base
  train "$task" "$task/$1" --config.train.init_from="$work/base" \
    --config.train.objective=streams --config.train.steps="${steps[$task]}" \
    "${@:2}"
}
no_eq1=--config.model.streams.main_attends_streams=False

for task in "${tasks[@]}"; do
  tune next --config.train.objective=next_token
  tune shared
  # What costs shared mode its quality: the streams' weight, or eq. 1?
  tune shared_weight01 --config.train.stream_weight=0.1
  tune shared_noattend $no_eq1
  # The base of lossless mode is the model that next-token training gave.
  lossless lossless
  for way in shared shared_weight01 shared_noattend lossless; do
    bench "$task/$way"
  done
  against=$work/base
  for way in next lossless shared_weight01 shared_noattend; do
    against+=,$work/$task/$way
  done
  "$python" launch/evaluate.py --workdir="$work/$task/shared" --prompts=300 \
    --against="$against"
done

# What lossless acceptance depends on: target, layers, steps.
case " ${tasks[*]} " in *" e2e_nlg "*) ;; *) exit 0 ;; esac
task=e2e_nlg
# Another order of the data: how far apart two equal trainings come out.
for way in next shared; do
  objective=streams
  [ "$way" = next ] && objective=next_token
  tune ${way}_seed1 --config.train.objective=$objective --config.data.seed=1
done
"$python" launch/evaluate.py --workdir="$work/$task/next_seed1" \
  --prompts=300 --against="$work/$task/shared_seed1"
layers=--config.model.streams.num_stream_layers=3
short=--config.train.steps=200
lossless lossless_labels $layers $short --config.train.target=labels
lossless lossless_main $layers $short
lossless lossless_layers4 $short
lossless lossless_main500 $layers
for way in labels main layers4 main500; do bench "e2e_nlg/lossless_$way"; done
