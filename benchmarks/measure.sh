#!/usr/bin/env bash
# Make every figure of docs/benchmark.md and the README's picture, in one run of about
# half an hour on two cores, and insert them. The machine must be quiet meanwhile.
#
#     pip install -e '.[parity,plot]' && bash benchmarks/measure.sh [FOLDER]
#
# FOLDER (by default build/figures) gets a text and a JSON file each.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-build/figures}
python=${PYTHON:-python3}
mkdir -p "$folder"
"$python" -c 'import matplotlib, torch, transformers'  # fail now rather than after ten minutes

# Run the module $2 with the arguments after it; keep its output and its results as $1.
measure() {
  local name=$1
  shift
  printf '\n== %s: python -m %s\n' "$name" "$*"
  "$python" -m "$@" --output "$folder/$name.json" | tee "$folder/$name.txt"
}

measure startup benchmarks.startup
measure speed benchmarks.compare --shape 40m -p 512,2048 -g 128 -t 512 \
  --compare mlx-lm,transformers
measure flatness benchmarks.compare --shape 40m --flatness -n 3
measure bits benchmarks.compare --shape 40m -p 512 -g 128 -q none,4,8,rgemma

printf '\n== the cost of a long text\n'
"$python" -m benchmarks.flat_or_growing --json docs/images/growth.json |
  tee "$folder/flat_or_growing.txt"
"$python" docs/images/growth.py

"$python" benchmarks/insert_figures.py "$folder" docs/benchmark.md
