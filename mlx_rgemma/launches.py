"""The command `mlx_rgemma.launches`: kernel launches of a model on a GPU, counted."""

from __future__ import annotations

import argparse
import sys

from mlx_rgemma import cli


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = cli.make_parser(
        "mlx_rgemma.launches",
        "Count the launches of a bfloat16 model on a Mac's GPU, with the Metal kernels,"
        " in its recorded graph. Needs no Mac.",
        ["--shape 9b --details", "--prompt 64 128 2048 --json"],
    )
    add = parser.add_argument
    add("--shape", choices=("2b", "9b"), default="2b", help="Layers of the model.")
    add(
        "--prompt",
        type=cli.int_at_least(2, 1 << 14),  # the graph of mlx-lm grows with each token
        nargs="+",
        default=[64, 128],
        help="Lengths of a chunk of a prompt. Default: 64 128.",
    )
    add("--details", action="store_true", help="Also list the launches by kind.")
    add("--json", action="store_true", help="Print one JSON object.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _count(args))


def _count(args: argparse.Namespace) -> int:
    import json

    from mlx_rgemma.evaluation.launch_count import count_layer, count_model, small_model
    from mlx_rgemma.griffin.config import ATTENTION, RECURRENT, GriffinConfig

    shape = GriffinConfig.preset(args.shape)
    config = small_model(shape.num_hidden_layers, shape.block_types)
    rows = []
    for length in [1, *args.prompt]:
        ours, theirs = (count_model(config, length, theirs=theirs) for theirs in (False, True))
        rows.append(
            {
                "tokens": length,
                "recurrent_layer": count_layer(RECURRENT, length),
                "attention_layer": count_layer(ATTENTION, length),
                "model": ours.total,
                "model_copies": ours.copied,
                "mlx_lm": theirs.total,
                "mlx_lm_copies": theirs.copied,
                "kinds": dict(ours.kinds),
            }
        )
    if args.json:
        print(json.dumps({"shape": args.shape, "layers": shape.num_hidden_layers, "calls": rows}))
        return 0
    print(f"Launches of a bfloat16 model with the {shape.num_hidden_layers} layers of {args.shape}")
    print(f"{'call':>16}  recurrent  attention  model (+ copies)   mlx-lm (+ copies)")
    for row in rows:
        call = "decode step" if row["tokens"] == 1 else f"{row['tokens']} tokens"
        print(
            f"{call:>16}  {row['recurrent_layer']:>9}  {row['attention_layer']:>9}"
            f"  {row['model']:>5} (+ {row['model_copies']:>2})"
            f"       {row['mlx_lm']:>7} (+ {row['mlx_lm_copies']:>2})"
        )
        if args.details:
            for kind, count in sorted(row["kinds"].items(), key=lambda item: -item[1]):
                print(f"{'':18}{count:>5}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
