"""Kernels compile as CUDA, and recorded launches can be repeated on a GPU.

The tests need no GPU: a fake driver runs the only kernel that they launch.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
import sample_kernel
from metal_emulator import cuda_driver, gpu_check, launch_files, recorded_launch, toolchain
from mlx_kernels import gated_delta_inputs, mlx_lm_module
from requirements import needs_compiler

pytestmark = needs_compiler

PACKAGE = Path(metal_emulator.__file__).resolve().parents[1]
_toolchain, _reason = metal_emulator.cuda_toolchain()
needs_cuda = pytest.mark.skipif(_toolchain is None, reason=f"not compiled as CUDA: {_reason}")

# Uses everything that the CUDA header defines.
EVERYTHING = """
    const uint i = thread_position_in_grid.x + 2 * threadgroup_position_in_grid.x
        + 3 * thread_position_in_threadgroup.x + 5 * thread_index_in_threadgroup
        + thread_index_in_simdgroup + simdgroup_index_in_threadgroup + simdgroups_per_threadgroup
        + threads_per_threadgroup.x + threadgroups_per_grid.x + threads_per_grid.x;
    threadgroup float shared[32], other[2][2];
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    simdgroup_barrier(mem_flags::mem_none);
    float v = static_cast<float>(x[i % 8]);
    shared[i % 32] = v;
    other[0][0] = v;
    v += metal::precise::exp(v) + metal::fast::log(v) + metal::sqrt(v) + metal::rsqrt(v);
    v += metal::precise::tanh(v) + metal::abs(v) + metal::clamp(v, 0.0f, 1.0f);
    v += metal::fma(v, v, v);
    v += metal::max(v, 1.0f) + float(metal::min(int(i), 3)) + metal::select(v, 1.0f, v > 0.0f);
    v += simd_sum(v) + simd_max(v) + simd_min(v) + simd_product(v) + simd_prefix_inclusive_sum(v);
    v += simd_prefix_exclusive_product(v) + simd_shuffle(v, 3) + simd_shuffle_up(v, 1);
    v += simd_shuffle_down(v, 1) + simd_shuffle_xor(v, 1) + simd_broadcast(v, 2);
    v += simd_shuffle_and_fill_up(v, 0.0f, 1) + (simd_any(v > 0.0f) ? INFINITY : 0.0f);
    v += float(simd_xor(i)) + static_cast<float>(simd_shuffle(static_cast<T>(v), 1));
    v += as_type<float>(uint(as_type<uint>(v) ^ 1u)) + metal::numeric_limits<float>::max();
    float4 four = float4(v, 1.0f, 2.0f, 3.0f) * 2.0f;
    four += float4(float2(v), float2(1.0f));
    v += metal::dot(four, four) + simd_sum(four).x;
    ulong big = ulong(i) * 12345678901ul;
    v += float(big >> 7);
    simdgroup_matrix<float, 8, 8> a, b, c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    simdgroup_load(a, x_float, 8);
    b.thread_elements()[0] = v;
    simdgroup_multiply_accumulate(c, a, b, c);
    simdgroup_store(c, y, 8);
    metal::array<float, 2> pair;
    pair[0] = v;
    y[i] = pair[0] + float(s);
"""


def everything() -> metal_emulator.Capture:
    definition = metal_emulator.KernelDefinition(
        "everything", ("x", "x_float", "s"), ("y",), EVERYTHING
    )
    return metal_emulator.capture_call(
        definition.build(),
        [mx.zeros((64,), dtype=mx.bfloat16), mx.zeros((64,)), mx.array(2)],
        output_shapes=[(4096,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(32, 1, 1),
        template=[("T", mx.bfloat16)],
    )


@needs_cuda
@pytest.mark.parametrize("dtype", sample_kernel.DTYPES)
def test_the_sample_kernel_compiles(dtype):
    capture = sample_kernel.captured(dtype=dtype)
    text = metal_emulator.translate(capture.source, capture.function, capture.instance)
    ptx = metal_emulator.compile_cuda(text, capture.source).decode()
    assert ".entry metal_entry" in ptx
    assert ptx.count("bar.sync") + ptx.count("barrier.sync") == 2
    assert "st.shared" in ptx


@needs_cuda
def test_everything_compiles():
    capture = everything()
    text = metal_emulator.translate(capture.source, capture.function, capture.instance)
    assert b"shfl.sync" in metal_emulator.compile_cuda(text, capture.source)


def test_everything_compiles_for_the_cpu():
    capture = everything()
    assert (
        metal_emulator.check_source(capture.source, capture.instance, portable=True).findings == ()
    )


@needs_cuda
def test_a_kernel_of_mlx_lm_compiles():
    launches = []
    with mlx_lm_module("models.gated_delta", record=launches) as module:
        module.gated_delta_kernel(*gated_delta_inputs(mx.float32))
    capture = launches[0].capture
    text = metal_emulator.translate(capture.source, capture.function, capture.instance)
    assert b".entry metal_entry" in metal_emulator.compile_cuda(text, capture.source)


@needs_cuda
def test_errors_name_the_kernels_line():
    capture = sample_kernel.captured(sample_kernel.BODY.replace("= start[b", "= strat[b"))
    text = metal_emulator.translate(capture.source, capture.function, capture.instance)
    with pytest.raises(metal_emulator.KernelError, match="strat") as raised:
        metal_emulator.compile_cuda(text, capture.source)
    assert raised.value.findings[0].text == "float carry = strat[b * width + d];"


# ---- recorded launches

DOUBLE = "y[thread_position_in_grid.x] = 2.0f * x[thread_position_in_grid.x];"


def doubling(threads: int = 64) -> metal_emulator.Launch:
    launches: list[metal_emulator.Launch] = []
    with metal_emulator.emulate(record=launches, keep_values=True):
        kernel = mx.fast.metal_kernel(
            name="double", input_names=["x"], output_names=["y"], source=DOUBLE
        )
        kernel(
            inputs=[mx.arange(threads).astype(mx.float32)],
            output_shapes=[(threads,)],
            output_dtypes=[mx.float32],
            grid=(threads, 1, 1),
            threadgroup=(32, 1, 1),
        )
    return launches[0]


def test_launches_survive_the_file(tmp_path):
    launches = []
    with metal_emulator.emulate(record=launches, keep_values=True):
        sample_kernel.call(sample_kernel.make(), sample_kernel.case(1, 5, 32, mx.bfloat16))
    before = recorded_launch(launches[0])
    launch_files.save_launches([before, recorded_launch(doubling())], tmp_path)
    after, second = launch_files.load_launches(tmp_path)
    assert dataclasses.replace(after, values={}) == dataclasses.replace(before, values={})
    assert [b.name for b in after.buffers] == ["x", "rate", "start", "dims", "y", "last"]
    assert [b.type for b in after.buffers][:4] == ["bfloat16", "bfloat16", "float32", "int32"]
    for name, values in before.values.items():
        assert np.array_equal(after.values[name].view(np.uint8), values.view(np.uint8)), name
    assert after.has_values
    assert second.values["y"].tolist() == [2.0 * i for i in range(64)]


def test_launches_without_values_cannot_be_recorded():
    launches = []
    with metal_emulator.emulate(record=launches):
        sample_kernel.call(sample_kernel.make(), sample_kernel.case(1, 5, 32, mx.float32))
    with pytest.raises(ValueError, match="run without keep_values"):
        recorded_launch(launches[0])


def test_large_launches_are_recorded_without_floats(monkeypatch):
    launches = []
    with metal_emulator.emulate(record=launches, keep_values=True):
        sample_kernel.call(sample_kernel.make(), sample_kernel.case(1, 5, 32, mx.bfloat16))
    monkeypatch.setattr("metal_emulator.recording.MAX_VALUES_BYTES", 100)
    launch = recorded_launch(launches[0])
    assert not launch.has_values
    assert list(launch.values) == ["dims"]


def test_bfloat16_rounding_agrees_with_mlx():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = mx.array(values).astype(mx.bfloat16)
    bits = gpu_check.encode(values, "bfloat16")
    assert np.array_equal(bits, np.array(expected.view(mx.uint16)))
    assert np.array_equal(gpu_check.decode(bits, "bfloat16"), np.array(expected.astype(mx.float32)))


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """Compile the fake driver, and return its library."""
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    source = Path(__file__).parent / "fake_libcuda.cpp"
    found, reason = toolchain.compiler()
    if found is None:
        pytest.skip(reason)
    command = [*found.command, "-std=c++17", "-O1", "-shared", "-fPIC", str(source)]
    toolchain.run_compiler([*command, "-o", str(library)])
    return library


class FakeCompiler:
    """A compiler whose output the fake driver accepts."""

    kind = "fake"

    def compile(self, text: str, architecture: str, *, binary: bool) -> bytes:
        assert "metal_entry" in text
        assert binary
        return f"code for {architecture}".encode()


@pytest.fixture
def gpu(libcuda, monkeypatch):
    """Replace the driver and the CUDA compiler by fakes."""
    monkeypatch.setenv("METAL_EMULATOR_LIBCUDA", str(libcuda))
    monkeypatch.setattr(gpu_check, "cuda_toolchain", lambda: (FakeCompiler(), ""))
    monkeypatch.setattr(cuda_driver.Gpu.copy_bandwidth, "__defaults__", (1 << 20, 2))


@pytest.mark.usefixtures("gpu")
def test_a_right_kernel_on_a_gpu(tmp_path, capsys):
    launch_files.save_launches([recorded_launch(doubling())], tmp_path)
    assert gpu_check.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Fake GPU, compute capability 90, fake" in shown
    assert "right y 0.0e+00" in shown
    assert "1000.0 us" in shown
    assert "1 of 1 launches are right" in shown


@pytest.mark.usefixtures("gpu")
def test_a_wrong_kernel_on_a_gpu(tmp_path, capsys):
    launch = recorded_launch(doubling())
    launch.values["y"][3] += 1
    launch_files.save_launches([launch, recorded_launch(doubling())], tmp_path)
    assert gpu_check.main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "WRONG y 7.9e-03" in shown
    assert "1 of 2 launches are right" in shown


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("unsteady", "WRONG results differ between runs"),
        ("fails", "WRONG cuLaunchKernel: CUDA_ERROR_FAKE (719)"),
    ],
)
def test_a_gpu_that_fails(behaviour, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_CUDA", behaviour)
    launch_files.save_launches([recorded_launch(doubling())], tmp_path)
    assert gpu_check.main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_launches_that_are_only_timed_or_skipped(tmp_path, monkeypatch, capsys):
    partial = recorded_launch(doubling(50))
    monkeypatch.setattr("metal_emulator.recording.MAX_VALUES_BYTES", 100)
    launch_files.save_launches([recorded_launch(doubling()), partial], tmp_path)
    assert gpu_check.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "timed, not compared" in shown
    assert "skipped: CUDA has no partial threadgroups" in shown


@pytest.mark.usefixtures("gpu")
def test_no_gpu_is_no_failure(tmp_path, monkeypatch, capsys):
    launch_files.save_launches([recorded_launch(doubling())], tmp_path)
    monkeypatch.setenv("FAKE_CUDA", "none")
    assert gpu_check.main([str(tmp_path)]) == 0
    monkeypatch.setenv("METAL_EMULATOR_LIBCUDA", "libcuda-that-is-not-there.so")
    assert gpu_check.main([str(tmp_path)]) == 0
    none, missing = capsys.readouterr().out.splitlines()
    assert none == "skipped: this needs an NVIDIA GPU: the NVIDIA driver sees no GPU"
    assert missing.startswith("skipped: this needs an NVIDIA GPU: no NVIDIA driver (libcuda-that")


def test_nothing_recorded_is_no_failure(tmp_path, capsys):
    assert gpu_check.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"skipped: no recorded launches in {tmp_path}\n"


def test_the_command_runs_without_mlx(tmp_path):
    """The machine with the GPU may have NumPy only."""
    script = f"""
import runpy, sys
sys.modules["mlx"] = None  # an import of it fails
sys.argv = ["gpu_check", {str(tmp_path)!r}]
runpy.run_module("metal_emulator.gpu_check", run_name="__main__")
"""
    launch_files.save_launches([recorded_launch(doubling())], tmp_path)
    environment = {
        "PATH": "",
        "CUDA_HOME": "/nowhere",
        "METAL_EMULATOR_LIBCUDA": "libcuda-nowhere.so",
        "PYTHONPATH": str(PACKAGE),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: ")
