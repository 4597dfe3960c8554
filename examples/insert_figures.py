"""Put measured figures where the documents show them: `insert_figures.py FOLDER DOCUMENT...`.

A document has places like

    <!-- figures speed: | engine -->
    <!-- end -->

Between the two lines come those paragraphs of FOLDER/speed.txt, as `measure.sh` leaves it, that
begin with what is behind the colon; without anything there, all that were printed at the end.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PLACE = re.compile(r"(<!-- figures (\w+):(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


BEFORE_THE_END = ("Machine: ", "Model: ")
"""How paragraphs begin that are printed before and while it is measured."""


def paragraphs(text: str, begin: str) -> list[str]:
    """The paragraphs that begin so, or those printed at the end, as Markdown."""
    found = [part.strip("\n") for part in text.split("\n\n")]
    if begin:
        chosen = [part for part in found if part.startswith(begin)]
    else:
        chosen = [part for part in found if not part.startswith(BEFORE_THE_END)]
    # Outside of a table, each line stays one.
    return [p if p.startswith("|") else p.replace("\n", "\\\n") for p in chosen]


def insert(document: str, folder: Path) -> str:
    """A document with the figures of a folder; places of files that are not there stay."""

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
    """Fill the places of some documents."""
    for name in documents:
        path = Path(name)
        path.write_text(insert(path.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
