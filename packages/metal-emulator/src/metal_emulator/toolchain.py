"""The C++ compiler, and the cache of its outputs.

The name of a cached file is a hash of its inputs: the source of the kernel, the headers of this
package, the version of MLX, the compiler and its flags. Processes can share a cache: each file is
written under a temporary name and then renamed.

Environment:
    METAL_EMULATOR_CACHE: the cache directory, `~/.cache/metal_emulator` if unset.
    METAL_EMULATOR_CXX: the compiler, with its leading arguments.
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

KERNEL_FILE = "kernel.metal"  # file name of the source in the compiler's messages

_LANGUAGE = (
    "-std=c++17",
    "-fPIC",
    "-fsigned-char",
    "-w",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
)
# No implicit fused multiply-add; private variables start with a pattern, not with zero.
_NUMERICS = ("-ffp-contract=off", "-ftrivial-auto-var-init=pattern")
# No optimisation that would hide a call or an access of the source from the checks.
_CHECKED = (
    "-fsanitize=thread",
    "-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow,alignment,null"
    ",float-cast-overflow,bool",
    "-fno-inline",
    "-fno-optimize-sibling-calls",
    "-DMTL_CHECKED",
)
# Literals without a suffix are float, as in Metal.
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
        "-fdebug-info-for-profiling",  # distinguishes the calls on one line
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
    ),
}
# gcc 12 can initialise private variables with a pattern; clang 15 reports memcpy.
_OLDEST = {"gcc": 12, "clang": 15}
_COMMAND = {"gcc": "g++", "clang": "clang++"}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that can build kernels.

    Attributes:
        command: the program and its leading arguments.
        family: `gcc` or `clang`.
        version: its version.
    """

    command: tuple[str, ...]
    family: str
    version: str

    def flags(self, checked: bool) -> tuple[str, ...]:
        """Return the flags of every kernel."""
        flags: tuple[str, ...] = (*_LANGUAGE, *_NUMERICS, *_OF_FAMILY[self.family])
        if checked:
            flags += (*_CHECKED, *_CHECKED_OF_FAMILY[self.family])
        return (*flags, "-O1", "-g1", "-gdwarf-4", "-fPIC", "-fno-plt", "-fvisibility=hidden")


def compiler(family: str | None = None, oldest: int = 0) -> tuple[Compiler | None, str]:
    """Return the C++ compiler, or None and the reason.

    Args:
        family: `gcc` or `clang`; None accepts both and prefers g++, which is faster.
        oldest: minimum major version.
    """
    chosen = os.environ.get("METAL_EMULATOR_CXX", "") if family is None else ""
    return _find(platform.system(), os.environ.get("PATH", ""), chosen, family, oldest)


@functools.cache
def _find(
    system: str, path: str, chosen: str, family: str | None, oldest: int
) -> tuple[Compiler | None, str]:
    """Return the compiler for this environment; cached, as every launch needs it."""
    if system != "Linux":
        return None, f"kernels run on Linux only, this is {system}"
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
    """Return the compiler.

    Raises:
        KernelError: there is none, with the reason.
    """
    found, reason = compiler()
    if found is None:
        raise KernelError("compiler", [Finding(f"cannot compile kernels: {reason}")])
    return found


@functools.cache
def cache_directory() -> Path:
    """Return the cache directory; it is created if missing."""
    chosen = os.environ.get("METAL_EMULATOR_CACHE")
    if chosen:
        directory = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(base) / "metal_emulator"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        directory = Path(tempfile.gettempdir()) / f"metal_emulator_{os.getuid()}"
        directory.mkdir(parents=True, exist_ok=True)
    return directory.resolve()


def digest(*parts: str) -> str:
    """Return the hash of some texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def make(path: Path, produce: Callable[[Path, Path], None]) -> Path:
    """Create `path` atomically with `produce(scratch, out)`, unless it exists."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
            out = Path(scratch) / path.name
            produce(Path(scratch), out)
            os.replace(out, path)
    return path


def write_text(text: str) -> Callable[[Path, Path], None]:
    """Return a function for `make` that writes this text."""

    def produce(_: Path, out: Path) -> None:
        out.write_text(text)

    return produce


def run_compiler(command: list[str], kernel: str = "compiler", source: str = "") -> None:
    """Run a compiler command.

    Raises:
        KernelError: with its messages; those about the kernel quote the lines of `source`.
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
