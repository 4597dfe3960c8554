"""The wheel and the editable install: their files, their commands, and their size."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAX_FILES, MAX_LINES, MAX_CPU_LINES = 160, 25_500, 3_200
"""Python in the wheel, outside of the Linux CPU backend and in it."""

pytest.importorskip("hatchling", reason="needs the extra: pip install '.[test]'")
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="not a clone of the repository"
)

FIND_SOURCES = (
    "from mlx_rgemma.ops import metal; import mlx_rgemma.ops;"
    "[metal.source(kernel.file) for kernel in metal.registered()];"
    "print(len(metal.registered()), mlx_rgemma.__file__)"
)


def pip(*args: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *args],
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_the_sources_and_the_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    metal = {f"mlx_rgemma/metal/{file.name}" for file in (ROOT / "metal").glob("*.metal")}
    assert metal and metal <= set(sizes)
    assert "mlx_rgemma/py.typed" in sizes
    assert any(name.endswith("licenses/LICENSE") for name in sizes)
    embedded = {n: s for n, s in sizes.items() if n.startswith("mlx_rgemma/assets/embedded/")}
    names = {Path(name).name for name in embedded}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.model"} <= names
    assert sum(embedded.values()) < 8_000_000
    folders = {name.partition("/")[0] for name in sizes}
    (metadata,) = folders - {"mlx_rgemma"}
    assert metadata.endswith(".dist-info")


def test_the_wheel_is_small(wheel):
    """Limits of files and lines of Python, with and without the Linux CPU backend."""
    lines: dict[bool, list[int]] = {True: [], False: []}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                of_cpu = name.startswith("mlx_rgemma/cpu/")
                lines[of_cpu].append(archive.read(name).count(b"\n"))
    assert sum(lines[True]) <= MAX_CPU_LINES
    assert sum(lines[False]) <= MAX_LINES and len(lines[False]) <= MAX_FILES


def test_the_wheel_declares_its_commands(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        commands = archive.read(name).decode()
    for command in ("generate", "convert", "launches", "selftest"):
        assert f"mlx_rgemma.{command} = mlx_rgemma.{command}:main" in commands
    assert "\nmlx-rgemma = mlx_rgemma.__main__:main\n" in commands


def run(code: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_installed_wheel_finds_its_metal_sources(wheel, tmp_path):
    pip("--target", str(tmp_path / "site"), str(wheel))
    shown = run(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r});" + FIND_SOURCES, tmp_path
    )
    count, where = shown.split()
    assert int(count) >= 8
    assert Path(where).is_relative_to(tmp_path / "site")


def test_an_editable_install_finds_its_metal_sources(tmp_path):
    pip("--target", str(tmp_path / "site"), "-e", str(ROOT))
    code = (
        "import site, sys; before = [p for p in sys.path if p];"
        f"site.addsitedir({str(tmp_path / 'site')!r});"
        "sys.path = [p for p in sys.path if p and p not in before] + before;"
    )
    count, where = run(code + FIND_SOURCES, tmp_path).split()
    assert int(count) >= 8
    assert Path(where).parent == ROOT / "mlx_rgemma"
