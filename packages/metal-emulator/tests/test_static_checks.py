"""The static checks reject illegal kernels and accept legal ones."""

from __future__ import annotations

import metal_emulator
import mlx.core as mx
import pytest
import sample_kernel
from metal_emulator import static_check, toolchain, type_check
from metal_emulator.compile_check import recursive
from requirements import needs_compiler
from sample_kernel import BODY, HEADER

pytestmark = needs_compiler

HELPER = "const int length = dims[0];"


def added(statement: str, header: str = "") -> tuple[str, str]:
    """Return body and header of the sample kernel with a statement and definitions added."""
    return BODY.replace(HELPER, f"{HELPER}\n{statement}"), HEADER + header


LEGAL = {
    "the kernel itself": (BODY, HEADER),
    "a literal without f": added(
        "const float q = metal::max(carry0, 0.0); (void)q;", "constant float carry0 = 1;"
    ),
    "if constexpr": added("if constexpr (S > 4) { (void)length; }"),
    "a helper over any pointer": added(
        "const float q = first_of(start) + first_of(dims); (void)q;",
        "template <typename P>\n"
        "METAL_FUNC float first_of(P p) { return static_cast<float>(p[0]); }\n",
    ),
    "a struct of its own": added(
        "Pair q = {1.0f, 2.0f}; q.a += q.b;", "struct Pair { float a; float b; };\n"
    ),
    "several variables in one declaration": added("int q = 1, r = 2; q += r;"),
}
ILLEGAL = {
    "thread pointer to device memory": added("thread const float* p = start; (void)p;"),
    "pointer without address space": added("const float* p = start; (void)p;"),
    "pointer without address space to a local": added("float z = 0; float* p = &z; (void)p;"),
    "threadgroup memory for a device parameter": added(
        "threadgroup float q[4]; const float z = f(q); (void)z;",
        "METAL_FUNC float f(const device float* p) { return p[0]; }\n",
    ),
    "device memory for a threadgroup parameter": added(
        "const float z = f(start); (void)z;",
        "METAL_FUNC float f(const threadgroup float* p) { return p[0]; }\n",
    ),
    "private array for a device parameter": added(
        "float q[2] = {0, 0}; const float z = f(q); (void)z;",
        "METAL_FUNC float f(const device float* p) { return p[0]; }\n",
    ),
    "parameter without address space": added(
        "", "METAL_FUNC float f(const float* p) { return p[0]; }\n"
    ),
    "reference without address space": added("", "METAL_FUNC void f(float& p) { p = 0; }\n"),
    "store through const device": added("start[0] = 1.0f;"),
    "store through constant": added("dims[0] = 1;"),
    "float stored as bfloat": (
        BODY.replace(
            "static_cast<T>(product[i] * before + sum[i])", "product[i] * before + sum[i]"
        ),
        HEADER,
    ),
    "double": added("double z = 1; (void)z;"),
    "long long": added("long long z = 1; (void)z;"),
    "new": added("thread float* z = new float[3]; (void)z;"),
    "recursion": added(
        "const float z = f(1.0f, length); (void)z;",
        "inline float f(float x, int n) { return n <= 0 ? x : f(x, n - 1) * 0.5f; }\n",
    ),
    "mutual recursion": added(
        "const float z = f(1.0f, length); (void)z;",
        "float g(float x, int n);\n"
        "inline float f(float x, int n) { return n <= 0 ? x : g(x, n - 1); }\n"
        "inline float g(float x, int n) { return f(x, n); }\n",
    ),
    "lambda": added("auto z = [&](int q) { return q + 1; }; (void)z;"),
    "std": added("const float z = std::exp(1.0f); (void)z;"),
    "threadgroup variable in a helper": added(
        "", "METAL_FUNC float f() { threadgroup float q[4]; return q[0]; }\n"
    ),
    "threadgroup variable in a block": added(
        "if (length > 3) { threadgroup float q[4]; q[0] = 1; }"
    ),
    "variable length array": added("float z[length]; (void)z;"),
    "mixed vectors": added("int4 z = int4(1); uint4 q = uint4(2); auto r = z * q; (void)r;"),
    "function that Metal does not have": added("const float z = metal::expm1(1.0f); (void)z;"),
    "function of MLX that is not included": added("const float z = expm1f(1.0f); (void)z;"),
    "misspelt attribute function": added("const uint z = simd_prefix_sum(1u); (void)z;"),
    "virtual": added("", "struct V { virtual float f(); };\n"),
    "goto": added("goto out; out:;"),
    "try": added("try { } catch (int) { }"),
    "host header": added("", "#include <cmath>\n"),
    "missing semicolon": added("const float z = 1"),
    "uninitialised variable": added("float z; carry0 = z;", "static float carry0;"),
}
NOT_PORTABLE = {
    "literal without f": ("const float z = 0.5; (void)z;", "a literal without the suffix f"),
    "exponent without f": ("const float z = 1e-3; (void)z;", "a literal without the suffix f"),
    "swizzle": ("const float2 z = float4(1.0f).xy; (void)z;", "no swizzles"),
}


@pytest.fixture
def gcc_alone(monkeypatch):
    """Run the checks as on a machine with g++ and without clang."""
    found, reason = toolchain.compiler("gcc")
    if found is None:
        pytest.skip(reason)
    monkeypatch.setattr(static_check, "type_checker", lambda: (None, "switched off"))
    monkeypatch.setattr(static_check, "compiler", lambda: (found, ""))


@pytest.fixture
def clang():
    """Return the clang of the type check."""
    found, reason = type_check.type_checker()
    if found is None:
        pytest.skip(reason)
    return found


@pytest.mark.usefixtures("gcc_alone")
@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_programs_are_rejected(name):
    capture = sample_kernel.captured(*ILLEGAL[name])
    assert metal_emulator.check_source(capture.source, capture.instance).findings


@pytest.mark.parametrize("name", [n for n in ILLEGAL if "memory" in n or "store" in n])
def test_clang_rejects_wrong_address_spaces(name, clang):
    capture = sample_kernel.captured(*ILLEGAL[name])
    assert type_check.type_findings(clang, capture.source, capture.instance)


@pytest.mark.parametrize("name", LEGAL)
def test_legal_programs_are_accepted(name):
    capture = sample_kernel.captured(*LEGAL[name])
    assert metal_emulator.check_source(capture.source, capture.instance).findings == ()


@pytest.mark.parametrize("name", NOT_PORTABLE)
def test_features_that_differ_in_cuda_are_reported(name):
    statement, message = NOT_PORTABLE[name]
    capture = sample_kernel.captured(*added(statement))
    strict = metal_emulator.check_source(capture.source, capture.instance, portable=True)
    found = [f for f in strict.findings if message in f.message]
    assert statement in found[0].text


def test_the_sample_kernel_is_portable():
    capture = sample_kernel.captured()
    assert (
        metal_emulator.check_source(capture.source, capture.instance, portable=True).findings == ()
    )


def test_findings_name_the_line():
    capture = sample_kernel.captured(*ILLEGAL["double"])
    report = metal_emulator.check_source(capture.source, capture.instance)
    assert {f.text for f in report.findings} == {"double z = 1; (void)z;"}
    with pytest.raises(metal_emulator.KernelError, match="Metal has no double") as raised:
        report.require("sample_kernel")
    assert raised.value.kernel == "sample_kernel"


def test_skipped_checks_are_reported(monkeypatch):
    monkeypatch.setattr(static_check, "type_checker", lambda: (None, "no clang++ on the PATH"))
    monkeypatch.setattr(static_check, "compiler", lambda: (None, "no g++ on the PATH"))
    capture = sample_kernel.captured()
    report = metal_emulator.check_source(capture.source, capture.instance)
    assert report.findings == ()
    assert report.skipped == (
        "compiler: no g++ on the PATH",
        "address spaces as types: no clang++ on the PATH",
    )


def launch_of(source: str, size: int) -> metal_emulator.Launch:
    """Return a launch of a kernel with one input of this size."""
    launches: list[metal_emulator.Launch] = []
    with metal_emulator.emulate(record=launches):
        kernel = mx.fast.metal_kernel(
            name="tiny", input_names=["x"], output_names=["y"], source=source
        )
        kernel(
            inputs=[mx.ones((size,))],
            output_shapes=[(32,)],
            output_dtypes=[mx.float32],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
        )
    return launches[0]


@pytest.mark.usefixtures("gcc_alone")
@pytest.mark.parametrize("size", [4, 40])
@pytest.mark.parametrize("space", ["device", "constant"])
def test_a_typed_pointer_breaks_at_other_sizes(space, size):
    """Inputs of fewer than 8 elements are in constant memory, whatever size was launched."""
    source = f"const {space} float* p = x; y[thread_position_in_grid.x] = p[0];"
    report = metal_emulator.check_launch(launch_of(source, size))
    assert any("p" in f.text for f in report.findings)
    if space == "device":
        assert metal_emulator.check_launch(launch_of(source, 40), never_tiny=["x"]).findings == ()


@pytest.mark.parametrize("size", [4, 40])
def test_auto_fits_every_size(size):
    source = "auto p = x; y[thread_position_in_grid.x] = p[0];"
    assert metal_emulator.check_launch(launch_of(source, size)).findings == ()


def test_geometry_that_cuda_cannot_repeat_is_reported():
    launches = []
    with metal_emulator.emulate(record=launches):
        kernel = mx.fast.metal_kernel(
            name="odd",
            input_names=[],
            output_names=["y"],
            source="y[thread_position_in_grid.x] = 1;",
        )
        kernel(
            inputs=[],
            output_shapes=[(50,)],
            output_dtypes=[mx.int32],
            grid=(50, 1, 1),
            threadgroup=(20, 1, 1),
        )
    messages = [f.message for f in metal_emulator.check_launch(launches[0], portable=True).findings]
    assert messages == [
        "grid 50 is no multiple of the threadgroup 20 in dimension 0",
        "threadgroup of 20 threads is no multiple of a simdgroup of 32",
    ]


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, set()),
        ({"a": {"a"}}, {"a"}),
        ({"a": {"b"}, "b": {"a"}}, {"a"}),
        ({"k": {"a", "b"}, "a": {"c"}, "b": {"c"}, "c": set()}, set()),
        ({"k": {"a"}, "a": {"b"}, "b": {"c"}, "c": {"a"}}, {"a"}),
    ],
)
def test_cycles_of_calls(graph, expected):
    assert recursive(graph) == expected


def test_the_type_check_needs_a_new_clang(monkeypatch):
    """Before clang 17 bfloat has no arithmetic."""
    monkeypatch.setattr(toolchain, "_candidates", lambda base, path: ["old"])
    monkeypatch.setattr(
        toolchain, "_probe", lambda command, oldest: (None, f"{oldest} or newer is needed")
    )
    monkeypatch.setenv("PATH", "another")  # not cached yet
    assert type_check.type_checker() == (None, "17 or newer is needed")
