"""The address-space check: clang compiles the kernel with address spaces as part of its types.

Needs clang 17 or newer, whose bfloat has arithmetic.
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
    """The clang that can do it, or None and the reason why there is none."""
    return compiler("clang", OLDEST_CLANG)


def type_findings(found: Compiler, source: str, instance: str) -> list[Finding]:
    """What clang rejects in the generated text.

    Args:
        found: from `type_checker`.
        source: the generated text.
        instance: the expression that names the kernel function.
    """
    text = f'{PRELUDE}#line 1 "{KERNEL_FILE}"\n{for_type_check(source)}\n'
    text += f"auto mtl_kernel = &{instance};\n"
    with tempfile.TemporaryDirectory() as scratch:
        cpp = Path(scratch) / "kernel.cpp"
        cpp.write_text(text)
        headers = [f"-I{_mlx_overlay()}", *INCLUDE_FLAGS]
        result = subprocess.run(
            [*found.command, *_FLAGS, *headers, str(cpp)], capture_output=True, text=True
        )
    findings = []
    for entry in messages(result.stderr, source):
        # Metal turns a float into a half unasked, but not into a bfloat.
        loses_precision = "implicit conversion loses floating-point precision" in entry.message
        if not loses_precision or re.search(r"to '\S*(?:bfloat|bf16)\S*'", entry.message):
            findings.append(entry)
    if result.returncode and not findings:
        findings.append(finding("does not compile:\n" + result.stderr[:2000], 0, source))
    return findings


@functools.cache
def _mlx_overlay() -> Path:
    """MLX's `utils.h` with parameters `constant T strides[2]` as pointers: clang takes no other."""
    name = Path("mlx/backend/metal/kernels/utils.h")
    text = re.sub(
        r"constant const (\w+) (\w+)\[\d\]",
        r"constant const \1* \2",
        (MLX_INCLUDE / name).read_text(),
    )
    root = cache_directory() / f"overlay-{digest(text)}"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    make(root / name, write_text(text))
    return root
