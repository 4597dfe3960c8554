"""The command `mlx_rgemma.train`: train a Griffin on text files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_rgemma import cli
from mlx_rgemma.griffin.config import SHAPES
from mlx_rgemma.tuner.config import MAX_COUNT, MAX_RATE, MAX_SEED, MAX_TOKENS, read_settings

if TYPE_CHECKING:
    from mlx_rgemma.tuner.config import TrainConfig

DEFAULT_FOLDER = "griffin"

MAX_WIDTH = 1 << 17
MAX_LAYERS = 1000
MAX_VOCABULARY = 1 << 20


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser; options that mlx_lm.lora has too have the same names."""
    count, number = cli.int_at_least, cli.float_between
    many, rate = count(1, MAX_COUNT), number(0, MAX_RATE)
    parser = cli.make_parser(
        "mlx_rgemma.train",
        "Train a Griffin on text files, from scratch or further. Rerunning the command resumes an"
        " interrupted run.",
        ["--data my-texts --iters 2000 --plot loss.svg", "-c train.yaml --save-path my-griffin"],
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="YAML file of settings; the command line wins.")
    add(
        "--data",
        nargs="+",
        metavar="PLACE[=WEIGHT]",
        help="Text: .txt or .txt.xz files, or folders of them; blank lines separate documents."
        " WEIGHT is its share of the training tokens. Default: its size.",
    )
    add("--valid-data", nargs="+", metavar="PLACE", help="Text of the validation set.")
    add(
        "--valid-fraction",
        type=number(0, 0.9),
        help="Without --valid-data: fraction of the documents of --data to validate on."
        " Default: 0.01.",
    )
    add("--whole-files", action="store_true", help="Each file is one document.")
    add("--save-path", help=f"Folder of the run. Default: {DEFAULT_FOLDER}.")
    add("--init-from", metavar="FOLDER", help="Model to train further, or 'embedded'.")
    add("--shape", choices=SHAPES, help="Shape of the model. Default: tiny.")
    add("--hidden-size", type=count(1, MAX_WIDTH), help="Width of the model and its recurrence.")
    add("--intermediate-size", type=count(2, 8 * MAX_WIDTH), help="Twice the width of the MLP.")
    add("--num-hidden-layers", type=count(1, MAX_LAYERS), help="Number of residual blocks.")
    add("--num-attention-heads", type=count(1, MAX_WIDTH), help="Number of attention heads.")
    add(
        "--attention-window-size",
        type=count(1, MAX_TOKENS),
        help="Attention window: past tokens that a query sees.",
    )
    add("--tokenizer", metavar="FILE", help="SentencePiece model. Default: one is trained.")
    add(
        "--vocab-size",
        type=count(8, MAX_VOCABULARY),
        help="Vocabulary of the trained tokenizer. Default: 2048, or fewer for a small text.",
    )
    add("--context-length", type=count(2, MAX_TOKENS), help="Tokens per sequence. Default: 512.")
    add("--batch-size", type=count(1, MAX_TOKENS), help="Sequences per iteration. Default: 4.")
    add("--iters", type=many, help="Iterations of the whole run. Default: 1000.")
    add("--grad-accumulation-steps", type=many, help="Iterations per update. Default: 1.")
    add("--learning-rate", type=rate, help="Highest learning rate. Default: 3e-3.")
    add("--min-learning-rate", type=rate, help="Last learning rate. Default: 0.")
    add("--lr-decay", choices=("cosine", "linear", "constant"), help="Default: cosine.")
    add("--warmup", type=count(0, MAX_COUNT), help="Updates until the highest rate. Default: 100.")
    add("--weight-decay", type=rate, help="Weight decay of matrices. Default: 0.1.")
    add("--max-grad-norm", type=rate, help="Gradient clipping; 0 for none. Default: 1.")
    add("--dropout", type=number(0, 0.95), help="Dropout probability. Default: 0.")
    add(
        "--average-decay",
        type=number(0, 0.99999),
        help="Evaluate and export an EMA of the weights, with this decay. Default: 0, none.",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="dtype to compute in. Default: float32.")
    add("--save-dtype", choices=("float32", "bfloat16"), help="dtype to save. Default: bfloat16.")
    add("--seed", type=count(0, MAX_SEED), help="Seed of all random numbers. Default: 0.")
    add("--steps-per-report", type=many, help="Iterations between reports. Default: 10.")
    add("--steps-per-eval", type=many, help="Iterations between evaluations. Default: 200.")
    add("--steps-per-save", type=many, help="Iterations between checkpoints. Default: 100.")
    add("--sample-prompt", help="Prompt of each evaluation's sample. Default: Once upon a time.")
    add("--sample-tokens", type=count(1, MAX_TOKENS), help="Length of the sample. Default: 60.")
    add("--plot", metavar="FILE", help="Image file to plot the losses into at the end.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = sys.argv[1:] if argv is None else argv
    build_parser().parse_args(args)  # wrong options, and --help, before anything else
    return cli.run(lambda: _train(args))


SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "attention_window_size",
)


def read_config(argv: Sequence[str]) -> tuple[TrainConfig, Path, Path | None]:
    """Return the configuration, the folder of the run, and the file of the plot.

    Raises:
        UserError: If the YAML file cannot be read, or has an unknown setting.
    """
    from mlx_rgemma.tuner.config import TrainConfig

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
    config, folder, plot = read_config(argv)

    from mlx_rgemma import distributed
    from mlx_rgemma.tuner.loggers import ProgressLog, check_plot, plot_log
    from mlx_rgemma.tuner.loss import batch_loss
    from mlx_rgemma.tuner.pretrain import LOG, MODEL, Pretraining
    from mlx_rgemma.tuner.run_folder import run_folder

    group = distributed.join(config.seed)
    first = distributed.rank() == 0
    with run_folder(folder, lock=first):
        if plot is not None and first:
            check_plot(plot)
        run = Pretraining(config, folder, group)
        for line in run.description():
            print(line)
        done = run.state.progress.iteration
        log = ProgressLog(folder / LOG, done, config.iters) if first else None
        try:
            run.run(log, batch_loss)
        except KeyboardInterrupt:
            done = run.state.progress.iteration
            print(f"Stopped after iteration {done}; rerun the command to resume.")
            raise
        print(f"Saved final weights to {folder / MODEL}.")
        if plot is not None and first:
            plot_log(folder / LOG, plot)


if __name__ == "__main__":
    sys.exit(main())
