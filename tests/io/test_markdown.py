"""Markdown tables."""

from __future__ import annotations

from mlx_rgemma.io.markdown import markdown_table


def test_columns_are_padded():
    assert markdown_table(["a", "long"], [["1234", ""], ["5", "6"]]).splitlines() == [
        "| a    | long |",
        "| ---- | ---- |",
        "| 1234 |      |",
        "| 5    | 6    |",
    ]


def test_a_table_without_rows_is_empty():
    assert markdown_table(["a"], []) == ""
