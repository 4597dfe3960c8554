"""Find errors, recursion and uninitialised variables with a C++ compiler.

In this pass a float does not convert to a bfloat implicitly, as in Metal, and no function is
inlined.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from .build import INCLUDE_FLAGS, precompiled_prelude
from .errors import Finding, finding
from .source import for_execution
from .toolchain import KERNEL_FILE, Compiler

_WARNINGS = ("-Wuninitialized", "-Wvla", "-Wreturn-type")
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fno-inline",
    "-fno-optimize-sibling-calls",
    "-fno-exceptions",
    "-DMTL_CHECKED",
    "-DMTL_EXPLICIT_BFLOAT",
)
_OF_FAMILY = {
    "gcc": ("-fsingle-precision-constant",),
    "clang": ("-Xclang", "-cl-single-precision-constant", "-Wno-everything"),
}


def compile_findings(found: Compiler, source: str, instance: str) -> list[Finding]:
    """Return errors, relevant warnings and recursive functions of a kernel.

    Args:
        found: a compiler that can build kernels.
        source: the Metal source.
        instance: expression of the kernel function.
    """
    text = f'#line 1 "{KERNEL_FILE}"\n{for_execution(source)}\nauto mtl_kernel = &{instance};\n'
    with tempfile.TemporaryDirectory() as scratch:
        cpp = Path(scratch) / "kernel.cpp"
        cpp.write_text(text)
        flags = (*_FLAGS, *_OF_FAMILY[found.family])
        prelude = precompiled_prelude(found, flags)
        command = [*found.command, *flags, *_WARNINGS, *INCLUDE_FLAGS, "-include", str(prelude)]
        command += ["-S", str(cpp), "-o", f"{scratch}/kernel.s"]
        command += ["-fcallgraph-info"] if found.family == "gcc" else ["-emit-llvm"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        findings = messages(result.stderr, source)
        if result.returncode:
            return findings or [Finding("does not compile:\n" + result.stderr[:2000])]
        if found.family == "gcc":
            graph, lines = _gcc_calls((Path(scratch) / "kernel.ci").read_text())
        else:
            graph, lines = _llvm_calls((Path(scratch) / "kernel.s").read_text())
    for function in sorted(recursive(graph)):
        findings.append(
            finding("recursion, which Metal does not have", lines.get(function, 0), source)
        )
    return findings


def messages(output: str, source: str) -> list[Finding]:
    """Return the errors of a compiler, and its warnings about lines of the kernel."""
    found = []
    pattern = r"^(\S+?):(\d+):(?:\d+:)? (?:fatal )?(error|warning): (.*)$"
    for file, line, kind, message in re.findall(pattern, output, flags=re.M):
        if file == KERNEL_FILE:
            found.append(finding(message, int(line), source))
        elif kind == "error":
            found.append(Finding(f"{Path(file).name}:{line}: {message}"))
    return list(dict.fromkeys(found))


def recursive(graph: dict[str, set[str]]) -> set[str]:
    """Return functions that may call themselves, at least one per cycle of the call graph."""
    found: set[str] = set()
    finished: set[str] = set()

    def visit(function: str, path: tuple[str, ...]) -> None:
        if function in path:
            found.add(function)
            return
        if function in finished:
            return
        for callee in sorted(graph.get(function, ())):
            visit(callee, (*path, function))
        finished.add(function)

    for function in sorted(graph):
        visit(function, ())
    return found


def _gcc_calls(graph: str) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Return the call graph of the kernel's functions and their lines, from `-fcallgraph-info`."""
    place = rf'node: {{ title: "(.*?)" label: "[^"]*?\\n{re.escape(KERNEL_FILE)}:(\d+):'
    lines = {name: int(line) for name, line in re.findall(place, graph)}
    calls: dict[str, set[str]] = {name: set() for name in lines}
    for caller, callee in re.findall(r'edge: { sourcename: "(.*?)" targetname: "(.*?)"', graph):
        if caller in calls and callee in calls:
            calls[caller].add(callee)
    return calls, lines


def _llvm_calls(module: str) -> tuple[dict[str, set[str]], dict[str, int]]:
    """Return the call graph from LLVM's assembly, which has no lines without debug information."""
    calls: dict[str, set[str]] = {}
    current = ""
    for line in module.splitlines():
        head = re.match(r"define .*?@\"?([\w.$]+)\"?\(", line)
        if head:
            current = head.group(1)
            calls[current] = set()
        elif " call " in line and current:
            calls[current] |= set(re.findall(r"@\"?([\w.$]+)\"?\(", line))
    own = {name: callees & set(calls) for name, callees in calls.items()}
    return own, {}
