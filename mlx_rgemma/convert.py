"""The command `mlx_rgemma.convert`: convert a checkpoint to MLX's format, and quantize it."""

from __future__ import annotations

import argparse
import sys

from mlx_rgemma import cli
from mlx_rgemma.checkpoints.quantization import MODES, RECIPES, RGEMMA
from mlx_rgemma.griffin.config import DTYPES

STORIES = ""
"""Value of --report for the stories of this package."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.convert",
        "Convert a RecurrentGemma checkpoint to MLX, and quantize it.",
        [
            "--hf-path google/recurrentgemma-2b-it --mlx-path 2b-it",
            "--hf-path google/recurrentgemma-2b-it --mlx-path 2b-it-q -q --report",
        ],
    )
    add = parser.add_argument
    add(
        "--hf-path",
        "--model",
        required=True,
        help="Folder in Hugging Face's layout, repository of the Hugging Face Hub, Google's .pt"
        " file or Flax folder, or a .tar.gz of these.",
    )
    add("--mlx-path", default="mlx_model", help="The new folder. Default: %(default)s.")
    add("-q", "--quantize", action="store_true", help="Quantize the weights.")
    add(
        "--q-bits",
        type=int,
        help="Bits per weight, the same for all. Default: that of the mode; for affine, those of"
        f" --quant-predicate {RGEMMA}.",
    )
    add(
        "--q-group-size",
        type=int,
        help="Weights per scale. Default: that of the mode (affine: 64).",
    )
    add("--q-mode", default="affine", metavar="MODE", help=f"One of {', '.join(MODES)}.")
    add(
        "--quant-predicate",
        choices=RECIPES,
        help=f"Recipe of bits per matrix: {RGEMMA} (the default of -q), measured for this"
        " architecture, or one of mlx-lm's, which give the embedding the low bits.",
    )
    add("--dtype", choices=DTYPES, help="dtype of unquantized tensors. Default: the config's.")
    add("-d", "--dequantize", action="store_true", help="Dequantize the model.")
    add("--revision", help="Branch, tag or commit of a repository.")
    add(
        "--report",
        nargs="?",
        const=STORIES,
        metavar="TEXT",
        help="Compare the new model with its source on a text (--data-path of"
        " mlx_rgemma.perplexity; default: the stories of this package): print a table, and write"
        " it to the model card and quality.json of the folder.",
    )
    add("--upload-repo", metavar="REPO", help="Repository of the Hub to upload the folder to.")
    add("--strict", action="store_true", help="Refuse weights that are NaN or infinite.")
    google = parser.add_argument_group(
        "settings missing in Google's formats",
        "Known for the released shapes; required for others.",
    )
    google.add_argument(
        "--attention-window-size",
        type=cli.int_at_least(1),
        metavar="W",
        help="Attention window: past keys that a query sees.",
    )
    google.add_argument(
        "--logits-soft-cap",
        type=cli.float_between(0),
        metavar="CAP",
        help="Soft cap of the logits; 0 for none.",
    )
    google.add_argument(
        "--embeddings-scale",
        action=argparse.BooleanOptionalAction,
        help="Whether embeddings are multiplied by the square root of the width.",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _convert(args))


def _convert(args: argparse.Namespace) -> None:
    from mlx_rgemma.checkpoints.convert import convert
    from mlx_rgemma.checkpoints.upload import check_repository, upload
    from mlx_rgemma.errors import shortened
    from mlx_rgemma.evaluation.report import (
        check_reportable,
        report_conversion,
        table,
        write_report,
    )
    from mlx_rgemma.io.atomic import gigabytes
    from mlx_rgemma.io.text import read_documents

    options = vars(args)
    text, repository = options.pop("report"), options.pop("upload_repo")
    documents = None if text is None else read_documents(None if text == STORIES else text)
    if documents is not None:
        check_reportable(options)
    if repository is not None:
        check_repository(repository)
    made = convert(**options, progress=True)
    print(f"Wrote {made.folder}: {made.stored}.")
    print(
        f"{made.parameters / 1e6:.1f} M parameters, {gigabytes(made.nbytes)},"
        f" {made.bits_per_weight:.3f} bits per weight"
    )
    if made.kept:
        print(f"Not quantized (the group size does not divide the width): {shortened(made.kept)}.")
    for note in made.notes:
        print(f"Note: {note}")
    if documents is not None:
        entries = report_conversion(options, made.folder, documents)
        write_report(made.folder, entries)
        print(f"\n{table(entries)}")
    if repository is not None:
        print(f"Uploaded to {upload(made.folder, repository)}.")


if __name__ == "__main__":
    sys.exit(main())
