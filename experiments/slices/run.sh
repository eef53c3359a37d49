#!/usr/bin/env bash
# Compiles training and decoding of published shapes for TPU slices that need
# not be here (launch/compile.py), one row of a .jsonl file each:
#
#   experiments/slices/run.sh OUT [PATTERN]
#
# PATTERN: only names that match it, such as 'v5e_2x2-.*-decode'. What has a row
# in OUT is left alone, so the same command goes on after a stop. One to six
# minutes a row on two cores, 96 rows. Needs libtpu (`pip install libtpu`);
# PYTHON=... names another interpreter than python3.
set -u
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: experiments/slices/run.sh OUT [PATTERN]" >&2
  exit 2
fi
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
failed=0

# row NAME, arguments of launch/compile.py
row() {
  local name=$1
  shift
  [[ $name =~ ${pattern} ]] || return
  [ -s "$out/$name.jsonl" ] && return
  echo "== $(date +%T) $name"
  "${PYTHON:-python3}" launch/compile.py --config=configs/checkpoint.py:shared \
    --out="$out/$name.jsonl" "$@" >"$out/$name.log" 2>&1
  # 1 may be a program that does not fit: that is a row too.
  if [ ! -s "$out/$name.jsonl" ]; then
    echo "failed: see $out/$name.log" >&2
    failed=1
  fi
}

pattern=${2:-.}
for slice in v5e:2x2 v5e:4x4 v5e:16x16 v6e:2x2; do
  IFS=x read -r wide high <<<"${slice#*:}"
  chips=$((wide * high))
  # A row of a decoding is split by heads, of which two shapes have eight.
  tensor=$((chips < 8 ? chips : 8))
  for shape in llama2_7b llama3_8b llama2_70b; do
    for streams in 0 1 3 7; do
      at=(--topology="$slice" --shape="$shape" --streams="$streams")
      name=${slice/:/_}-$shape-J$streams
      row "$name-decode" "${at[@]}" --programs=decode --config.mesh.data=1 \
        --config.mesh.fsdp=$((chips / tensor)) --config.mesh.tensor=$tensor
      row "$name-train" "${at[@]}" --programs=train --config.mesh.data=1 \
        --config.mesh.fsdp=$chips --config.data.batch_size=$chips
    done
  done
done
exit $failed
