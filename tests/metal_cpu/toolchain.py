"""The C++ compiler, and the cache of what it makes.

Everything compiled is kept under a name made of its content: the kernel's text, the headers of this
package, MLX's version, the compiler and its flags. Several processes may fill one cache: each file
is written under a name of its own and then renamed.

Environment:
    MLX_RGEMMA_METAL_CPU_CACHE: the cache directory.
    MLX_RGEMMA_METAL_CPU_CXX: the compiler to use, with its leading arguments.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import Finding, KernelError, finding

KERNEL_FILE = "kernel.metal"  # what the compiler calls the generated source in its messages

_LANGUAGE = (
    "-std=c++17",
    "-fPIC",
    "-fsigned-char",
    "-w",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
)
# No fused multiply-add that the source does not ask for; private variables start as nonsense.
_NUMERICS = ("-ffp-contract=off", "-ftrivial-auto-var-init=pattern")
# Calls keep their frames and dead operations their checks: what the source says is what is watched.
_CHECKED = (
    "-fsanitize=thread",
    "-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow,alignment,null"
    ",float-cast-overflow,bool",
    "-fno-inline",
    "-fno-optimize-sibling-calls",
    "-DMTL_CHECKED",
)
# Literals without suffix are float, as in Metal.
_OF_FAMILY = {
    "gcc": ("-fsingle-precision-constant", "-fno-gnu-unique"),
    "clang": ("-Xclang", "-cl-single-precision-constant"),
}
_CHECKED_OF_FAMILY = {
    "gcc": (
        "-fno-tree-dce",
        "-fno-tree-dse",
        "-fno-tree-sink",
        "-fno-thread-jumps",
        "-fno-tree-vectorize",
        "-fno-tree-slp-vectorize",
    ),
    "clang": (
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-fdebug-info-for-profiling",  # tells the calls of one line apart
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
    ),
}
# gcc 12 initialises private variables with a pattern; clang 15 reports what memcpy does.
_OLDEST = {"gcc": 12, "clang": 15}
_COMMAND = {"gcc": "g++", "clang": "clang++"}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that can build kernels.

    Attributes:
        command: how it is called.
        family: `gcc` or `clang`.
        version: its version, as it says it.
    """

    command: tuple[str, ...]
    family: str
    version: str

    def flags(self, checked: bool) -> tuple[str, ...]:
        """What every kernel is compiled with."""
        flags: tuple[str, ...] = (*_LANGUAGE, *_NUMERICS, *_OF_FAMILY[self.family])
        if checked:
            flags += (*_CHECKED, *_CHECKED_OF_FAMILY[self.family])
        return (*flags, "-O1", "-g1", "-gdwarf-4", "-fPIC", "-fno-plt", "-fvisibility=hidden")


def compiler(family: str | None = None, oldest: int = 0) -> tuple[Compiler | None, str]:
    """The C++ compiler to use, or None and the reason why there is none.

    Args:
        family: `gcc` or `clang`; either will do if None, and g++ is tried first: it is faster.
        oldest: the least major version.
    """
    chosen = os.environ.get("MLX_RGEMMA_METAL_CPU_CXX", "") if family is None else ""
    return _find(platform.system(), os.environ.get("PATH", ""), chosen, family, oldest)


@functools.cache
def _find(
    system: str, path: str, chosen: str, family: str | None, oldest: int
) -> tuple[Compiler | None, str]:
    """`compiler`, for this state of the environment: it is asked for at every launch."""
    if system != "Linux":
        return None, f"kernels are executed on Linux only, this is {system}"
    if chosen:
        return _probe(tuple(chosen.split()), oldest)
    reasons = []
    for name in [family] if family else ["gcc", "clang"]:
        candidates = _candidates(_COMMAND[name], path)
        if not candidates:
            reasons.append(f"no {_COMMAND[name]} on the PATH")
        for command in candidates:
            found, reason = _probe((command,), oldest)
            if found is not None and found.family == name:
                return found, ""
            reasons.append(reason)
    return None, "; ".join(reasons)


def required_compiler() -> Compiler:
    """The compiler, or an error that says why there is none."""
    found, reason = compiler()
    if found is None:
        raise KernelError("compiler", [Finding(f"cannot compile kernels: {reason}")])
    return found


@functools.cache
def cache_directory() -> Path:
    """Where compiled kernels are kept; made if need be."""
    chosen = os.environ.get("MLX_RGEMMA_METAL_CPU_CACHE")
    if chosen:
        directory = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(base) / "mlx_rgemma" / "metal_cpu"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.gettempdir()) / f"mlx_rgemma_metal_cpu_{os.getuid()}"
        directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def digest(*parts: str) -> str:
    """A name for what these texts make."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def make(path: Path, produce: Callable[[Path, Path], None]) -> Path:
    """Have `produce(scratch, out)` write a file; it appears at `path` whole. Not if it is there."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
            out = Path(scratch) / path.name
            produce(Path(scratch), out)
            os.replace(out, path)
    return path


def write_text(text: str) -> Callable[[Path, Path], None]:
    """For `make`: a file with this text."""

    def produce(_: Path, out: Path) -> None:
        out.write_text(text)

    return produce


def run_compiler(command: list[str], kernel: str = "compiler", source: str = "") -> None:
    """Run it.

    Raises:
        KernelError: with its messages, at the lines of `source` where they belong there.
    """
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return
    found = []
    pattern = r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$"
    for file, line, message in re.findall(pattern, result.stderr, flags=re.M):
        if file == KERNEL_FILE:
            found.append(finding(f"does not compile: {message}", int(line), source))
        else:
            found.append(Finding(f"does not compile: {Path(file).name}:{line}: {message}"))
    raise KernelError(kernel, found or [Finding("does not compile:\n" + result.stderr[:4000])])


def _candidates(base: str, path: str) -> list[str]:
    newest_first = [f"{base}-{version}" for version in range(24, 11, -1)]
    return [c for c in [base, *newest_first] if shutil.which(c, path=path)]


@functools.cache
def _probe(command: tuple[str, ...], oldest: int) -> tuple[Compiler | None, str]:
    name = " ".join(command)
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        return None, f"{name}: {error.strerror}"
    family = "clang" if "clang" in result.stdout else "gcc"
    match = re.search(r"(\d+)\.\d+(?:\.\d+)?", result.stdout)
    if result.returncode or match is None:
        return None, f"{name} --version failed"
    needed = max(oldest, _OLDEST[family])
    if int(match.group(1)) < needed:
        return None, f"{name} is {family} {match.group()}, {needed} or newer is needed"
    return Compiler(command, family, match.group()), ""
