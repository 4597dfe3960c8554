"""Measurements for developers; `mlx_rgemma.benchmark` is the command for users.

Run from the root of a clone, as in `python -m benchmarks.compare --help`:

| script | measures |
| --- | --- |
| `compare` | speed and memory beside mlx-lm and transformers, as tables and pictures |
| `startup` | the time from a command to the first token |
| `flat_or_growing` | the cost of a long text, beside a transformer of the same size |
| `which_bits` | which matrices need more bits |
| `embedded_quality` | the quality of the embedded model in each precision |
| `convert_large` | time and memory of converting a checkpoint of a released model's shape |
| `server_soak` | the server's memory under load for minutes |

`measure.sh` makes every figure of docs/benchmark.md, `insert_figures.py` inserts them.
"""
