"""The checked mode reports the defects of a kernel, and nothing about a correct kernel."""

from __future__ import annotations

import metal_emulator
import mlx.core as mx
import pytest
import sample_kernel
from requirements import needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("dtype", sample_kernel.DTYPES)
def test_the_kernel_itself_is_clean(dtype, order):
    launches = []
    for length in (1, 37):
        given = sample_kernel.case(2, length, 64, dtype)
        with metal_emulator.emulate("checked", order, record=launches):
            sample_kernel.call(sample_kernel.make(), given)
    assert all(launch.accepted == () for launch in launches)


# Bodies for 64 threads that compute `out` from `in`; `i` is the thread, `s` its simdgroup.
CLEAN = {
    "the same helper twice in a row": "out = total(in) + total(2.0f * in);",
    "a call in each branch of a uniform test": """
        out = threads_per_grid.x > 3 ? total(in) : total(-in);
    """,
    "a call after divergent branches": """
        out = i % 2 ? in : -in;
        if (i % 3 == 0) { out += 1.0f; }
        out = total(out);
    """,
    "a simdgroup operation of one simdgroup": "out = in; if (s == 0) { out = total(in); }",
    "simdgroup barrier within a simdgroup": """
        threadgroup float shared[64];
        shared[i] = in;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out = shared[i ^ 1];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        shared[i ^ 3] = out;
    """,
    "device memory after a device barrier": """
        y[i] = in;
        threadgroup_barrier(mem_flags::mem_device);
        out = y[i];
    """,
    "both memories after one barrier": """
        threadgroup float shared[64];
        shared[i] = in;
        y[i] = in;
        threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
        out = shared[63 - i] + 0.0f * y[i];
    """,
    "bytes of one word by different threads": """
        threadgroup uchar bytes[64];
        bytes[i] = 1;
        out = in + bytes[i];
    """,
    "halves of one word by different threads": """
        threadgroup half halves[64];
        halves[i] = half(in);
        out = float(halves[i]);
    """,
    "elements of one vector by different threads": """
        threadgroup float4 vectors[16];
        vectors[i / 4][i % 4] = in;
        out = vectors[i / 4][i % 4];
    """,
    "unsigned overflow": "uint big = 4294967295u; big += uint(in) + 1u; out = float(big);",
    "vector loads": "const float4 v = *(const device float4*)(x + 4 * (i / 4)); out = v[i % 4];",
    "atomics on threadgroup memory": """
        threadgroup atomic_uint count;
        if (i == 0) { atomic_store_explicit(&count, 0, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out = float(atomic_load_explicit(&count, memory_order_relaxed));
    """,
}
RACES = {
    "device memory after a threadgroup barrier": (
        """
        y[i] = in;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out = y[63 - i];
        """,
        "out = y[63 - i]",
    ),
    "a reader in another simdgroup": (
        # Simdgroup 1 has a barrier between its own reads and its write; simdgroup 0 has none.
        """
        threadgroup float shared[1];
        if (i == 0) { shared[0] = in; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out = shared[0];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (i == 32) { shared[0] = out; }
        """,
        "shared[0]",
    ),
    "a simdgroup operation instead of a barrier": (
        """
        threadgroup float shared[64];
        shared[i] = total(in);
        out = shared[i ^ 1];
        """,
        "shared[i",
    ),
    "an atomic operation and a plain store": (
        """
        threadgroup atomic_uint count;
        if (i == 0) { *(threadgroup uint*)&count = 0; }
        atomic_fetch_add_explicit(&count, 1, memory_order_relaxed);
        out = in;
        """,
        "count",
    ),
}


def run_body(body: str, order: str = "forward") -> None:
    """Run a body in checked mode."""
    source = """
    const uint i = thread_position_in_grid.x;
    const uint s = simdgroup_index_in_threadgroup;
    const float in = x[i];
    float out;
    """
    with metal_emulator.emulate("checked", order):
        kernel = mx.fast.metal_kernel(
            name="body",
            input_names=["x"],
            output_names=["y"],
            source=f"{source}(void)s;\n{body}\ny[i] = out;",
            header="METAL_FUNC float total(float value) { return simd_sum(value); }",
        )
        kernel(
            inputs=[mx.arange(64.0)],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )


@pytest.mark.parametrize("name", CLEAN)
def test_legal_code_is_not_reported(name):
    for order in ("forward", "reverse", "random"):
        run_body(CLEAN[name], order)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("name", RACES)
def test_races_are_found_in_every_order(name, order):
    body, at = RACES[name]
    with pytest.raises(metal_emulator.KernelError, match=r"data race|uninitialised") as raised:
        run_body(body, order)
    assert any(at in f.text for f in raised.value.findings)


def test_races_between_threadgroups():
    source = "y[threadgroup_position_in_grid.x / 2] = 1;"
    with metal_emulator.emulate("checked"):
        kernel = mx.fast.metal_kernel(
            name="race", input_names=[], output_names=["y"], source=source
        )
        with pytest.raises(metal_emulator.KernelError, match="data race on device 'y'"):
            kernel(
                inputs=[],
                output_shapes=[(2,)],
                output_dtypes=[mx.int32],
                grid=(4, 1, 1),
                threadgroup=(1, 1, 1),
            )


def test_allowed_findings_are_kept():
    launches = []
    body = sample_kernel.BODY.replace("if (s == 0) {", "if (true) {")
    with metal_emulator.emulate("checked", allow=["data race on device 'last'"], record=launches):
        sample_kernel.call(sample_kernel.make(body), sample_kernel.case(1, 9, 32, mx.float32))
    assert [f.message[:26] for f in launches[0].accepted] == ["data race on device 'last'"]


def test_lanes_may_diverge_if_not_strict():
    """Without `strict` an operation covers the lanes that reach it, as on some GPUs."""
    source = (
        "const uint i = thread_position_in_grid.x; y[i] = 0; if (i < 4) { y[i] = simd_sum(1); }"
    )
    with metal_emulator.emulate(strict=False):
        kernel = mx.fast.metal_kernel(
            name="some", input_names=[], output_names=["y"], source=source
        )
        (y,) = kernel(
            inputs=[],
            output_shapes=[(32,)],
            output_dtypes=[mx.int32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )
    assert y.tolist() == [4] * 4 + [0] * 28


def test_fast_mode_reports_faults():
    """Guard pages: an index that is wrong by less than 64 MB cannot reach another buffer."""
    body = sample_kernel.BODY.replace("uint(t)) * width + d;", "uint(t) + 1000) * width + d;", 1)
    with metal_emulator.emulate():
        kernel = sample_kernel.make(body)
        with pytest.raises(metal_emulator.KernelError, match="out-of-bounds") as error:
            sample_kernel.call(kernel, sample_kernel.case(1, 9, 32, mx.float32))
    assert "past the end of 'rate'" in error.value.findings[0].message


def test_large_threadgroups_are_refused():
    with (
        metal_emulator.emulate(),
        pytest.raises(metal_emulator.KernelError, match="1056 threads, expected at"),
    ):
        sample_kernel.call(
            sample_kernel.make(), sample_kernel.case(1, 9, 32, mx.float32), simdgroups=33
        )


def test_traffic_counts_elements():
    batch, length, width, simdgroups = 2, 37, 64, 4
    given = sample_kernel.case(batch, length, width, mx.bfloat16)
    launches = []
    with metal_emulator.emulate("checked", record=launches):
        sample_kernel.call(sample_kernel.make(), given, simdgroups)
    traffic, counters = launches[0].traffic, launches[0].counters
    for name in ("x", "rate"):  # one load per element
        assert traffic[name].loads == traffic[name].elements_loaded == given.x.size
        assert (traffic[name].most_loads, traffic[name].stores) == (1, 0)
        assert traffic[name].bytes_read == 2 * given.x.size
    for name, size in [("y", given.x.size), ("last", batch * width)]:  # one store per element
        assert traffic[name].stores == traffic[name].elements_stored == size
        assert (traffic[name].most_stores, traffic[name].loads) == (1, 0)
    assert traffic["last"].bytes_written == 4 * batch * width
    # Each of the simdgroups loads the start of its channels.
    assert traffic["start"].loads == simdgroups * batch * width
    assert traffic["start"].elements_loaded == batch * width
    tiles = -(-length // (simdgroups * 4))
    assert counters.barriers == 2 * tiles * simdgroups * batch * width
    assert counters.threadgroup_bytes == 2 * simdgroups * 32 * 4
    assert counters.exchanges == 0


def test_vector_accesses_count_each_element():
    source = """
    const uint i = thread_position_in_grid.x;
    const float4 v = *(const device float4*)(x + 4 * i);
    *(device float4*)(y + 4 * i) = v + v;
    """
    launches = []
    with metal_emulator.emulate("checked", record=launches):
        kernel = mx.fast.metal_kernel(
            name="four", input_names=["x"], output_names=["y"], source=source
        )
        (y,) = kernel(
            inputs=[mx.arange(64.0)],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(16, 1, 1),
            threadgroup=(16, 1, 1),
        )
    assert y.tolist() == [2.0 * i for i in range(64)]
    traffic = launches[0].traffic
    assert (traffic["x"].loads, traffic["x"].most_loads) == (64, 1)
    assert (traffic["y"].stores, traffic["y"].most_stores) == (64, 1)
