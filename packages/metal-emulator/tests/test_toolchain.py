"""Capture, rewriting, compilation and the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import metal_emulator
import mlx.core as mx
import pytest
import sample_kernel
from metal_emulator import source, toolchain
from metal_emulator.build import build
from metal_emulator.source import Parameter
from requirements import needs_compiler

pytestmark = needs_compiler

PACKAGE = Path(metal_emulator.__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent


def test_capture_is_what_mlx_generates():
    definition = metal_emulator.KernelDefinition(
        "twice", ("x", "n"), ("y",), "y[0] = T(x_shape[0] + N + n);", "// header\n"
    )
    capture = metal_emulator.capture_call(
        definition.build(),
        [mx.zeros((4, 4)), mx.array(3)],
        output_shapes=[(1,)],
        output_dtypes=[mx.bfloat16],
        grid=(64, 2, 1),
        threadgroup=(32, 2, 1),
        template=[("T", mx.bfloat16), ("N", 3)],
    )
    assert capture.source.startswith("// header\n")
    assert "y[0] = T(x_shape[0] + N + n);" in capture.source
    assert capture.instance == capture.function + "<bfloat16_t, 3>"
    assert (capture.grid, capture.threadgroup) == ((64, 2, 1), (32, 2, 1))
    assert capture.shape_infos == ((True, False, False), (False, False, False))


def test_capture_of_a_function_with_several_kernels():
    kernels = [
        metal_emulator.KernelDefinition(f"k{i}", ("x",), ("y",), f"y[0] = {i} + x[0];").build()
        for i in range(2)
    ]

    def function(x):
        for kernel in kernels:
            (x,) = kernel(
                inputs=[x],
                output_shapes=[(1,)],
                output_dtypes=[x.dtype],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
            )
        return x

    captures = metal_emulator.capture_calls(function, mx.zeros((9,)))
    assert ["y[0] = 0" in c.source for c in captures] == [True, False]
    assert "const device float* x" in captures[0].source
    assert "const constant float* x" in captures[1].source


SIGNATURE = """
[[kernel]] void custom(
  const device float* x [[buffer(0)]],
  const constant int64_t* x_strides [[buffer(1)]],
  const constant float& s [[buffer(2)]],
  device atomic<float>* y [[buffer(5)]],  // a comment, with a comma
  uint3 where [[thread_position_in_grid]],
  ushort lane [[thread_index_in_simdgroup]]) {
"""


def test_signatures():
    assert source.parameters(SIGNATURE, "custom") == [
        Parameter("x", "const device float*", 0, ""),
        Parameter("x_strides", "const constant int64_t*", 1, ""),
        Parameter("s", "const constant float&", 2, ""),
        Parameter("y", "device atomic<float>*", 5, ""),
        Parameter("where", "uint3", 6, "position_in_grid"),
        Parameter("lane", "ushort", 6, "lane"),
    ]


def test_buffers_are_numbered_where_the_text_does_not():
    text = "kernel void k(device float* a, constant int& b, uint i [[thread_position_in_grid]]) {"
    assert [p.slot for p in source.parameters(text, "k") if p.is_buffer] == [0, 1]


def test_unknown_kernels():
    with pytest.raises(ValueError, match="no kernel function 'other'"):
        source.parameters(SIGNATURE, "other")


DECLARATIONS = {
    "threadgroup float a[32];": 'static float a[32]; mtl::threadgroup_variable(a, "a");',
    "threadgroup T a[N][M + 1], b;": (
        'static T a[N][M + 1], b; mtl::threadgroup_variable(a, "a");'
        ' mtl::threadgroup_variable(b, "b");'
    ),
    "alignas(16) threadgroup metal::array<float, 4> a;": (
        'alignas(16) static metal::array<float, 4> a; mtl::threadgroup_variable(a, "a");'
    ),
    "threadgroup float* p = a;": "threadgroup float* p = a;",
    "threadgroup_barrier(mem_flags::mem_none);": "threadgroup_barrier(mem_flags::mem_none);",
}


@pytest.mark.parametrize("text", DECLARATIONS)
def test_threadgroup_variables_are_registered(text):
    assert source.for_execution(text) == DECLARATIONS[text]


def test_rewriting_keeps_the_lines():
    capture = sample_kernel.captured(header="/* two\n lines */ // and\n" + sample_kernel.HEADER)
    for rewrite in (source.for_execution, source.for_type_check, source.for_cuda):
        assert rewrite(capture.source).count("\n") == capture.source.count("\n")


def test_address_spaces_vanish_for_cuda():
    text = (
        "const device float* p; thread int& i; threadgroup float a[2]; constant int c; mem_device"
    )
    expected = "const float* p; int& i; __shared__ float a[2]; int c; mem_device"
    assert " ".join(source.for_cuda(text).split()) == expected


def test_errors_name_the_kernels_line():
    capture = sample_kernel.captured(
        sample_kernel.BODY.replace("float carry = start", "float carry = strat")
    )
    with pytest.raises(metal_emulator.KernelError, match="strat") as raised:
        build(capture.source, capture.function, capture.instance)
    assert raised.value.findings[0].text == "float carry = strat[b * width + d];"


def test_a_kernel_is_compiled_once(monkeypatch):
    capture = sample_kernel.captured()
    first = build(capture.source, capture.function, capture.instance)
    monkeypatch.setattr(toolchain.subprocess, "run", None)  # a compiler call would fail
    assert build(capture.source, capture.function, capture.instance) == first
    assert first.path.exists()


PROCESS = """
import sample_kernel, metal_emulator, mlx.core as mx
with metal_emulator.emulate():
    y, _ = sample_kernel.call(sample_kernel.make(), sample_kernel.case(1, 9, 32, mx.float32))
print(float(y.sum()))
"""


def test_processes_share_a_cache(tmp_path):
    """Two processes compile into one directory, and no file is ever incomplete."""
    for library in toolchain.cache_directory().glob("libruntime-*.so"):
        shutil.copy(library, tmp_path)  # compiling it would take most of the time
    path = os.pathsep.join([str(PACKAGE), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "METAL_EMULATOR_CACHE": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    assert results[0][0] == results[1][0]
    assert not list(tmp_path.glob("build-*"))
    assert len(list(tmp_path.glob("kernel-*.so"))) == 1


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch):
    monkeypatch.delenv("METAL_EMULATOR_CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert metal_emulator.compiler() == (None, "no g++ on the PATH; no clang++ on the PATH")
    with pytest.raises(
        metal_emulator.KernelError, match=r"cannot compile kernels: no g\+\+"
    ) as raised:
        toolchain.required_compiler()
    assert "\n" not in str(raised.value)


def test_a_compiler_can_be_chosen(monkeypatch):
    monkeypatch.setenv("METAL_EMULATOR_CXX", "no-such-compiler -x")
    assert metal_emulator.compiler() == (None, "no-such-compiler -x: No such file or directory")


def test_fibers_of_the_c_library(monkeypatch):
    """ucontext switches between threads on processors other than x86-64."""
    command = " ".join(toolchain.required_compiler().command)
    monkeypatch.setenv("METAL_EMULATOR_CXX", f"{command} -DMTL_UCONTEXT")
    given = sample_kernel.case(2, 37, 64, mx.float32)
    launches: list[metal_emulator.Launch] = []
    with metal_emulator.emulate("checked", "random", record=launches):
        y, _ = sample_kernel.call(sample_kernel.make(), given)
    assert sample_kernel.relative_error(y, sample_kernel.reference(given)[0]) < 1e-6
    assert launches[0].traffic["y"].stores == y.size


def test_old_compilers_are_refused(tmp_path, monkeypatch):
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho 'g++ (GCC) 9.4.0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("METAL_EMULATOR_CXX", str(old))
    found, reason = metal_emulator.compiler()
    assert found is None
    assert reason.endswith("is gcc 9.4.0, 12 or newer is needed")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "system", lambda: "Darwin")
    assert metal_emulator.compiler() == (None, "kernels run on Linux only, this is Darwin")
