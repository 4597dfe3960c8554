"""A fast BLAS for MLX on Linux, whose wheel brings the reference one: 50 times slower.

MLX takes `cblas_sgemm` from whatever library offered it first to the whole process. So a fast one
is opened in the moment in which `mlx.core` is about to be loaded: by a finder that `install` puts
in front of Python's own, and that steps aside after it. Where MLX was loaded before this package,
and on a Mac, nothing is done.

The environment variable ``MLX_RGEMMA_BLAS`` decides:

* ``auto`` (the default): the first library that is found, exports the names that MLX needs, and
  chooses its code by the processor it meets. Anything else might die on an illegal instruction.
* ``off``: MLX's own.
* a path: that library, or an error.

What happens is logged at debug level; `in_use` says which library MLX really calls.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from mlx_rgemma.allocation import keep_freed_memory
from mlx_rgemma.errors import UserError

VARIABLE = "MLX_RGEMMA_BLAS"
NEEDED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""What MLX calls. Libraries for other packages often have them under a prefix only."""

OPENBLAS_BY_PROCESSOR = "gotoblas_dynamic_init"
"""What OpenBLAS exports when it holds the code of many processors and chooses when it is opened."""

MKL_VERSION = "mkl_get_version_string"

SPINNING = ("OPENBLAS_THREAD_TIMEOUT", "16")
"""Threads of OpenBLAS that wait for a product spin for 2^26 cycles, on cores that MLX has use for
in between: what is no product. After 2^16 they sleep, and a prompt is read a tenth faster."""

BATCHED = "cblas_sgemm_batch"
"""What newer OpenBLAS exports as MKL does. PyTorch would take it for its own MKL's, and crash."""


def install() -> None:
    """Have a fast BLAS opened just before `mlx.core` is first imported."""
    if not sys.platform.startswith("linux"):
        return
    if "mlx.core" in sys.modules:
        _log("mlx.core was imported before mlx_rgemma: its BLAS is left as it is")
    elif not any(isinstance(finder, _BeforeMLX) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeMLX())


class _BeforeMLX:
    """Finds no module; knows when `mlx.core` is wanted."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "mlx.core":
            keep_freed_memory()
            open_fast()
            sys.meta_path.remove(self)
        return None


def open_fast() -> Path | None:
    """Open the library that the environment asks for, for the whole process.

    Returns:
        The library; None where none is wanted or found.

    Raises:
        UserError: If `MLX_RGEMMA_BLAS` names a library that cannot serve.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "off":
        _log("%s is off", VARIABLE)
        return None
    if wanted != "auto":
        return _open_named(wanted)
    for path in candidates():
        fault = _fault(path) or _risk(path)
        if not fault:
            fault = _open(path)
        if not fault:
            return path
        _log("%s: %s", path, fault)
    _log("no fast BLAS found: docs/cpu.md says how to get one")
    return None


def _open_named(wanted: str) -> Path:
    path = Path(wanted).expanduser()
    expected = f"expected auto, off or a library that exports {NEEDED[0]}"
    if not path.is_file():
        raise UserError(f"[blas] {VARIABLE} is {wanted!r}: no such file; {expected}.")
    fault = _fault(path) or _open(path)
    if fault:
        raise UserError(f"[blas] {VARIABLE} is {wanted!r}: {fault}; {expected}.")
    return path


def candidates() -> Iterator[Path]:
    """Files that may be a fast BLAS, best first; each once, and only such as exist."""
    seen = set()
    for folder, pattern in _places():
        for path in sorted(folder.glob(pattern)):
            real = path.resolve()
            if real.is_file() and real not in seen:
                seen.add(real)
                yield path


def _places() -> Iterator[tuple[Path, str]]:
    import sysconfig

    # Packages of this Python, from the extra `cpu` or installed for something else.
    for entry in sys.path:
        yield Path(entry or ".") / "ngsolve_openblas", "libopenblas*.so*"
    environment = Path(sysconfig.get_path("data")) / "lib"
    yield environment, "libopenblas.so.0"  # conda
    yield environment, "libmkl_rt.so.*"
    # The system's. Threads of OpenMP do not survive a fork, so that kind comes last.
    machine = os.uname().machine
    debian = Path("/usr/lib") / f"{machine}-linux-gnu"
    for kind in ("pthread", "serial", "openmp"):
        yield debian / f"openblas-{kind}", "libopenblas.so.0"
    for folder in (debian, Path("/usr/lib64"), Path("/usr/lib")):
        for name in ("libopenblasp.so.0", "libopenblas.so.0", "libopenblaso.so.0"):
            yield folder, name


def _fault(path: Path) -> str:
    """Why a library cannot take the place of MLX's; empty when it can."""
    from mlx_rgemma.elf import defined_symbols

    try:
        missing = set(NEEDED) - defined_symbols(path, NEEDED)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"does not export {min(missing)}" if missing else ""


def _risk(path: Path) -> str:
    """Why a library is opened only where the user names it; empty for one without risk."""
    from importlib.util import find_spec

    from mlx_rgemma.elf import defined_symbols

    found = defined_symbols(path, (OPENBLAS_BY_PROCESSOR, MKL_VERSION, BATCHED))
    if not found & {OPENBLAS_BY_PROCESSOR, MKL_VERSION}:
        return "its code is for one processor only"
    if BATCHED in found and MKL_VERSION not in found and find_spec("torch") is not None:
        return "PyTorch is installed, and would crash in its batched products"
    return ""


def _open(path: Path) -> str:
    """Open a library for the whole process; why that failed, or nothing."""
    import ctypes

    os.environ.setdefault(*SPINNING)
    try:
        library = ctypes.CDLL(str(path))
        if "USE64BITINT" in _openblas(library, "config"):
            return "is built for 64-bit integers"
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return f"cannot be opened ({error})"
    _log("opened %s: %s", path, _describe(path))
    return ""


def in_use() -> str:
    """The BLAS that MLX calls in this process: its name, version, threads and file.

    Looked up in the memory of MLX itself, whoever opened the library. Imports `mlx.core`.
    """
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    path = _called_by_mlx()
    if path is None:
        return "unknown: MLX calls no cblas_sgemm of another library"
    text = f"{_describe(path)}, {path}"
    own = path.parent.name.startswith("mlx")
    if not own or os.environ.get(VARIABLE) == "off":
        return text
    return f"{text} ({_reason()})"


def _reason() -> str:
    for path in candidates():
        if not _fault(path) and not _risk(path):
            return f"mlx.core was imported before mlx_rgemma, which would have opened {path}"
    return "no fast one found: docs/cpu.md"


def _called_by_mlx() -> Path | None:
    """The file of the function that MLX calls to multiply matrices."""
    import ctypes
    from importlib import import_module

    from mlx_rgemma.elf import import_slots

    import_module("mlx.core")

    base, caller = _loaded("libmlx.so")
    if caller is None:
        return None
    for slot in import_slots(caller, NEEDED[0]):
        address = ctypes.c_void_p.from_address(base + slot).value
        for start, end, file in _mappings():
            if address is not None and start <= address < end and file != caller:
                return file
    return None


def _loaded(name: str) -> tuple[int, Path | None]:
    """Where a library of this process begins, and its file."""
    for start, _, file in _mappings():
        if file.name == name:
            return start, file
    return 0, None


def _mappings() -> Iterator[tuple[int, int, Path]]:
    """Which addresses hold which files: begin, end, file."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                start, end = (int(number, 16) for number in fields[0].split("-"))
                yield start, end, Path(fields[5])


def _describe(path: Path) -> str:
    """Name, version, processor and threads of a library that is open."""
    import ctypes

    library = ctypes.CDLL(str(path))
    config = _openblas(library, "config")
    if config:
        version = " ".join(config.split()[:2])
        threads = library.openblas_get_num_threads()
        return f"{version} ({_openblas(library, 'corename')}, {threads} threads)"
    if hasattr(library, MKL_VERSION):
        text = ctypes.create_string_buffer(200)
        library.mkl_get_version_string(text, ctypes.c_int(len(text)))
        words = text.value.decode(errors="replace").split()
        version = next((w for w in words if w[0].isdigit()), "")
        return f"MKL {version} ({library.mkl_get_max_threads()} threads)"
    if path.parent.name.startswith("mlx"):
        return "the reference BLAS of MLX's wheel"
    return "a BLAS of unknown make"


def _openblas(library: Any, what: str) -> str:
    """``openblas_get_<what>()`` of OpenBLAS; empty of another library."""
    import ctypes

    function = getattr(library, f"openblas_get_{what}", None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return (function() or b"").decode(errors="replace")


def _log(message: str, *details: object) -> None:
    import logging

    logging.getLogger(__name__).debug(message, *details)
