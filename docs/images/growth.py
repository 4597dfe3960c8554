"""Draw growth-light.svg and growth-dark.svg from growth.json, beside this file.

    python docs/images/growth.py

`growth.json` holds the points that `python -m benchmarks.flat_or_growing --json` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 840, 370
PANEL = 330
TOP, BOTTOM = 82, 300
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Theme(NamedTuple):
    """Colors of a picture that has no background of its own."""

    text: str
    muted: str
    grid: str
    lines: tuple[str, str]


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", ("#0969da", "#bc4c00")),
    "dark": Theme("#f0f6fc", "#9198a1", "#3d444d", ("#4493f8", "#f0883e")),
}


class Panel(NamedTuple):
    """One figure: its title, the key of its values, ticks of its axis, and its scale."""

    title: str
    key: str
    ticks: dict[float, str]
    scale: Callable[[float], float]
    left: int


PANELS = (
    Panel(
        "Memory kept between tokens (MB)",
        "state_mb",
        {1: "1", 10: "10", 100: "100", 1000: "1,000"},
        math.log10,
        60,
    ),
    Panel(
        "Tokens per second, generating",
        "generate_tps",
        {0: "0", 50: "50", 100: "100", 150: "150", 200: "200", 225: ""},
        float,
        490,
    ),
)


def text(x: float, y: float, words: str, fill: str, size: int = 14, **more: str) -> str:
    """Return a text element."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}"{extra}>{words}</text>'


def panel_elements(panel: Panel, points: list[dict[str, Any]], theme: Theme) -> Iterator[str]:
    """Yield the elements of one panel."""
    low, high = panel.scale(min(panel.ticks)), panel.scale(max(panel.ticks))
    first, last = (math.log2(edge(p["tokens"] for p in points)) for edge in (min, max))
    width = PANEL - 30

    def x_of(tokens: float) -> float:
        return panel.left + width * (math.log2(tokens) - first) / (last - first)

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (panel.scale(value) - low) / (high - low)

    yield text(panel.left - 40, TOP - 20, panel.title, theme.text, 16, font_weight="600")
    for value, label in panel.ticks.items():
        if label:
            y = y_of(value)
            yield (
                f'<line x1="{panel.left}" y1="{y:.1f}" x2="{panel.left + width}" y2="{y:.1f}"'
                f' stroke="{theme.grid}"/>'
            )
            yield text(panel.left - 8, y + 5, label, theme.muted, text_anchor="end")
    for tokens in (512, 2048, 8192, 32768):
        yield text(x_of(tokens), BOTTOM + 22, f"{tokens:,}", theme.muted, text_anchor="middle")
    middle = panel.left + width / 2
    yield text(middle, BOTTOM + 46, "tokens read before", theme.muted, text_anchor="middle")
    for name, color in zip(dict.fromkeys(p["model"] for p in points), theme.lines, strict=True):
        line = [(x_of(p["tokens"]), y_of(p[panel.key])) for p in points if p["model"] == name]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="3"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in line)


def legend(points: list[dict[str, Any]], theme: Theme) -> Iterator[str]:
    """Yield the line of names at the top."""
    names = list(dict.fromkeys(p["model"] for p in points))
    for i, (name, color) in enumerate(zip(names, theme.lines, strict=True)):
        x = 20 + i * 350
        yield (
            f'<line x1="{x}" y1="22" x2="{x + 28}" y2="22" stroke="{color}" stroke-width="3"/>'
            f'<circle cx="{x + 14}" cy="22" r="4" fill="{color}"/>'
        )
        yield text(x + 38, 27, name, theme.text, 16)


def picture(points: list[dict[str, Any]], theme: Theme) -> str:
    """Return the picture as SVG."""
    elements = list(legend(points, theme))
    for panel in PANELS:
        elements += panel_elements(panel, points, theme)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}" role="img">\n'
        "<title>Memory and speed against the number of tokens read</title>\n"
        + "\n".join(elements)
        + "\n</svg>\n"
    )


def main() -> None:
    """Write both pictures."""
    points = json.loads((FOLDER / "growth.json").read_text(encoding="utf-8"))["points"]
    for name, theme in THEMES.items():
        (FOLDER / f"growth-{name}.svg").write_text(picture(points, theme), encoding="utf-8")


if __name__ == "__main__":
    main()
