"""Check address spaces with clang, as part of the types.

Needs clang 17 or newer, which has arithmetic on bfloat.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

from .build import INCLUDE_FLAGS, MLX_INCLUDE, PRELUDE
from .compile_check import messages
from .errors import Finding, finding
from .source import for_type_check
from .toolchain import KERNEL_FILE, Compiler, cache_directory, compiler, digest, make, write_text

OLDEST_CLANG = 17
_FLAGS = (
    "-std=c++14",
    "-DMTL_TYPE_CHECK",
    "-fsyntax-only",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-lax-vector-conversions",
    "-ferror-limit=30",
    "-Xclang",
    "-cl-single-precision-constant",
    "-Wno-everything",
    "-Wuninitialized",
    "-Wvla-extension",
    "-Winfinite-recursion",
    "-Wimplicit-float-conversion",
)


def type_checker() -> tuple[Compiler | None, str]:
    """Return a clang for the check, or None and the reason."""
    return compiler("clang", OLDEST_CLANG)


def type_findings(found: Compiler, source: str, instance: str) -> list[Finding]:
    """Return clang's errors and relevant warnings.

    Args:
        found: from `type_checker`.
        source: the Metal source.
        instance: expression of the kernel function.
    """
    text = f'{PRELUDE}#line 1 "{KERNEL_FILE}"\n{for_type_check(source)}\n'
    text += f"auto mtl_kernel = &{instance};\n"
    with tempfile.TemporaryDirectory() as scratch:
        cpp = Path(scratch) / "kernel.cpp"
        cpp.write_text(text)
        headers = [*_overlay_flags(), *INCLUDE_FLAGS]
        result = subprocess.run(
            [*found.command, *_FLAGS, *headers, str(cpp)], capture_output=True, text=True
        )
    findings = []
    for entry in messages(result.stderr, source):
        # Metal converts a float to a half implicitly, but not to a bfloat.
        loses_precision = "implicit conversion loses floating-point precision" in entry.message
        if not loses_precision or re.search(r"to '\S*(?:bfloat|bf16)\S*'", entry.message):
            findings.append(entry)
    if result.returncode and not findings:
        findings.append(finding("does not compile:\n" + result.stderr[:2000], 0, source))
    return findings


@functools.cache
def _overlay_flags() -> tuple[str, ...]:
    """Return the include flags of a changed `utils.h` of MLX.

    Its parameters `constant T strides[2]` become pointers: clang does not accept an array here.
    """
    if MLX_INCLUDE is None:
        return ()
    name = Path("mlx/backend/metal/kernels/utils.h")
    text = re.sub(
        r"constant const (\w+) (\w+)\[\d\]",
        r"constant const \1* \2",
        (MLX_INCLUDE / name).read_text(),
    )
    root = cache_directory() / f"overlay-{digest(text)}"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    make(root / name, write_text(text))
    return (f"-I{root}",)
