#!/usr/bin/env bash
# From a bare machine to a table, in one command:
#
#   launch/quickstart.sh [WORKDIR]           default: runs/quickstart
#
# Makes the environment (see launch/environment.sh), trains a small model on the
# data the project generates itself, shows one prompt call by call, compares
# decoding with and without streams, and writes the report page. A second run
# goes on where the first was stopped and trains nothing twice.
set -euo pipefail
case ${1:-} in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;;
  -*) echo "error: $1 is no flag of quickstart.sh; see --help" >&2; exit 1 ;;
esac
here=$PWD
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case ${1:-} in
  "") workdir=runs/quickstart ;;
  /*) workdir=$1 ;;
  *) workdir=$here/$1 ;;
esac

prompt="name: The Humble Pepper; kind: wine bar; food: Lebanese; dish: parsley \
salad; area: the harbour quarter; near: the clock tower; suits: couples"
say() { printf '\n== %s\n' "$*"; }

say "training (minutes on two cores; Ctrl-C is safe, the same command goes on)"
"$PYTHON" launch/train.py --config=configs/restaurants.py --workdir="$workdir"

say "one prompt, call by call"
"$PYTHON" launch/generate.py --workdir="$workdir" --prompt="$prompt" \
  --show_steps

say "benchmark: plain decoding and streams, prompt by prompt"
"$PYTHON" launch/benchmark.py --workdir="$workdir" --drafters=none,streams \
  --prompts=32 --tree_nodes=4,8

page=$("$PYTHON" launch/report.py --workdir="$workdir")
printf '\nreport: %s\n' "$page"
