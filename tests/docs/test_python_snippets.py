"""Python examples of the documentation run, those of a page in one namespace."""

from __future__ import annotations

import ast
import asyncio
import importlib

import pytest
from helpers.running_server import Running
from helpers.snippets import PAGES, Workplace, snippets

RUNNABLE = [page for page in PAGES if any(not s.reason for s in snippets(page, "python"))]
PARSED = [page for page in PAGES if any(s.reason for s in snippets(page, "python"))]
ADDRESS = "http://127.0.0.1:8080"


@pytest.fixture
def place(tmp_path, monkeypatch):
    found = Workplace(tmp_path)
    monkeypatch.chdir(found.cwd)
    return found


def run(page: str, place: Workplace, address: str = ADDRESS) -> dict:
    """Run the examples of a page; return their names."""
    names: dict = {"__name__": page}
    for snippet in snippets(page, "python"):
        if not snippet.reason:
            text = "\n" * (snippet.line - 1) + place.adapted(snippet.text)
            exec(compile(text.replace(ADDRESS, address), page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page != "docs/server.md"])
def test_examples_run(page, place):
    run(page, place)


def test_examples_of_the_server(place, capsys):
    server = Running("--model", str(place.chat))
    try:
        names = run("docs/server.md", place, f"http://127.0.0.1:{server.port}")
    finally:
        server.stop()
    assert capsys.readouterr().out.endswith("\n")  # the answer, empty or not

    async def pieces(**options) -> list[str]:
        return [piece async for piece in names["astream"]("Once upon a time", **options)]

    assert "".join(asyncio.run(pieces(max_tokens=5)))
    with pytest.raises(ValueError, match="temp"):
        asyncio.run(pieces(temp=-1))


@pytest.mark.parametrize("page", PARSED)
def test_other_examples_import_what_exists(page):
    for snippet in snippets(page, "python"):
        check_imports(snippet.text)


def test_a_wrong_import_is_found():
    with pytest.raises(AttributeError):
        check_imports("from mlx_rgemma import Sesion")


def check_imports(text: str) -> None:
    """Check the syntax of an example, and that this package has the names that it imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_rgemma"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                getattr(module, alias.name)
