"""The command `mlx_rgemma.perplexity`: perplexity of a text, and distance from another model."""

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
        help="Folder or Hub repository of another model, usually the unquantized one: report the"
        " mean KL divergence and the top-1 agreement too.",
    )
    add(
        "--data-path",
        metavar="FILE",
        help="Text file (one document), .jsonl file (one object per line: 'text', 'prompt' and"
        " 'completion', or 'messages'), or - for text on stdin. Default: the stories of this"
        " package.",
    )
    add_reading(group)
    parser.add_argument("--json", action="store_true", help="Print JSON, and nothing else.")
    return parser


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Add the arguments for splitting a text into sequences."""
    count = cli.int_at_least
    add = parser.add_argument
    add(
        "--batch-size",
        type=count(1),
        default=8,
        help="Sequences per batch. Default: %(default)s.",
    )
    add(
        "--sequence-length",
        type=count(2),
        help="Concatenate all documents and split them into sequences of this many tokens, as"
        " mlx-lm does. Default: each document is a sequence, of any length.",
    )
    add(
        "--num-samples",
        type=count(1, unlimited=True),
        default=-1,
        help="Random sequences to evaluate; -1 for all. Default: %(default)s.",
    )
    add(
        "--seed",
        type=count(0, MAX_SEED),
        default=123,
        help="Seed of --num-samples. Default: %(default)s.",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _perplexity(args))


def _perplexity(args: argparse.Namespace) -> None:
    import time

    import mlx.core as mx

    from mlx_rgemma.evaluation.perplexity import tokenize_documents
    from mlx_rgemma.evaluation.report import as_json, measure_folder, reference_of, table
    from mlx_rgemma.io.hub import locate
    from mlx_rgemma.io.text import read_documents
    from mlx_rgemma.tokenizers.load import load_tokenizer

    source = locate(args.model)
    tokenizer = load_tokenizer(source.folder, name=source.name)
    text = tokenize_documents(
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
        reference = reference_of(args.reference, text, **options)
    started = time.perf_counter()
    entry = measure_folder(
        source.name, args.model, text, reference, adapter_path=args.adapter_path, **options
    )
    seconds = time.perf_counter() - started
    if args.json:
        print(as_json([entry]))
        return
    print(table([entry]))
    count = len(text.sequences)
    print(
        f"\n{entry.quality.tokens} tokens in {count} sequence{'s' if count != 1 else ''},"
        f" {entry.quality.bits_per_byte:.4f} bits per byte;"
        f" {seconds:.2f} s with loading, peak memory {mx.get_peak_memory() / 1e9:.3f} GB"
    )


if __name__ == "__main__":
    sys.exit(main())
