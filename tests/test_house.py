"""The house: imports point down, nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mlx_rgemma"

FLOORS = [
    ("mlx_rgemma", 0),  # the root itself: everything it names is imported on first use
    ("mlx_rgemma.errors", 0),
    ("mlx_rgemma.allocation", 0),
    ("mlx_rgemma.blas", 0),
    ("mlx_rgemma.elf", 0),
    ("mlx_rgemma.io", 1),
    ("mlx_rgemma.ops.kernels", 1),
    ("mlx_rgemma.ops", 2),
    ("mlx_rgemma.griffin", 3),
    ("mlx_rgemma.checkpoints", 4),
    ("mlx_rgemma.text", 5),
    ("mlx_rgemma.register", 5),
    ("mlx_rgemma.cli", 5),
    ("mlx_rgemma.distributed", 5),
    ("mlx_rgemma.sessions.prompt_cache", 5),
    ("mlx_rgemma.generation", 5),
    ("mlx_rgemma.sessions.session", 5),
    ("mlx_rgemma.sessions.conversation", 5),
    ("mlx_rgemma.server", 5),
    ("mlx_rgemma.evaluation", 5),
    ("mlx_rgemma.tuner", 5),
    ("mlx_rgemma.measurement", 5),
    ("mlx_rgemma.benchmark", 6),
    ("mlx_rgemma.cache_prompt", 6),
    ("mlx_rgemma.chat", 6),
    ("mlx_rgemma.convert", 6),
    ("mlx_rgemma.evaluate", 6),
    ("mlx_rgemma.fuse", 6),
    ("mlx_rgemma.generate", 6),
    ("mlx_rgemma.lora", 6),
    ("mlx_rgemma.launches", 6),
    ("mlx_rgemma.perplexity", 6),
    ("mlx_rgemma.quantize", 6),
    ("mlx_rgemma.selftest", 6),
    ("mlx_rgemma.server", 6),
    ("mlx_rgemma.train", 6),
    ("mlx_rgemma.__main__", 7),
]
"""See the table in README.md; the longest matching name counts."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor(module: str) -> int:
    matches = [(len(n), f) for n, f in FLOORS if module == n or module.startswith(n + ".")]
    matches = [m for m in matches if m[0] > len("mlx_rgemma")] or (
        matches if module == "mlx_rgemma" else []
    )
    assert matches, f"{module} has no floor: add it to FLOORS and to the README"
    return max(matches)[1]


def imports(module: str) -> set[str]:
    """Modules of this package that a module imports, at its top or anywhere inside.

    What only type checkers see is left out.
    """
    tree = ast.parse(MODULES[module].read_text())
    hidden = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        and isinstance(branch.test, ast.Name)
        and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return {name for name in found if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name in imports(module) - {"mlx_rgemma"}:
        assert floor(name) <= floor(module), f"{module} imports {name}, which is above it"


def test_imports_have_no_cycles():
    graph = {module: imports(module) - {"mlx_rgemma"} for module in MODULES}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        for name in graph[module]:
            # A package's own modules may be reached through its __init__.
            if not module.startswith(name + "."):
                visit(name, (*path, module))

    for module in graph:
        visit(module, ())


def run_python(*args: str) -> str:
    result = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout


HEAVY = "{'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)"


def test_importing_the_package_imports_nothing_heavy():
    assert run_python("-c", f"import mlx_rgemma, sys; print({HEAVY})") == "set()\n"


@pytest.mark.parametrize(
    "command",
    [
        "benchmark",
        "cache_prompt",
        "chat",
        "convert",
        "evaluate",
        "generate",
        "launches",
        "perplexity",
        "quantize",
        "selftest",
        "server",
        "train",
    ],
)
def test_help_imports_nothing_heavy(command):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('mlx_rgemma.{command}', run_name='__main__')\n"
        f"except SystemExit as e: print('status', e.code)\n"
        f"print({HEAVY})"
    )
    out = run_python("-W", "error", "-c", code)
    assert "usage: " in out
    assert out.endswith("status 0\nset()\n")


@pytest.mark.parametrize("name", ["generate", "convert"])
def test_functions_keep_their_names_when_their_command_is_imported(name):
    code = (
        f"import mlx_rgemma.{name}\n"
        f"from mlx_rgemma import {name}\n"
        f"assert callable({name}), {name}\n"
        f"import importlib; importlib.import_module('mlx_rgemma.{name}')\n"
        f"import mlx_rgemma; assert callable(mlx_rgemma.{name})\n"
        f"import sys; assert hasattr(sys.modules['mlx_rgemma.{name}'], 'main')"
    )
    run_python("-c", code)


def test_every_public_name_can_be_had():
    run_python("-c", "import mlx_rgemma; [getattr(mlx_rgemma, n) for n in mlx_rgemma.__all__]")


def test_unknown_names_are_attribute_errors():
    import mlx_rgemma

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlx_rgemma.nonsense  # noqa: B018
