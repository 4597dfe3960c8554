"""Emulated kernels compute correct values, and behave as MLX's kernels do."""

from __future__ import annotations

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
import sample_kernel
from requirements import needs_compiler

pytestmark = needs_compiler

DOUBLE = "uint i = thread_position_in_grid.x; y[i] = static_cast<T>(x[i] * s);"


def doubling(**options):
    """Build a kernel that computes y = x * s for a number s."""
    kernel = mx.fast.metal_kernel(
        name="scale", input_names=["x", "s"], output_names=["y"], source=DOUBLE, **options
    )

    def scale(x: mx.array, s: float | mx.array) -> mx.array:
        return kernel(
            inputs=[x, s],
            template=[("T", x.dtype)],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
        )[0]

    return scale


def run(source: str, inputs: list, shapes: list, dtypes: list, threads: int = 1, **options):
    """Run a kernel with inputs x0, x1, ..., and return its outputs y0, y1, ..."""
    kernel = mx.fast.metal_kernel(
        name="probe",
        input_names=[f"x{i}" for i in range(len(inputs))],
        output_names=[f"y{i}" for i in range(len(shapes))],
        source=source,
        **{k: options.pop(k) for k in ("ensure_row_contiguous", "atomic_outputs") if k in options},
    )
    return kernel(
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=dtypes,
        grid=(threads, 1, 1),
        threadgroup=(min(threads, 64), 1, 1),
        **options,
    )


@pytest.mark.parametrize("dtype", sample_kernel.DTYPES)
@pytest.mark.parametrize("length", [1, 7, 16, 37])
def test_values_in_every_dtype_and_length(dtype, length):
    given = sample_kernel.case(2, length, 64, dtype)
    y, last = sample_kernel.reference(given)
    with metal_emulator.emulate():
        got_y, got_last = sample_kernel.call(sample_kernel.make(), given)
    assert got_y.dtype == dtype
    assert sample_kernel.relative_error(got_y, y) < sample_kernel.TOLERANCE[dtype]
    assert sample_kernel.relative_error(got_last, last) < sample_kernel.TOLERANCE[mx.float32]


@pytest.mark.parametrize("mode", ["fast", "checked"])
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_thread_order_changes_no_bit(mode, order):
    given = sample_kernel.case(2, 37, 64, mx.float32)
    with metal_emulator.emulate():
        expected = sample_kernel.call(sample_kernel.make(), given)
    for seed in range(2):
        with metal_emulator.emulate(mode, order, seed=seed):
            got = sample_kernel.call(sample_kernel.make(), given)
        assert all(sample_kernel.same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_a_result_that_depends_on_the_order_shows():
    """All threads of a simdgroup write one element, and the last one wins."""
    source = "y0[0] = int(thread_position_in_grid.x);"
    results = set()
    for order, seed in [("forward", 0), ("reverse", 0), ("random", 1)]:
        with metal_emulator.emulate(order=order, seed=seed):
            results.add(run(source, [], [(1,)], [mx.int32], threads=32)[0].item())
    assert {0, 31} < results


def test_everything_is_restored():
    factory, available, device = mx.fast.metal_kernel, mx.metal.is_available, mx.default_device
    with pytest.raises(ZeroDivisionError), metal_emulator.emulate(as_default_device=True):
        assert mx.metal.is_available()
        assert mx.default_device() == mx.gpu
        assert mx.fast.metal_kernel is not factory
        raise ZeroDivisionError
    assert mx.fast.metal_kernel is factory
    assert mx.metal.is_available is available
    assert mx.default_device is device


def test_contexts_nest_and_kernels_outlive_them():
    x, outer, inner = mx.arange(9.0), [], []
    with metal_emulator.emulate(record=outer):
        scale = doubling()
        with metal_emulator.emulate("checked", "reverse", record=inner):
            scale(x, 2.0)
        scale(x, 2.0)
    assert [(launch.mode, launch.order) for launch in inner] == [("checked", "reverse")]
    assert [(launch.mode, launch.order) for launch in outer] == [("fast", "forward")]
    with pytest.raises(metal_emulator.KernelError, match="called outside"):
        scale(x, 2.0)
    with metal_emulator.emulate():
        assert scale(x, 2.0).tolist() == (2 * x).tolist()


@pytest.mark.parametrize("argument", ["mode", "order"])
def test_misspelt_arguments(argument):
    refused = pytest.raises(ValueError, match=f"{argument}: found 'fats', expected one of")
    with refused, metal_emulator.emulate(**{argument: "fats"}):
        pass


def test_lazy_inputs_are_evaluated():
    with metal_emulator.emulate():
        y = doubling()(mx.sin(mx.arange(12.0)) + 1, 3.0)
    np.testing.assert_allclose(np.array(y), 3 * (np.sin(np.arange(12)) + 1), atol=1e-6)


def test_gradients_through_a_custom_function():
    x = mx.arange(1.0, 13.0).reshape(3, 4)
    with metal_emulator.emulate():
        scale = doubling()

        @mx.custom_function
        def double(x):
            return scale(x, 2.0)

        @double.vjp
        def double_vjp(primals, cotangent, output):
            return scale(cotangent, 2.0)

        def loss(x):
            return double(mx.sin(x)).sum()

        expected = np.array(2 * mx.cos(x))
        value, gradient = mx.value_and_grad(loss)(x)
        np.testing.assert_allclose(value.item(), 2 * mx.sin(x).sum().item(), rtol=1e-6)
        np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-6)
        np.testing.assert_allclose(np.array(mx.grad(mx.checkpoint(loss))(x)), expected, rtol=1e-6)
        _, (pulled,) = mx.vjp(lambda x: double(mx.sin(x)), [x], [mx.ones_like(x)])
        np.testing.assert_allclose(np.array(pulled), expected, rtol=1e-6)


def test_a_bare_kernel_has_no_gradient():
    with metal_emulator.emulate():
        scale = doubling()
        with pytest.raises(metal_emulator.KernelError, match="has no gradient"):
            mx.grad(lambda x: scale(x, 2.0).sum())(mx.arange(9.0))


def test_compiled_functions_run_uncompiled():
    x = mx.arange(9.0) / 9
    with metal_emulator.emulate():
        scale = doubling()
        compiled = mx.compile(lambda x: scale(mx.exp(x), 2.0))
        np.testing.assert_allclose(np.array(compiled(x)), 2 * np.exp(np.array(x)), rtol=1e-6)
    calls = []
    recompiled = mx.compile(lambda x: (calls.append(1), x + 1)[1])
    mx.eval(recompiled(x), recompiled(x))
    assert len(calls) == 1  # mx.compile is enabled again


def test_vmap_is_refused():
    with metal_emulator.emulate():
        scale = doubling()
        with pytest.raises(
            metal_emulator.KernelError, match="cannot run inside this function transf"
        ):
            mx.vmap(lambda x: scale(x, 2.0))(mx.ones((3, 9)))


def test_inputs_that_are_not_contiguous_are_copied():
    x = mx.arange(60.0).reshape(3, 4, 5)
    views = {
        "transposed": x.transpose(2, 0, 1),
        "sliced": x[1:, ::2, ::-1],
        "broadcast": x[:, :1] + 0 * x,
    }
    with metal_emulator.emulate("checked"):
        scale = doubling()
        for name, view in views.items():
            assert scale(view, 2.0).tolist() == (2 * view).tolist(), name


@pytest.mark.parametrize("dtype", sample_kernel.DTYPES)
def test_strided_inputs_keep_their_strides(dtype):
    source = """
    const uint row = thread_position_in_grid.x / uint(x0_shape[1]);
    const uint column = thread_position_in_grid.x % uint(x0_shape[1]);
    y0[thread_position_in_grid.x] = x0[long(row) * x0_strides[0] + long(column) * x0_strides[1]];
    if (thread_position_in_grid.x == 0) {
      y1[0] = x0_ndim;
    }
    """
    x = mx.arange(24.0).reshape(4, 6).astype(dtype)
    for view in (x, x.T, x[1:, ::-2], x[::-1, 2:4], mx.broadcast_to(x[:, :1], (4, 6))):
        for contiguous in (False, True):
            with metal_emulator.emulate("checked"):
                y, ndim = run(
                    source,
                    [view],
                    [view.shape, (1,)],
                    [dtype, mx.int32],
                    threads=view.size,
                    ensure_row_contiguous=contiguous,
                )
            assert y.tolist() == view.tolist()
            assert ndim.item() == 2


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_tiny_inputs_are_in_constant_memory(size):
    launches = []
    with metal_emulator.emulate("checked", record=launches):
        y = doubling()(mx.arange(size), 3)
    assert y.tolist() == [3 * i for i in range(size)]
    space = "constant" if size < 8 else "device"
    assert f"const {space} int32_t* x [[buffer(0)]]" in launches[0].source
    assert "const constant int32_t& s [[buffer(1)]]" in launches[0].source


def test_numbers_as_inputs():
    source = "y0[0] = x0; y1[0] = x1; y2[0] = x2; y3[0] = x3;"
    inputs = [mx.array(3, dtype=mx.uint8), -2, True, 0.5]
    dtypes = [mx.uint8, mx.int32, mx.bool_, mx.float32]
    with metal_emulator.emulate("checked"):
        outputs = run(source, inputs, [(1,)] * 4, dtypes)
    assert [y.item() for y in outputs] == [3, -2, True, 0.5]


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_dtypes(name):
    limits = np.iinfo(name)
    values = np.array([0, 1, limits.min, limits.max, 5, 6, 7, 8, 9], dtype=name)
    source = "uint i = thread_position_in_grid.x; y0[i] = x0[i]; y1[i] = x0[i] == x0[3];"
    shapes = [(9,), (9,)]
    with metal_emulator.emulate("checked"):
        y, equal = run(source, [mx.array(values)], shapes, [getattr(mx, name), mx.bool_], threads=9)
    assert np.array_equal(np.array(y), values)
    assert equal.tolist() == (values == limits.max).tolist()


def test_complex_numbers_pass_through():
    x = mx.array(np.arange(9) + 1j)
    source = "uint i = thread_position_in_grid.x; y0[i] = x0[i] * x0[i];"
    with metal_emulator.emulate("checked"):
        (y,) = run(source, [x], [(9,)], [mx.complex64], threads=9)
    np.testing.assert_allclose(np.array(y), (np.arange(9) + 1j) ** 2)


def test_empty_inputs_and_outputs():
    source = "if (thread_position_in_grid.x == 0) { y0[0] = x0_shape[0]; }"
    with metal_emulator.emulate("checked"):
        y, nothing = run(source, [mx.zeros((0, 3))], [(1,), (0, 5)], [mx.int32, mx.float32])
        untouched = doubling()(mx.zeros((0,)), 2.0)
    assert y.item() == 0
    assert nothing.shape == (0, 5)
    assert untouched.shape == (0,)


def test_no_inputs():
    with metal_emulator.emulate("checked"):
        (y,) = run("y0[thread_position_in_grid.x] = 7;", [], [(40,)], [mx.int32], threads=40)
    assert y.tolist() == [7] * 40


@pytest.mark.parametrize("dtype", sample_kernel.DTYPES)
def test_init_value(dtype):
    source = "y0[2] = static_cast<T>(static_cast<float>(y0[2]) + 1.0f);"
    with metal_emulator.emulate("checked"):
        (y,) = run(source, [], [(4,)], [dtype], init_value=0.5, template=[("T", dtype)])
    assert y.tolist() == [0.5, 0.5, 1.5, 0.5]


def test_outputs_start_as_nan():
    """An element that a kernel does not write must not look like a result."""
    with metal_emulator.emulate():
        (y,) = run("y0[1] = 4.0f;", [], [(3,)], [mx.float32])
    assert np.isnan(np.array(y)).tolist() == [True, False, True]


def test_atomic_outputs():
    source = (
        "atomic_fetch_add_explicit(&y0[i], x0[thread_position_in_grid.x], memory_order_relaxed);"
    )
    for dtype in (mx.int32, mx.uint32, mx.float32):
        with metal_emulator.emulate("checked", "random"):
            (y,) = run(
                "const uint i = thread_position_in_grid.x % 3;" + source,
                [mx.arange(99).astype(dtype)],
                [(3,)],
                [dtype],
                threads=99,
                atomic_outputs=True,
                init_value=0,
            )
        assert y.tolist() == [sum(range(i, 99, 3)) for i in range(3)]


def test_the_last_threadgroup_may_be_smaller():
    source = """
    const uint i = thread_position_in_grid.x;
    y0[i] = int(threads_per_threadgroup.x);
    y1[i] = int(threadgroup_position_in_grid.x * 100 + thread_position_in_threadgroup.x);
    y2[i] = int(threads_per_grid.x * 10 + threadgroups_per_grid.x);
    """
    with metal_emulator.emulate("checked"):
        sizes, places, totals = run(source, [], [(100,)] * 3, [mx.int32] * 3, threads=100)
    assert sizes.tolist() == [64] * 64 + [36] * 36
    assert places.tolist() == [*range(64), *range(100, 136)]
    assert set(totals.tolist()) == {1002}


def test_positions_in_three_dimensions():
    source = """
    const uint3 p = thread_position_in_grid;
    const uint i = (p.z * 4 + p.y) * 8 + p.x;
    y[i] = int(thread_index_in_threadgroup * 1000000 + simdgroup_index_in_threadgroup * 10000
        + thread_index_in_simdgroup * 100 + threadgroup_position_in_grid.z * 10
        + simdgroups_per_threadgroup);
    """
    with metal_emulator.emulate("checked"):
        kernel = mx.fast.metal_kernel(
            name="positions", input_names=[], output_names=["y"], source=source
        )
        (y,) = kernel(
            inputs=[],
            output_shapes=[(2, 4, 8)],
            output_dtypes=[mx.int32],
            grid=(8, 4, 2),
            threadgroup=(8, 4, 1),
        )
    index = np.arange(32)
    expected = index * 1000000 + index * 100 + 1
    assert np.array_equal(np.array(y)[0].ravel(), expected)
    assert np.array_equal(np.array(y)[1].ravel(), expected + 10)


def test_template_arguments():
    source = "y0[0] = N + (FLAG ? 100 : 0) + int(sizeof(T));"
    template = [("T", mx.float16), ("N", 40), ("FLAG", True)]
    with metal_emulator.emulate():
        assert run(source, [], [(1,)], [mx.int32], template=template)[0].item() == 142


def test_denormals_can_be_flushed():
    x = mx.array([1e-20] * 9)
    with metal_emulator.emulate():
        kept = doubling()(x, 1e-20)
    with metal_emulator.emulate(flush_denormals=True):
        flushed = doubling()(x, 1e-20)
    assert kept.max().item() > 0
    assert flushed.max().item() == 0
    assert np.float32(1e-20) * np.float32(1e-20) > 0  # the process does not flush


def test_verbose_prints_the_source(capsys):
    with metal_emulator.emulate():
        run("y0[0] = 1;", [], [(1,)], [mx.int32], verbose=True)
    assert "[[kernel]] void" in capsys.readouterr().out


def test_calls_from_several_threads():
    """The runtime runs one grid at a time, and concurrent callers wait."""
    from concurrent.futures import ThreadPoolExecutor

    with metal_emulator.emulate():
        scale = doubling()
        scale(mx.arange(64.0), 1.0)
        with ThreadPoolExecutor(4) as pool:
            inputs = [np.arange(64, dtype=np.float32) + i for i in range(16)]
            results = list(pool.map(lambda x: np.array(scale(mx.array(x), 2.0)), inputs))
    assert all(np.array_equal(y, 2 * x) for x, y in zip(inputs, results, strict=True))
