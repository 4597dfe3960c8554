"""Which BLAS MLX multiplies with on Linux: found, refused, opened in time, and really called."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_rgemma import blas, elf

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Macs multiply with Accelerate"
)

IN_USE = "from mlx_rgemma import blas; print(blas.in_use())"


def site(package: str) -> Path:
    """A folder of packages, found without importing the package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def reference() -> Path:
    """The BLAS of MLX's wheel."""
    found = sorted((site("mlx").parent / "mlx_cpu.libs").glob("libblas*.so*"))
    if not found:
        pytest.skip("this MLX was not installed from a wheel of PyPI")
    return found[0]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The same library elsewhere: a BLAS that serves, but for one kind of processor only."""
    own = reference()
    for file in own.parent.iterdir():
        if file != own:
            (tmp_path / file.name).symlink_to(file)
    return Path(shutil.copy(own, tmp_path / "libplain.so"))


def run_python(code: str, *, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run code in a process in which nothing is imported yet."""
    environment = {**os.environ, "MLX_RGEMMA_BLAS": "auto", **variables}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=check,
        timeout=120,
        env=environment,
    )


def test_a_library_tells_what_it_defines_and_what_it_takes():
    mlx = site("mlx") / "lib" / "libmlx.so"
    assert elf.defined_symbols(reference(), [*blas.NEEDED, "sgemm"]) == set(blas.NEEDED)
    assert elf.defined_symbols(mlx, blas.NEEDED) == set()
    assert len(elf.import_slots(mlx, "cblas_sgemm")) == 1
    assert elf.import_slots(reference(), "cblas_sgemm") == []
    assert elf.import_slots(mlx, "no_such_name") == []


def test_what_is_no_library_defines_nothing(tmp_path):
    whole = reference().read_bytes()
    header = whole[:64]
    for n, data in enumerate(
        [b"", b"text\n", header, header[:20], whole[:5000], whole[:-2000], header + bytes(9000)]
    ):
        file = tmp_path / str(n)
        file.write_bytes(data)
        assert elf.defined_symbols(file, blas.NEEDED) == set()
    with pytest.raises(OSError):
        elf.defined_symbols(tmp_path / "missing", blas.NEEDED)


def test_mlx_calls_the_library_that_is_named(copied):
    assert str(copied) in run_python(IN_USE, MLX_RGEMMA_BLAS=str(copied)).stdout


def test_off_leaves_mlx_its_own():
    out = run_python(IN_USE, MLX_RGEMMA_BLAS="off").stdout
    assert out == f"the reference BLAS of MLX's wheel, {reference().resolve()}\n"


@pytest.mark.parametrize(
    "first",
    [
        "import mlx_rgemma, mlx.core",
        "from mlx_rgemma import load",
        "import mlx_rgemma.ops",
        "import mlx_rgemma.griffin.model",
        "import mlx_rgemma, mlx_lm",
    ],
)
def test_every_way_to_mlx_goes_past_the_finder(copied, first):
    out = run_python(f"{first}\n{IN_USE}", MLX_RGEMMA_BLAS=str(copied)).stdout
    assert str(copied) in out


def test_nothing_is_opened_behind_mlx(copied):
    code = f"import mlx.core\nimport mlx_rgemma, sys\n{IN_USE}\nprint(sys.meta_path[0])"
    out = run_python(code, MLX_RGEMMA_BLAS=str(copied)).stdout
    assert str(copied) not in out
    assert "mlx_rgemma" not in out.splitlines()[-1]


def test_the_finder_stands_aside_once_mlx_is_there():
    code = (
        "import sys; before = list(sys.meta_path)\n"
        "import mlx_rgemma; from mlx_rgemma import blas; blas.install()\n"
        "assert len(sys.meta_path) == len(before) + 1\n"
        "import mlx.core; blas.install()\n"
        "assert [f for f in sys.meta_path if f.__class__.__module__.startswith('mlx')] == []"
    )
    run_python(code)


def test_only_what_chooses_its_code_is_opened_unasked(copied, tmp_path):
    (tmp_path / "libtext.so").write_text("no library")
    (tmp_path / "libother.so").symlink_to(site("mlx") / "lib" / "libmlx.so")
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "from pathlib import Path\n"
        "from mlx_rgemma import blas\n"
        f"blas._places = lambda: [(Path({str(tmp_path)!r}), 'lib[top]*.so')]\n"
        "assert blas.open_fast() is None"
    )
    log = run_python(code).stderr
    assert "libplain.so: its code is for one processor only" in log
    assert "libtext.so: does not export cblas_" in log
    assert "libother.so: does not export cblas_" in log
    assert "no fast BLAS found" in log


@pytest.mark.parametrize("content", [None, "no library"], ids=["missing", "no library"])
def test_a_wrong_path_is_one_line(tmp_path, content):
    file = tmp_path / "libmine.so"
    if content is not None:
        file.write_text(content)
    code = (
        "import runpy, sys; sys.argv = ['x', '-m', '1']\n"
        "runpy.run_module('mlx_rgemma.generate', run_name='__main__')"
    )
    result = run_python(code, check=False, MLX_RGEMMA_BLAS=str(file))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: [blas] MLX_RGEMMA_BLAS is '{file}': ")
    assert result.stderr.count("\n") == 1


def test_a_fast_library_multiplies_right():
    code = (
        "from mlx_rgemma import blas; import mlx.core as mx, numpy as np\n"
        "a = np.random.default_rng(0).normal(size=(2, 70, 130)).astype('f')\n"
        "exact = a.astype('d') @ a.astype('d').swapaxes(1, 2)\n"
        "x = mx.array(a); y = np.array(x @ x.swapaxes(1, 2))\n"
        "print(abs(y - exact).max() < 1e-4, blas.in_use())"
    )
    out = run_python(code).stdout
    if "no fast one found" in out:
        pytest.skip("no fast BLAS on this machine")
    assert out.startswith("True ")
    assert "OpenBLAS" in out or "MKL" in out


def test_pytorch_goes_on_working():
    """It would take the batched products of a newer OpenBLAS for its own, and crash."""
    pytest.importorskip("torch", reason="torch is not installed (the extra 'parity')")
    code = (
        "import mlx_rgemma, mlx.core, torch\n"
        "print(torch.bmm(torch.ones(3, 5, 16), torch.ones(3, 16, 16)).sum().item())"
    )
    assert float(run_python(code).stdout) == 3 * 5 * 16 * 16


def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(copied: Path, monkeypatch):
    monkeypatch.delenv(blas.SPINNING[0], raising=False)
    show = "import os, mlx_rgemma, mlx.core; print(os.environ.get('OPENBLAS_THREAD_TIMEOUT'))"
    run = run_python(show, MLX_RGEMMA_BLAS=str(copied))
    assert run.stdout.strip() == blas.SPINNING[1]
    run = run_python(show, MLX_RGEMMA_BLAS=str(copied), OPENBLAS_THREAD_TIMEOUT="20")
    assert run.stdout.strip() == "20"
    run = run_python(show, MLX_RGEMMA_BLAS="off")
    assert run.stdout.strip() == "None"
