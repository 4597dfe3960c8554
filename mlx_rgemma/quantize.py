"""The command `mlx_rgemma.quantize`: compare quantizations, or learn one from a text."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mlx_rgemma import cli
from mlx_rgemma.checkpoints.quantization import MODES, RECIPES, RGEMMA
from mlx_rgemma.convert import build_parser as convert_parser
from mlx_rgemma.perplexity import add_reading

LEARNED = {
    "dwq": "Fine-tune scales and biases by distillation from the unquantized model.",
    "gptq": "Choose the rounding of each weight by the statistics of its layer's input.",
    "dynamic_quant": "Give more bits to the most sensitive layers, up to a target size.",
}
"""mlx-lm's quantizers that need calibration text."""

ALL_SETTINGS = (
    "--dtype float32",
    "--dtype bfloat16",
    "--dtype float16",
    *(f"-q --q-bits {bits} --q-group-size {group}" for bits in (8, 6, 5, 4, 3, 2)
      for group in (32, 64, 128)),
    *(f"-q --q-mode {mode}" for mode in MODES if mode != "affine"),
    *(f"-q --quant-predicate {recipe}" for recipe in RECIPES if recipe != RGEMMA),
    "-q",
)  # fmt: skip
"""Every setting of `convert`, as command-line flags."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = cli.make_parser(
        "mlx_rgemma.quantize",
        "Compare the quantizations of a model, or learn one from a text.",
        ["compare --model 2b-it", "dwq --model 2b-it --mlx-path 2b-it-dwq --data-path book.txt"],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="Convert a model with every setting, and print size and quality of each.",
        description="Convert a model with every setting, one after the other, to a temporary"
        " folder; print the size and the perplexity of each, and its distance from the model.",
    )
    add = compare.add_argument
    add("--model", help="Folder or Hub repository; without it, the small embedded model.")
    add("--data-path", metavar="FILE", help="Text, as for mlx_rgemma.perplexity.")
    add_reading(compare)
    add(
        "--setting",
        action="append",
        metavar="FLAGS",
        help="Flags of mlx_rgemma.convert to try, as one argument (--setting='-q --q-bits 4');"
        " repeatable. Default: all.",
    )
    add("--work-dir", type=Path, help="Parent of the temporary folders. Default: the system's.")
    add("--json", action="store_true", help="Print JSON, and nothing else.")
    for name, what in LEARNED.items():
        learned = commands.add_parser(
            name,
            help=f"mlx-lm's {name}: {what[0].lower()}{what[1:]}",
            description=f"{what} This is mlx-lm's {name} with this package's model; it takes all"
            f" flags of mlx_lm.{name}.",
        )
        learned.add_argument("--model", "-m", required=True, help="Folder or Hub repository.")
        learned.add_argument("--mlx-path", default="mlx_model", help="The new folder.")
        learned.add_argument(
            "--data-path",
            metavar="FILE",
            help="Calibration text, as for mlx_rgemma.perplexity. Default: mlx-lm's, which is"
            " downloaded.",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "compare":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return cli.run(lambda: _compare(args))
    return cli.run(lambda: _learn(args, rest))


def _compare(args: argparse.Namespace) -> None:
    from mlx_rgemma.evaluation.perplexity import tokenize_documents
    from mlx_rgemma.evaluation.report import as_json, sweep, table
    from mlx_rgemma.io.hub import locate
    from mlx_rgemma.io.text import read_documents
    from mlx_rgemma.tokenizers.load import load_tokenizer

    source = locate(args.model)
    settings = {flags: _options(flags) for flags in args.setting or ALL_SETTINGS}
    tokenizer = load_tokenizer(source.folder, name=source.name)
    text = tokenize_documents(
        tokenizer,
        read_documents(args.data_path, tokenizer),
        sequence_length=args.sequence_length,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    entries, skipped = sweep(source, settings, text, args.work_dir)
    if args.json:
        print(as_json(entries))
        return
    print(table(entries))
    print(f"\n{text.predicted} tokens, compared with {source.name}.")
    for name, reason in skipped.items():
        print(f"Left out: {name}: {reason}")


def _options(flags: str) -> dict[str, Any]:
    """Parse flags of `convert`."""
    from mlx_rgemma.errors import UserError, shown

    try:
        parsed, rest = convert_parser().parse_known_args(["--model", "", *shlex.split(flags)])
    except (SystemExit, ValueError) as error:
        raise UserError(f"--setting {shown(flags)}: not flags of mlx_rgemma.convert.") from error
    if rest:
        raise UserError(
            f"--setting {shown(flags)}: mlx_rgemma.convert does not know {shown(rest[0])}."
        )
    names = ("quantize", "q_bits", "q_group_size", "q_mode", "quant_predicate", "dtype")
    return {name: getattr(parsed, name) for name in names}


def _learn(args: argparse.Namespace, rest: list[str]) -> None:
    from mlx_rgemma.evaluation.calibration import run_quantizer
    from mlx_rgemma.io.atomic import refuse_existing
    from mlx_rgemma.io.hub import locate
    from mlx_rgemma.io.text import read_documents

    refuse_existing(Path(args.mlx_path).expanduser())
    model = locate(args.model).folder
    arguments = ["--model", str(model), "--mlx-path", args.mlx_path, *rest]
    data = None if args.data_path is None else Path(args.data_path)
    if data is not None:
        read_documents(data)
    run_quantizer(args.command, arguments, data)


if __name__ == "__main__":
    sys.exit(main())
