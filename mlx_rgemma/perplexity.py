"""The command `python -m mlx_rgemma.perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import sys

from mlx_rgemma import cli
from mlx_rgemma.generation.options import MAX_SEED


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser: mlx-lm's arguments, and a few more."""
    parser = cli.make_parser(
        "mlx_rgemma.perplexity",
        "Perplexity of RecurrentGemma on a text, and its distance from another model.",
        [
            "--data-path book.txt",
            "--model 2b-it-q --reference google/recurrentgemma-2b-it --data-path valid.jsonl",
        ],
    )
    cli.add_model(parser)
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--reference",
        help="Folder or Hub repository of another model, as a rule the unquantized one: mean KL"
        " divergence and the share of equal top tokens are reported too.",
    )
    add(
        "--data-path",
        metavar="FILE",
        help="A text file (one document), a .jsonl file (one object a line, with 'text', 'prompt'"
        " and 'completion', or 'messages'), or - for text on stdin. Default: a few short stories"
        " that come with the package.",
    )
    add_reading(group)
    parser.add_argument("--json", action="store_true", help="Print JSON, and nothing else.")
    return parser


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Add the arguments that say how a text is read."""
    count = cli.int_at_least
    add = parser.add_argument
    add(
        "--batch-size",
        type=count(1),
        default=8,
        help="Rows that are read together. Default: %(default)s.",
    )
    add(
        "--sequence-length",
        type=count(2),
        help="Lay all documents end to end and cut them into rows of so many tokens, as mlx-lm"
        " does. Default: each document is a row, however long it is.",
    )
    add(
        "--num-samples",
        type=count(1, unlimited=True),
        default=-1,
        help="Rows to read, chosen by chance; -1 for all. Default: %(default)s.",
    )
    add(
        "--seed",
        type=count(0, MAX_SEED),
        default=123,
        help="Seed of that choice. Default: %(default)s.",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _perplexity(args))


def _perplexity(args: argparse.Namespace) -> None:
    import time

    import mlx.core as mx

    from mlx_rgemma.evaluation.perplexity import encode_rows
    from mlx_rgemma.evaluation.report import as_json, measure_folder, reference_of, table
    from mlx_rgemma.io.hub import locate
    from mlx_rgemma.io.text import read_documents
    from mlx_rgemma.tokenizers.load import load_tokenizer

    source = locate(args.model)
    tokenizer = load_tokenizer(source.folder, name=source.name)
    rows = encode_rows(
        tokenizer,
        read_documents(args.data_path, tokenizer),
        sequence_length=args.sequence_length,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    options = {"dtype": args.dtype, "window": args.window}
    reference = None
    if args.reference is not None:
        reference = reference_of(args.reference, rows, **options)
    started = time.perf_counter()
    entry = measure_folder(
        source.name, args.model, rows, reference, adapter_path=args.adapter_path, **options
    )
    seconds = time.perf_counter() - started
    if args.json:
        print(as_json([entry]))
        return
    print(table([entry]))
    print(
        f"\n{entry.quality.tokens} tokens in {len(rows.tokens)} rows,"
        f" {entry.quality.bits_per_byte:.4f} bits per byte;"
        f" {seconds:.2f} s with loading, peak memory {mx.get_peak_memory() / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    sys.exit(main())
