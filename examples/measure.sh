#!/usr/bin/env bash
# Every figure of docs/benchmark.md and of the README's section on speed, in one run of about half
# an hour on two cores, and into these documents. Keep the machine quiet meanwhile.
#
#     pip install '.[cpu,parity,plot]' && bash examples/measure.sh [FOLDER]
#
# FOLDER (by default build/figures) gets a text and a JSON file each.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/figures}
python=${PYTHON:-python3}
mkdir -p "$folder"
"$python" -c 'import matplotlib, torch, transformers'  # better now than after ten minutes

# Run the benchmark with the arguments behind $1; keep what it prints, and the results, as $1.
measure() {
  local name=$1
  shift
  printf '\n== %s: mlx_rgemma.benchmark %s\n' "$name" "$*"
  "$python" -m mlx_rgemma.benchmark "$@" --output "$folder/$name.json" | tee "$folder/$name.txt"
}

measure startup --startup
measure speed --shape small -p 512,2048 -g 128 -t 512 --compare mlx-lm,transformers
measure shipped --shape small -p 128 -g 32 -n 1 --compare mlx-lm --peer-blas own
measure flatness --shape small --flatness -n 3
measure bits --shape small -p 512 -g 128 -q none,4,8,rgemma

printf '\n== what a long text costs\n'
"$python" examples/flat_or_growing.py --plot docs/flat_or_growing.svg \
  --json "$folder/flat_or_growing.json" | tee "$folder/flat_or_growing.txt"

"$python" examples/insert_figures.py "$folder" docs/benchmark.md README.md
