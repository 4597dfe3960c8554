"""Insert measured figures into documents: `insert_figures.py FOLDER DOCUMENT...`.

A document has places like

    <!-- figures speed: | engine -->
    <!-- end -->

Between the two lines it inserts the paragraphs of FOLDER/speed.txt, written by `measure.sh`, that
begin with the text after the colon; without such a text, all paragraphs printed at the end.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PLACE = re.compile(r"(<!-- figures (\w+):(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


BEFORE_THE_END = ("Machine: ", "Model: ")
"""Beginnings of paragraphs that are printed before and during the measurement."""


def paragraphs(text: str, begin: str) -> list[str]:
    """Return the paragraphs with this beginning, or those printed at the end, as Markdown."""
    found = [part.strip("\n") for part in text.split("\n\n")]
    if begin:
        chosen = [part for part in found if part.startswith(begin)]
    else:
        chosen = [part for part in found if not part.startswith(BEFORE_THE_END)]
    # Outside of a table, each line stays one.
    return [p if p.startswith("|") else p.replace("\n", "\\\n") for p in chosen]


def insert(document: str, folder: Path) -> str:
    """Return a document with the figures of a folder; places without a file stay."""

    def filled(place: re.Match[str]) -> str:
        head, name, begin, end = place.groups()
        file = folder / f"{name}.txt"
        if not file.is_file():
            return place.group()
        parts = paragraphs(file.read_text(encoding="utf-8"), begin.strip())
        if not parts:
            raise SystemExit(f"{file}: no paragraph begins with {begin.strip()!r}")
        return f"{head}" + "\n\n".join(parts) + f"\n{end}"

    return PLACE.sub(filled, document)


def main(folder: str, *documents: str) -> None:
    """Fill the places of documents."""
    for name in documents:
        path = Path(name)
        path.write_text(insert(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
