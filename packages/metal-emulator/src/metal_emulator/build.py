"""Compile a kernel to a shared library, with a cache.

The library of a kernel links to that of the runtime, in the same cache folder. With g++ the headers
that every kernel includes are precompiled.

Where MLX is installed, a kernel sees MLX's `utils.h`, as on a Mac. Without MLX it sees the standard
library only.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .source import VECTOR_FIELDS, Parameter, for_execution, parameters
from .toolchain import (
    KERNEL_FILE,
    Compiler,
    cache_directory,
    digest,
    make,
    required_compiler,
    run_compiler,
    write_text,
)

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"
STDLIB = HERE / "stdlib"


def _mlx_include() -> Path | None:
    """Return the include folder of the installed MLX, or None; does not import MLX."""
    try:
        found = importlib.util.find_spec("mlx.core")
    except ModuleNotFoundError:
        return None
    if found is None or found.origin is None:
        return None
    return Path(found.origin).resolve().parent / "include"


MLX_INCLUDE = _mlx_include()
INCLUDE_FLAGS = (f"-I{STDLIB}", *([f"-I{MLX_INCLUDE}"] if MLX_INCLUDE else []))

PRELUDE = "#include <metal_stdlib>\nusing namespace metal;\n"
if MLX_INCLUDE:  # as MLX begins the source of a custom kernel
    PRELUDE += '#include "mlx/backend/metal/kernels/utils.h"\n'


@dataclass(frozen=True)
class Library:
    """A compiled kernel.

    Attributes:
        path: the shared library; it exports `mtl_entry` and `mtl_set_constants`.
        runtime: the library of the runtime that it links to.
        parameters: the parameters of the kernel, in order.
        source: the Metal source, for messages.
    """

    path: Path
    runtime: Path
    parameters: tuple[Parameter, ...]
    source: str


def build(source: str, function: str, instance: str = "", checked: bool = False) -> Library:
    """Compile kernel `function` of a Metal source.

    Args:
        source: the Metal source.
        function: name of the kernel function.
        instance: expression of the instantiated function, if it is a template.
        checked: instrument accesses and calls for the checks at run time.

    Raises:
        KernelError: with the compiler's messages and the lines of the source.
    """
    return _build(required_compiler(), source, function, instance or function, checked)


@functools.lru_cache(maxsize=1024)
def _build(found: Compiler, source: str, function: str, instance: str, checked: bool) -> Library:
    params = tuple(parameters(source, function))
    text = _translation_unit(source, params, instance)
    flags = found.flags(checked)
    runtime = _runtime_library(found)
    prelude = precompiled_prelude(found, flags)
    key = digest(text, prelude.name, runtime.name)

    def compile_kernel(scratch: Path, out: Path) -> None:
        cpp = scratch / "kernel.cpp"
        cpp.write_text(text)
        objects = scratch / "kernel.o"
        compile_command = [*found.command, *flags, *INCLUDE_FLAGS, "-include", str(prelude)]
        compile_command += ["-pipe", "-c", str(cpp), "-o", str(objects)]
        run_compiler(compile_command, function, source)
        # Link without the sanitizers' flags, which would add the sanitizers' own runtimes.
        link_command = [*found.command, "-shared", str(objects), str(runtime), "-o", str(out)]
        run_compiler([*link_command, "-Wl,-rpath,$ORIGIN", "-Wl,-Bsymbolic"], function)

    path = make(cache_directory() / f"kernel-{key}.so", compile_kernel)
    return Library(path, runtime, params, source)


@functools.cache
def _runtime_library(found: Compiler) -> Path:
    files = sorted([*RUNTIME.iterdir(), STDLIB / "metal_emulator" / "abi.h"])
    key = digest(*(f.read_text() for f in files), *found.command, found.version)
    path = cache_directory() / f"libruntime-{key}.so"
    flags = ["-std=c++17", "-O2", "-g1", "-fPIC", f"-I{STDLIB / 'metal_emulator'}"]

    def compile_runtime(scratch: Path, out: Path) -> None:
        def compile_part(source: Path) -> str:
            part = str(scratch / f"{source.stem}.o")
            run_compiler([*found.command, *flags, "-c", str(source), "-o", part])
            return part

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(compile_part, [f for f in files if f.suffix == ".cpp"]))
        link_command = [*found.command, "-shared", *parts, "-o", str(out), "-ldl", "-lrt"]
        run_compiler([*link_command, f"-Wl,-soname,{path.name}"])

    return make(path, compile_runtime)


@functools.cache
def precompiled_prelude(found: Compiler, flags: tuple[str, ...]) -> Path:
    """Return the header to `-include`; g++ finds its precompiled form in the same folder."""
    headers = sorted(f for f in STDLIB.rglob("*") if f.is_file())
    texts = [f.read_text() for f in headers]
    mlx = version("mlx") if MLX_INCLUDE else ""
    key = digest(*texts, PRELUDE, mlx, *INCLUDE_FLAGS, *found.command, found.version, *flags)
    path = cache_directory() / f"prelude-{key}.h"

    def compile_prelude(scratch: Path, out: Path) -> None:
        command = [*found.command, *flags, *INCLUDE_FLAGS, "-x", "c++-header", str(path)]
        run_compiler([*command, "-o", str(out)])

    make(path, write_text(PRELUDE))
    if found.family == "gcc":
        make(path.with_suffix(".h.gch"), compile_prelude)
    return path


def _translation_unit(source: str, params: Sequence[Parameter], instance: str) -> str:
    arguments = ", ".join(_argument(i, p) for i, p in enumerate(params))
    return f"""#line 1 "{KERNEL_FILE}"
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
    if parameter.is_buffer:
        return f"mtl::buffer<{kind}>::from(buffers[{parameter.slot}])"
    if parameter.field in VECTOR_FIELDS:
        return f"mtl::position<{kind}>(self->{parameter.field})"
    return f"{kind}(self->{parameter.field})"
