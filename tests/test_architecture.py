"""Architecture: imports point down, without a cycle; names, file lengths, and cheap imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_rgemma"

MAX_LINES = 430

FLOORS = (
    ("errors",),
    ("io", "ops"),
    ("griffin",),
    ("tokenizers", "distributed"),
    ("cpu", "generation", "adapters", "register"),
    ("checkpoints", "sessions"),
    ("tuner", "evaluation", "server"),
    ("cli",),
)
"""Parts of the package from the ground up; every other module is a command, on top of them."""

COMMANDS = {"mlx_rgemma.server", "mlx_rgemma.server.command", "mlx_rgemma.server.__main__"}
"""Commands whose module is a folder or inside of one."""

BACKEND = "mlx_rgemma.ops.backend"

PUBLIC_OPERATIONS = (
    "rg_lru",
    "causal_conv1d",
    "rms_norm",
    "prefill_attention",
    "decode_attention",
    "recurrent_decode",
    "rotary",
)
"""Operations with a Metal kernel."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def floor(module: str) -> int:
    if module in COMMANDS:
        return len(FLOORS)
    part = module.split(".")[1]
    return next((n for n, parts in enumerate(FLOORS) if part in parts), len(FLOORS))


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules that a module imports, at its top, inside, or for type checkers only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    # The root imports everything that it names on first use.
    return frozenset(name for name in found if name in MODULES) - {module, "mlx_rgemma"}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"mlx_rgemma"}))
def test_imports_point_down(module):
    for name in imports(module):
        assert floor(name) <= floor(module), f"{module} imports {name}, which is above it"


def test_imports_have_no_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for name in imports(module):
            visit(name, (*path, module))
        done.add(module)

    for module in MODULES.keys() - {"mlx_rgemma"}:
        visit(module, ())


def test_every_part_exists():
    parts = {module.split(".")[1] for module in MODULES.keys() - {"mlx_rgemma"}}
    assert {part for parts in FLOORS for part in parts} <= parts
    assert MODULES.keys() >= COMMANDS


def mentions(path: Path, text: str) -> bool:
    return text in path.read_text()


def test_only_the_backend_reaches_the_cpu_folder():
    """By name, so that the folder can be deleted."""
    outside = {m for m in MODULES if not f"{m}.".startswith("mlx_rgemma.cpu.")}
    for module in outside:
        assert not any(f"{n}.".startswith("mlx_rgemma.cpu.") for n in imports(module)), module
    loads = 'import_module("mlx_rgemma.cpu'
    assert {m for m in outside if mentions(MODULES[m], loads)} == {BACKEND}


@pytest.mark.parametrize("name", PUBLIC_OPERATIONS)
def test_an_operation_has_one_name_everywhere(name):
    assert (PACKAGE / "ops" / f"{name}.py").is_file()
    assert (ROOT / "metal" / f"{name}.metal").is_file()
    assert (ROOT / "tests" / "ops" / "mutants" / f"{name}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{name}.py").is_file()
    assert mentions(PACKAGE / "ops" / f"{name}.py", f'"{name}"')


def test_every_kernel_belongs_to_an_operation():
    kernels = {file.stem for file in (ROOT / "metal").glob("*.metal")} - {"common"}
    backward = {name.removesuffix("_backward") for name in kernels}
    assert backward == {*PUBLIC_OPERATIONS, "add_rms_norm"}
    mutants = {file.stem for file in (ROOT / "tests/ops/mutants").glob("*.py")} - {"__init__"}
    assert mutants == kernels


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{MODULES[module]}: {lines} lines, expected at most {MAX_LINES}"


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
        "fuse",
        "launches",
        "lora",
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
