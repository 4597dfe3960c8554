"""What is printed and logged of a training run."""

from __future__ import annotations

import pytest

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.loggers import ProgressLog, read_log, train_line

INFO = {
    "iteration": 10,
    "train_loss": 1.5,
    "learning_rate": 1e-3,
    "iterations_per_second": 0.5,
    "tokens_per_second": 100.0,
    "trained_tokens": 2000,
    "peak_memory": 0.1,
}


@pytest.mark.parametrize(
    ("iters", "end"),
    [
        (None, " GB"),
        (10, " GB"),
        (11, " GB, 2 s left"),
        (110, " GB, 3 min left"),
        (100_000, " GB, 55.5 h left"),
    ],
)
def test_time_left(iters, end):
    assert train_line(INFO, iters).endswith(end)
    assert train_line({**INFO, "iterations_per_second": 0.0}, iters).endswith(" GB")


def test_time_left_is_printed_and_not_logged(tmp_path):
    lines: list[str] = []
    log = ProgressLog(tmp_path / "log.jsonl", 0, 110, lines.append)
    log.on_train_loss_report(INFO)
    assert lines[0].endswith("3 min left") and read_log(tmp_path / "log.jsonl") == [INFO]


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "3", "{}", '{"iteration": "x"}', '{"iteration": 1']
)
def test_a_log_that_is_none_is_one_line(line, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 1}\n' + line + '\n{"iteration": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl: line 2 is not a training report"):
        ProgressLog(log, 3)
    log.write_text('{"iteration": 1}\n' + line)
    assert read_log(log) == [{"iteration": 1}]  # cut off by a kill
