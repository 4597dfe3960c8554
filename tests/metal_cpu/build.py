"""Compile a kernel's source to a shared library, once.

Everything compiled is kept in a cache directory under a name made of its content: the kernel's text, the
headers of this package and of MLX, the compiler and its flags. Several processes may fill one cache: each
file is written under a name of its own and then renamed.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .errors import Finding, KernelError, finding
from .source import VECTOR_FIELDS, Parameter, for_execution, parameters

HERE = Path(__file__).resolve().parent
MLX_INCLUDE = Path(mx.__file__).resolve().parent / "include"
RUNTIME = HERE / "runtime"
STDLIB = HERE / "stdlib"
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
_NUMERICS = ("-ffp-contract=off", "-ftrivial-auto-var-init=pattern")
# Calls keep their frames and dead operations their checks, so that what the source says is what is watched.
_CHECKED = (
    "-fsanitize=thread",
    "-fsanitize=bounds,shift,integer-divide-by-zero,signed-integer-overflow,alignment,null"
    ",float-cast-overflow,bool",
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
        "-fno-inline",
        "-fno-tree-dce",
        "-fno-tree-dse",
        "-fno-tree-sink",
        "-fno-tree-vectorize",
        "-fno-tree-slp-vectorize",
    ),
    "clang": ("-fno-inline", "-fno-vectorize", "-fno-slp-vectorize"),
}
_SMALLEST = {"gcc": 12, "clang": 14}


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

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])

    def flags(self, checked: bool) -> tuple[str, ...]:
        """What every kernel is compiled with."""
        flags = (*_LANGUAGE, *_NUMERICS, *_OF_FAMILY[self.family])
        if checked:
            flags += (*_CHECKED, *_CHECKED_OF_FAMILY[self.family])
        return (*flags, "-O1", "-g1", "-gdwarf-4", "-fvisibility=hidden")


@dataclass(frozen=True)
class Library:
    """A compiled kernel.

    Attributes:
        path: the shared library; it exports `mtl_entry` and `mtl_set_constants`.
        parameters: the kernel's parameters, in order.
        source: the generated text, for messages.
    """

    path: Path
    parameters: tuple[Parameter, ...]
    source: str


def compiler(family: str | None = None) -> tuple[Compiler | None, str]:
    """The C++ compiler to use, or None and the reason why there is none.

    Args:
        family: `gcc` or `clang`; either will do if None, and g++ is tried first: it is faster.
    """
    if platform.system() != "Linux":
        return None, f"kernels are executed on Linux only, this is {platform.system()}"
    chosen = os.environ.get("MLX_RGEMMA_METAL_CPU_CXX")
    if chosen and family is None:
        return _probe(tuple(chosen.split()))
    commands = {"gcc": _candidates("g++"), "clang": _candidates("clang++")}
    reasons = []
    for name in [family] if family else ["gcc", "clang"]:
        for command in commands[name]:
            found, reason = _probe((command,))
            if found is not None and found.family == name:
                return found, ""
            reasons.append(reason)
        if not commands[name]:
            reasons.append(f"no {'g++' if name == 'gcc' else 'clang++'} on the PATH")
    return None, "; ".join(reasons)


def required_compiler() -> Compiler:
    """The compiler, or an error that says why there is none."""
    found, reason = compiler()
    if found is None:
        raise KernelError("compiler", [Finding(f"cannot compile kernels: {reason}")])
    return found


def build(source: str, function: str, instance: str = "", checked: bool = False) -> Library:
    """Compile kernel `function` of a generated source.

    Args:
        source: the Metal text, as captured.
        function: the kernel's name in it.
        instance: the expression that names the instantiated function, if it is a template.
        checked: instrument every access and call for the checks at run time.

    Raises:
        KernelError: with the compiler's messages, at the lines of the source.
    """
    found = required_compiler()
    params = tuple(parameters(source, function))
    text = _translation_unit(source, params, instance or function)
    flags = found.flags(checked)
    runtime = runtime_library(found)
    key = _digest(text, *found.command, found.version, *flags, runtime.name, _headers_digest())
    path = cache_directory() / f"kernel-{key}.so"

    def compile_kernel(scratch: Path, out: Path) -> None:
        cpp = scratch / "kernel.cpp"
        cpp.write_text(text)
        # Two steps: at the link the sanitizers' flags would bring the sanitizers' own runtimes.
        objects = str(scratch / "kernel.o")
        compile_command = [*found.command, *flags, *_include_flags(), "-pipe", "-c", str(cpp)]
        _run([*compile_command, "-o", objects], function, source)
        link_command = [*found.command, "-shared", objects, str(runtime), "-o", str(out)]
        _run([*link_command, "-Wl,-rpath,$ORIGIN", "-Wl,-Bsymbolic"], function, source)

    _make(path, compile_kernel)
    return Library(path, params, source)


def runtime_library(found: Compiler) -> Path:
    """The runtime, compiled; kernels link with it by name, side by side in the cache."""
    files = sorted([*RUNTIME.iterdir(), STDLIB / "metal_cpu" / "abi.h"])
    key = _digest(*(f.read_text() for f in files), *found.command, found.version)
    path = cache_directory() / f"libruntime-{key}.so"

    def compile_runtime(scratch: Path, out: Path) -> None:
        sources = [str(f) for f in files if f.suffix == ".cpp"]
        command = [*found.command, "-std=c++17", "-O2", "-g1", "-fPIC", "-shared"]
        command += [f"-I{STDLIB / 'metal_cpu'}", *sources, "-o", str(out), "-ldl"]
        _run([*command, f"-Wl,-soname,{path.name}"], "runtime", "")

    _make(path, compile_runtime)
    return path


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


def _candidates(base: str) -> list[str]:
    newest_first = [f"{base}-{version}" for version in range(24, 11, -1)]
    return [c for c in [base, *newest_first] if shutil.which(c)]


@functools.cache
def _probe(command: tuple[str, ...]) -> tuple[Compiler | None, str]:
    name = " ".join(command)
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except OSError as error:
        return None, f"{name}: {error.strerror}"
    family = "clang" if "clang" in result.stdout else "gcc"
    match = re.search(r"(\d+)\.\d+(?:\.\d+)?", result.stdout)
    if result.returncode or match is None:
        return None, f"{name} --version failed"
    if int(match.group(1)) < _SMALLEST[family]:
        return None, f"{name} is {family} {match.group()}, {_SMALLEST[family]} or newer is needed"
    return Compiler(command, family, match.group()), ""


def _translation_unit(source: str, params: Sequence[Parameter], instance: str) -> str:
    arguments = ", ".join(_argument(i, p) for i, p in enumerate(params))
    return f"""#include <metal_stdlib>
using namespace metal;
#include "mlx/backend/metal/kernels/utils.h"
#line 1 "{KERNEL_FILE}"
{for_execution(source)}
#line 1 "entry.cpp"
using mtl_signature = mtl::signature<decltype(&{instance})>;
#define MTL_EXPORT extern "C" __attribute__((visibility("default")))
MTL_EXPORT void mtl_set_constants() {{
  for (auto* c = mtl::on_constants_set::first; c; c = c->next) c->set();
}}
MTL_EXPORT void mtl_entry(void** buffers, const mtl_thread* self) {{
  {instance}({arguments});
}}
"""


def _argument(position: int, parameter: Parameter) -> str:
    kind = f"mtl_signature::argument<{position}>"
    if parameter.index is not None:
        return f"mtl::buffer<{kind}>::from(buffers[{parameter.index}])"
    if parameter.field in VECTOR_FIELDS:
        return f"mtl::position<{kind}>(self->{parameter.field})"
    return f"{kind}(self->{parameter.field})"


def _include_flags() -> list[str]:
    return [f"-I{STDLIB}", f"-I{MLX_INCLUDE}"]


@functools.cache
def _headers_digest() -> str:
    files = sorted(f for f in STDLIB.rglob("*") if f.is_file())
    return _digest(mx.__version__, *(f.read_text() for f in files))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _make(path: Path, produce: Callable[[Path, Path], None]) -> None:
    """Have `produce(scratch, out)` write a file that then appears at `path` whole."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        out = Path(scratch) / path.name
        produce(Path(scratch), out)
        os.replace(out, path)


def _run(command: list[str], kernel: str, source: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return
    pattern = r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$"
    found = []
    for file, line, message in re.findall(pattern, result.stderr, flags=re.M):
        if file == KERNEL_FILE:
            found.append(finding(f"does not compile: {message}", int(line), source))
        else:
            found.append(Finding(f"does not compile: {Path(file).name}:{line}: {message}"))
    raise KernelError(kernel, found or [Finding("does not compile:\n" + result.stderr[:4000])])
