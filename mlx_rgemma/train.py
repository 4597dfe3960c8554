"""The command `python -m mlx_rgemma.train`: a Griffin of one's own, from text files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_rgemma import cli
from mlx_rgemma.tuner.config import MAX_COUNT, MAX_RATE, MAX_SEED, MAX_TOKENS, read_settings

if TYPE_CHECKING:
    from mlx_rgemma.tuner.pretrain_config import TrainConfig

DEFAULT_FOLDER = "griffin"

MAX_WIDTH = 1 << 17
MAX_LAYERS = 1000
MAX_VOCABULARY = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments; those that mlx_lm.lora has too are called the same."""
    count, number = cli.int_at_least, cli.float_between
    many, rate = count(1, MAX_COUNT), number(0, MAX_RATE)
    parser = cli.make_parser(
        "mlx_rgemma.train",
        "Train a Griffin on text files, from scratch or further. A run that was"
        " stopped goes on when the same command is given again.",
        ["--data my-texts --iters 2000 --plot loss.svg", "-c recipe.yaml --save-path my-griffin"],
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="A YAML recipe; options given here count before it.")
    add(
        "--data",
        nargs="+",
        metavar="PLACE[=WEIGHT]",
        help="Text: .txt or .txt.xz files, or folders of them; blank lines separate documents."
        " Each with its share of what is read, by default as much as it has bytes.",
    )
    add("--valid-data", nargs="+", metavar="PLACE", help="Text to measure the model on.")
    add(
        "--valid-fraction",
        type=number(0, 0.9),
        help="Without it, this share of the documents of --data is held out. Default: 0.01.",
    )
    add("--whole-files", action="store_true", help="Each file is one document.")
    add("--save-path", help=f"Folder of the run. Default: {DEFAULT_FOLDER}.")
    add("--init-from", metavar="FOLDER", help="Train this model further; 'embedded' is known.")
    add("--shape", choices=("tiny", "small", "2b", "9b"), help="Default: tiny.")
    add("--hidden-size", type=count(1, MAX_WIDTH), help="Width, of the recurrence too.")
    add("--intermediate-size", type=count(2, 8 * MAX_WIDTH), help="Twice the width inside the MLP.")
    add("--num-hidden-layers", type=count(1, MAX_LAYERS), help="Residual blocks.")
    add("--num-attention-heads", type=count(1, MAX_WIDTH), help="Heads.")
    add(
        "--attention-window-size",
        type=count(1, MAX_TOKENS),
        help="Tokens that attention looks back.",
    )
    add("--tokenizer", metavar="FILE", help="A SentencePiece model; by default one is trained.")
    add(
        "--vocab-size",
        type=count(8, MAX_VOCABULARY),
        help="Tokens of the one that is trained. Default: 2048, or fewer for a small text.",
    )
    add("--context-length", type=count(2, MAX_TOKENS), help="Tokens of a row. Default: 512.")
    add("--batch-size", type=count(1, MAX_TOKENS), help="Rows of an iteration. Default: 4.")
    add("--iters", type=many, help="Iterations of the whole run. Default: 1000.")
    add("--grad-accumulation-steps", type=many, help="Iterations to an update. Default: 1.")
    add("--learning-rate", type=rate, help="The highest. Default: 3e-3.")
    add("--min-learning-rate", type=rate, help="The last. Default: 0.")
    add("--lr-decay", choices=("cosine", "linear", "constant"), help="Default: cosine.")
    add("--warmup", type=count(0, MAX_COUNT), help="Updates until the highest rate. Default: 100.")
    add("--weight-decay", type=rate, help="Of matrices outside the RG-LRU. Default: 0.1.")
    add("--max-grad-norm", type=rate, help="Longest gradient; 0 for any. Default: 1.")
    add("--dropout", type=number(0, 0.95), help="Default: 0.")
    add(
        "--average-decay",
        type=number(0, 0.99999),
        help="Evaluate and export a moving average of the weights. Default: 0, none.",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="Of computation. Default: float32.")
    add("--save-dtype", choices=("float32", "bfloat16"), help="Of the model. Default: bfloat16.")
    add("--seed", type=count(0, MAX_SEED), help="Default: 0.")
    add("--steps-per-report", type=many, help="Default: 10.")
    add("--steps-per-eval", type=many, help="Default: 200.")
    add("--steps-per-save", type=many, help="Iterations between checkpoints. Default: 100.")
    add("--sample-prompt", help="Begins the sample of each evaluation. Default: Once upon a time.")
    add("--sample-tokens", type=count(1, MAX_TOKENS), help="Length of the sample. Default: 60.")
    add("--plot", metavar="FILE", help="Draw the losses into this image at the end.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = sys.argv[1:] if argv is None else argv
    build_parser().parse_args(args)  # mistakes in the options, and --help, before anything else
    return cli.run(lambda: _train(args))


SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "attention_window_size",
)


def read_recipe(argv: Sequence[str]) -> tuple[TrainConfig, Path, Path | None]:
    """The recipe of the command line and its YAML file, the run's folder, and the plot's file.

    Raises:
        UserError: If the file cannot be read, or says what is no setting.
    """
    from mlx_rgemma.tuner.pretrain_config import TrainConfig

    args = vars(build_parser().parse_args(argv))
    file = args.pop("config", None)
    values = {**(read_settings(file, build_parser()) if file else {}), **args}
    folder = Path(values.pop("save_path", DEFAULT_FOLDER)).expanduser()
    plot = values.pop("plot", None)
    changes = {key: values.pop(key) for key in SHAPE_KEYS if key in values}
    for name in ("data", "valid_data"):
        values[name] = tuple(values.get(name, ()))
    return TrainConfig(**values, shape_changes=changes), folder, Path(plot) if plot else None


def _train(argv: Sequence[str]) -> None:
    recipe, folder, plot = read_recipe(argv)

    from mlx_rgemma import distributed
    from mlx_rgemma.tuner.loss import batch_loss
    from mlx_rgemma.tuner.pretrain import LOG, MODEL, Pretraining
    from mlx_rgemma.tuner.progress import ProgressLog, check_plot, plot_log
    from mlx_rgemma.tuner.run_folder import run_folder

    group = distributed.join(recipe.seed)
    first = distributed.rank() == 0
    with run_folder(folder, lock=first):
        if plot is not None and first:
            check_plot(plot)
        run = Pretraining(recipe, folder, group)
        for line in run.description():
            print(line)
        done = run.state.progress.iteration
        log = ProgressLog(folder / LOG, done, recipe.iters) if first else None
        try:
            run.run(log, batch_loss)
        except KeyboardInterrupt:
            done = run.state.progress.iteration
            print(f"Stopped after iteration {done}; the same command goes on.")
            raise
        print(f"Saved final weights to {folder / MODEL}.")
        if plot is not None and first:
            plot_log(folder / LOG, plot)


if __name__ == "__main__":
    sys.exit(main())
