"""Checked mode reports what is wrong with a kernel, and nothing about one that is right.

Each planted bug is one small edit of a correct kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import guinea_pig
import metal_cpu
import mlx.core as mx
import pytest
from guinea_pig import BODY, HEADER

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
STORE = "products[s * 32 + lane] = running_product;"
LENGTH = "const int length = dims[0];"


class Bug(NamedTuple):
    """A bug to plant.

    Attributes:
        body: the changed kernel.
        message: part of what must be reported.
        at: part of the line that must be named, or empty where no line is at fault.
        header: the text before it.
    """

    body: str
    message: str
    at: str = ""
    header: str = HEADER


def changed(old: str, new: str, count: int = 1) -> str:
    """The kernel with one text replaced."""
    assert old in BODY
    return BODY.replace(old, new, count)


def changed_last(old: str, new: str) -> str:
    """The kernel with the last occurrence of a text replaced."""
    head, _, tail = BODY.rpartition(old)
    return head + new + tail


def after(line: str, added: str) -> str:
    """The kernel with something added behind a line."""
    return changed(line, f"{line}\n{added}")


RACE = "data race on threadgroup"
BUGS = {
    # ---- synchronisation
    "no barrier before reading": Bug(
        changed(BARRIER, ""), "uninitialised threadgroup memory", "carry ="
    ),
    "no barrier before overwriting": Bug(changed_last(BARRIER, ""), RACE, "carry ="),
    "barrier for device memory only": Bug(
        changed(BARRIER, "threadgroup_barrier(mem_flags::mem_device);"), RACE, "carry ="
    ),
    "barrier for no memory": Bug(
        changed(BARRIER, "threadgroup_barrier(mem_flags::mem_none);"), RACE, "carry ="
    ),
    "simdgroup barrier between simdgroups": Bug(
        changed(BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);"),
        "uninitialised threadgroup memory",
        "carry =",
    ),
    "barrier in a branch that some skip": Bug(
        changed(BARRIER, f"if (first < length) {{ {BARRIER} }}"), RACE, "carry ="
    ),
    "return before a barrier": Bug(
        after(LENGTH, "if (int(simdgroup_index_in_threadgroup) * L >= length - 30) { return; }"),
        "divergent barrier",
        BARRIER,
    ),
    "barrier through two calls": Bug(
        changed(BARRIER, "if (s < 2) { meet(); } else { meet(); }"),
        "divergent barrier: reached through different calls",
        "meet",
        HEADER + f"METAL_FUNC void meet() {{ {BARRIER} }}\n",
    ),
    "simd_sum in a branch that some lanes skip": Bug(
        after(STORE, "if (lane < 7) { carry += 0.0f * simd_sum(running_sum); }"),
        "divergent simd_sum: reached by 7 of 32 lanes",
        "simd_sum",
    ),
    "simd_sum through two calls": Bug(
        after(STORE, "carry += 0.0f * (lane < 7 ? total(running_sum) : total(running_product));"),
        "divergent simdgroup operation: reached through different calls",
        "simd_sum",
        HEADER + "METAL_FUNC float total(float value) { return simd_sum(value); }\n",
    ),
    "simdgroup operation after some lanes have ended": Bug(
        BODY + "\nif (lane > 3) { return; }\nlast[b * width + d] = simd_max(carry);",
        "divergent simd_max: reached by 4 of 32 lanes",
        "simd_max",
    ),
    "neighbours in a simdgroup without a barrier": Bug(
        after(STORE, "running_sum += 0.0f * products[s * 32 + (lane ^ 1)];"),
        RACE,
        "running_sum += 0.0f",
    ),
    # ---- memory
    "load past the end": Bug(
        changed("if (t < length) {", "if (true) {"),
        "out-of-bounds read of 4 B, 4 B past the end of 'rate'",
        "decay(static_cast",
    ),
    "store past the end": Bug(
        changed_last("if (t < length) {", "if (true) {"), "of what another thread", "y[(b *"
    ),
    "index one row too high": Bug(
        changed("uint(t)) * width + d;", "uint(t) + 1) * width + d;"),
        "past the end of 'rate'",
        "decay(static_cast",
    ),
    "negative index": Bug(
        changed("start[b * width + d];", "start[int(b * width + d) - 1];"),
        "4 B before 'start'",
        "start[",
    ),
    "threadgroup array too small": Bug(
        changed("sums[S * 32];", "sums[S * 32 - 1];"),
        "array index out of bounds (index 127)",
        "sums[s * 32",
    ),
    "private array overrun": Bug(
        changed("product[i] = running", "product[i + 1] = running"),
        "array index out of bounds (index 4)",
        "product[i + 1]",
    ),
    "output never written": Bug(
        changed("if (s == 0) {", "if (s == 99) {"),
        "output 'last': 128 of 128 elements are never written",
    ),
    "output partly written": Bug(
        changed("if (s == 0) {", "if (s == 0 && lane < 31) {"),
        "output 'last': 4 of 128 elements are never written",
    ),
    "output written by several simdgroups": Bug(
        changed("if (s == 0) {", "if (true) {"), "data race on device 'last'", "last[b"
    ),
    "output written again after a barrier": Bug(
        BODY
        + "\nthreadgroup_barrier(mem_flags::mem_device);"
        + "\nif (s == 1) { last[b * width + d] = carry; }",
        "output 'last': an element is written by more than one thread",
        "if (s == 1)",
    ),
    "output read before it is written": Bug(
        changed("last[b * width + d] = carry;", "last[b * width + d] += carry;"),
        "read of uninitialised device memory 'last'",
        "+= carry",
    ),
    "lanes that overlap": Bug(
        changed(STORE, STORE.replace("lane", "(lane | 1)")), RACE, "(lane | 1)"
    ),
    "threadgroup memory partly written": Bug(
        changed(STORE, f"if (lane < 16) {{ {STORE} }}"),
        "uninitialised threadgroup memory 'products'",
        "carry =",
    ),
    "write to an input": Bug(
        after(STORE, "((device float*)start)[b * width + d] = carry;"),
        "write to input 'start'",
        "(device float*)start",
    ),
    "misaligned vector": Bug(
        changed("start[b * width + d];", "(*(device const float4*)(start + 1)).x;"),
        "not aligned to 16 bytes",
        "float4",
    ),
    "too much threadgroup memory": Bug(
        changed("threadgroup float sums[S * 32];", "threadgroup float sums[S * 32 + 8192];"),
        "threadgroup memory of 33792 B exceeds 32768 B",
        "sums[S",
    ),
    # ---- what the language leaves undefined
    "recursion": Bug(
        after(LENGTH, "const float depth = descend(1.0f, length & 3);").replace(
            "float carry = start", "float carry = 0.0f * depth + start"
        ),
        "recursion",
        "descend",
        HEADER
        + "inline float descend(float x, int n) {\n"
        + "  return n <= 0 ? x : descend(x, n - 1) + descend(x + 1, n - 2);\n}\n",
    ),
    "integer overflow": Bug(
        changed(
            "const uint b =", "int big = 2147483647; big += dims[0]; const uint b = uint(big * 0) +"
        ),
        "signed overflow (+)",
        "2147483647",
    ),
    "integer division by zero": Bug(
        changed("int(s) * L;", "int(s) * L + 0 * (length / (length - 37));"),
        "division by zero",
        "length / (",
    ),
    "shift too far": Bug(
        changed("const int first = tile", "const int first = 0 * (1 << (length - 5)) + tile"),
        "shift",
        "1 <<",
    ),
    "float too large for an integer": Bug(
        changed(
            "const int first = tile", "const int first = 0 * int(1e20f * float(length)) + tile"
        ),
        "float to integer out of range",
        "1e20f",
    ),
    "waiting for a thread that waits too": Bug(
        after(
            "threadgroup float sums[S * 32];",
            "threadgroup atomic_uint ready;\n"
            "while (atomic_load_explicit(&ready, memory_order_relaxed) != s) {}",
        ),
        "a loop that does not end?",
        "while",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported(name):
    bug = BUGS[name]
    given = guinea_pig.case(2, 37, 64, mx.float32)
    with (
        metal_cpu.executed("checked", time_limit_s=1),
        pytest.raises(metal_cpu.KernelError) as error,
    ):
        guinea_pig.call(guinea_pig.make(bug.body, bug.header), given)
    found = [f for f in error.value.findings if bug.message in f.message and bug.at in f.text]
    assert found, error.value
    assert (found[0].line > 0) == bool(bug.at)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("dtype", guinea_pig.DTYPES)
def test_the_kernel_itself_is_clean(dtype, order):
    launches = []
    for length in (1, 37):
        given = guinea_pig.case(2, length, 64, dtype)
        with metal_cpu.executed("checked", order, record=launches):
            guinea_pig.call(guinea_pig.make(), given)
    assert all(launch.accepted == () for launch in launches)


CLEAN = {
    "the same helper twice in a row": "out = total(in) + total(2.0f * in);",
    "a call in each branch of a uniform test": """
        out = threads_per_grid.x > 3 ? total(in) : total(-in);
    """,
    "a call behind divergent branches": """
        out = i % 2 ? in : -in;
        if (i % 3 == 0) { out += 1.0f; }
        out = total(out);
    """,
    "simdgroup barrier within a simdgroup": """
        threadgroup float shared[32];
        shared[thread_index_in_simdgroup] = in;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        out = shared[thread_index_in_simdgroup ^ 1];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        shared[thread_index_in_simdgroup ^ 3] = out;
    """,
    "bytes of one word by different threads": """
        threadgroup uchar bytes[64];
        bytes[thread_index_in_simdgroup] = 1;
        bytes[32 + thread_index_in_simdgroup] = 2;
        out = in + bytes[thread_index_in_simdgroup];
    """,
    "unsigned overflow": "uint big = 4294967295u; big += uint(in) + 1u; out = float(big);",
    "vector loads and stores": """
        const float4 four = *(const device float4*)(x + 4 * (i / 4));
        out = four[i % 4];
    """,
    "atomics on threadgroup memory": """
        threadgroup atomic_uint count;
        if (i == 0) { atomic_store_explicit(&count, 0, memory_order_relaxed); }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out = float(atomic_load_explicit(&count, memory_order_relaxed));
    """,
}


@pytest.mark.parametrize("name", CLEAN)
def test_what_is_allowed_is_not_reported(name):
    header = "METAL_FUNC float total(float value) { return simd_sum(value); }"
    source = "const uint i = thread_position_in_grid.x;\nconst float in = x[i];\nfloat out;\n"
    source += CLEAN[name] + "\ny[i] = out;"
    with metal_cpu.executed("checked", "random"):
        kernel = mx.fast.metal_kernel(
            name="clean", input_names=["x"], output_names=["y"], source=source, header=header
        )
        kernel(
            inputs=[mx.arange(32.0)],
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )


def test_races_between_threadgroups():
    source = "y[threadgroup_position_in_grid.x / 2] = 1;"
    with metal_cpu.executed("checked"):
        kernel = mx.fast.metal_kernel(
            name="race", input_names=[], output_names=["y"], source=source
        )
        with pytest.raises(metal_cpu.KernelError, match="data race on device 'y'"):
            kernel(
                inputs=[],
                output_shapes=[(2,)],
                output_dtypes=[mx.int32],
                grid=(4, 1, 1),
                threadgroup=(1, 1, 1),
            )


def test_allowed_findings_are_kept():
    launches = []
    body = changed("if (s == 0) {", "if (true) {")
    with metal_cpu.executed("checked", allow=["data race on device 'last'"], record=launches):
        guinea_pig.call(guinea_pig.make(body), guinea_pig.case(1, 9, 32, mx.float32))
    assert [f.message[:26] for f in launches[0].accepted] == ["data race on device 'last'"]


def test_lanes_may_diverge_where_asked_for():
    """Not strict: an operation covers the lanes that reached it, as on some GPUs."""
    source = (
        "const uint i = thread_position_in_grid.x; y[i] = 0; if (i < 4) { y[i] = simd_sum(1); }"
    )
    with metal_cpu.executed(strict=False):
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


def test_faults_in_fast_mode_are_reported_too():
    """Guard pages: no index that is wrong by less than 64 MB reads another buffer."""
    body = changed("uint(t)) * width + d;", "uint(t) + 1000) * width + d;")
    with metal_cpu.executed():
        kernel = guinea_pig.make(body)
        with pytest.raises(metal_cpu.KernelError, match="out-of-bounds") as error:
            guinea_pig.call(kernel, guinea_pig.case(1, 9, 32, mx.float32))
    assert "past the end of 'rate'" in error.value.findings[0].message


def test_large_threadgroups_are_refused():
    with metal_cpu.executed(), pytest.raises(metal_cpu.KernelError, match="1056 threads, 1024 is"):
        guinea_pig.call(guinea_pig.make(), guinea_pig.case(1, 9, 32, mx.float32), simdgroups=33)


def test_traffic_counts_elements():
    batch, length, width, simdgroups = 2, 37, 64, 4
    given = guinea_pig.case(batch, length, width, mx.bfloat16)
    launches = []
    with metal_cpu.executed("checked", record=launches):
        guinea_pig.call(guinea_pig.make(), given, simdgroups)
    traffic, counters = launches[0].traffic, launches[0].counters
    for name in ("x", "rate"):  # each element is loaded once
        assert traffic[name].loads == traffic[name].elements_loaded == given.x.size
        assert (traffic[name].most_loads, traffic[name].stores) == (1, 0)
        assert traffic[name].bytes_read == 2 * given.x.size
    for name, size in [("y", given.x.size), ("last", batch * width)]:  # and stored once
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
    with metal_cpu.executed("checked", record=launches):
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
