"""The Metal kernels' sources and validation: when it happens, and what follows a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.emulated import emulated, launched, needs_compiler

from mlx_rgemma import ops
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend
from mlx_rgemma.ops.rg_lru import FORWARD


@pytest.fixture(autouse=True)
def start_of_the_process():
    metal.reset()
    yield
    metal.reset()


@pytest.fixture
def edited(monkeypatch):
    """Return a function that changes the source of one kernel."""

    def edit(file: str, old: str, new: str) -> None:
        original = metal.source

        def source(name: str) -> str:
            text = original(name)
            if name != file:
                return text
            assert old in text
            return text.replace(old, new)

        monkeypatch.setattr(metal, "source", source)
        metal.reset()

    return edit


def rg_lru(dtype=mx.float32, length=20):
    x = mx.random.normal((2, length, 9), key=mx.random.key(0)).astype(dtype)
    return ops.rg_lru(x, x, x, x[0, 0])[0]


def states(name="rg_lru"):
    return {row.state for row in metal.status() if row.name == name}


# Sources.


@pytest.mark.parametrize("kernel", metal.registered(), ids=lambda kernel: kernel.name)
def test_every_kernel_has_a_source_and_a_sample(kernel):
    assert "thread" in metal.source(kernel.file)
    assert kernel.variants
    with backend.use(Backend.MLX):
        results = kernel.reference(*kernel.sample_inputs(*kernel.variants[0]))
    assert len(results) == len(kernel.results or kernel.outputs)
    assert all(mx.isfinite(result).all() for result in results)


def test_every_source_belongs_to_a_kernel():
    files = {kernel.file for kernel in metal.registered()}
    headers = {header for kernel in metal.registered() for header in kernel.headers}
    assert {path.name for path in metal.folder().iterdir()} == files | headers


def test_the_sources_are_found_in_an_installed_package(tmp_path):
    """Inside the package, as a wheel has them; in a clone they are beside it."""
    package = tmp_path / "mlx_rgemma"
    package.symlink_to(Path(metal.__file__).parents[1])
    code = (
        "import pathlib, mlx_rgemma.ops.metal as m;"
        "m.__file__ = r'%s/mlx_rgemma/ops/metal.py';"
        "print(m.folder())"
    )
    sources = tmp_path / "site" / "mlx_rgemma" / "metal"
    sources.mkdir(parents=True)
    (sources / "common.metal").write_text("")
    out = subprocess.run(
        [sys.executable, "-c", code % (tmp_path / "site")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert out.stdout.strip() == str(sources)
    with pytest.raises(FileNotFoundError, match="neither in"):
        metal.folder(tmp_path)


# Validation.


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")
def test_without_metal_nothing_is_tried(monkeypatch):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert metal.unavailable_reason() == "no Metal on this machine"
    rg_lru()
    assert states() == {"untried"}


@needs_compiler
def test_another_backend_launches_nothing():
    with emulated() as launches, backend.use(Backend.MLX):
        rg_lru()
        assert metal.unavailable_reason() == "the backend is mlx"
    assert not launches


@needs_compiler
def test_each_variant_is_validated_on_first_use():
    with emulated(validate=True) as launches:
        rg_lru()
        assert launched(launches) == ["rg_lru"] * 2  # the validation, the call
        rg_lru(length=30)
        assert launched(launches) == ["rg_lru"] * 3
        rg_lru(mx.bfloat16)
        assert launched(launches) == ["rg_lru"] * 5
        rows = [row for row in metal.status() if row.name == "rg_lru"]
        assert {row.variant for row in rows} == {(t, t) for t in (mx.float32, mx.bfloat16)}
        assert states() == {"passed"}
        assert states("rg_lru_backward") == {"untried"}


@needs_compiler
def test_skip_validation_launches_at_once_in_this_thread():
    with emulated() as launches:
        rg_lru()
    assert launched(launches) == ["rg_lru"]
    assert states() == {"untried"}
    trusted = []
    with metal.skip_validation(), metal.skip_validation():
        assert FORWARD.validated(mx.float32, mx.float32)
    with metal.skip_validation():
        thread = threading.Thread(target=lambda: trusted.append(metal._local.trusted))
        thread.start()
        thread.join()
    assert trusted == [False]
    assert not metal._local.trusted


@needs_compiler
@pytest.mark.parametrize("validate", [True, False], ids=["validate", "skip"])
def test_a_dtype_that_no_kernel_takes_is_never_launched(validate):
    with emulated(validate=validate) as launches:
        assert not FORWARD.validated(mx.int32, mx.float32)
    assert not launches


@needs_compiler
@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("all *= a;", "", r"y is off by .* of its largest value"),
        ("float h =", "float h", "does not compile"),
        ("h_last[row * width + d] = h;", "", "h_last is off by nan"),
    ],
    ids=["wrong", "does not compile", "leaves an output unwritten"],
)
def test_a_kernel_that_fails_is_switched_off_with_one_warning(edited, old, new, reason):
    with backend.use(Backend.MLX):
        expected = rg_lru()
    edited("rg_lru.metal", old, new)
    with emulated(validate=True):
        with pytest.warns(RuntimeWarning, match=f"rg_lru.metal.*is switched off.*{reason}"):
            found = rg_lru()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rg_lru()
        assert states() == {"off"}
    assert mx.array_equal(found, expected)


@needs_compiler
def test_a_kernel_that_failed_stays_off_without_validation(edited):
    """`skip_validation` tries no kernel that is known to fail."""
    edited("rg_lru.metal", "all *= a;", "")
    with emulated(validate=True) as launches:
        with pytest.warns(RuntimeWarning, match="switched off"):
            rg_lru()
        before = len(launches)
        with metal.skip_validation():
            rg_lru()
        assert len(launches) == before


@needs_compiler
@pytest.mark.parametrize("name", ["rg_lru", "causal_conv1d"])
def test_a_backward_kernel_may_be_off_alone(edited, name):
    """The forward kernel still runs, and the gradient is the reference's."""
    edited(f"{name}_backward.metal", "const int length", "const int nonsense")
    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    weight = mx.random.normal((9, 4, 1), key=mx.random.key(1))
    a_param = mx.random.normal((9,), key=mx.random.key(4))

    def loss(x, parameter):
        if name == "rg_lru":
            return mx.square(ops.rg_lru(x, 0.5 * x, -x, parameter)[0]).sum()
        return mx.square(ops.causal_conv1d(x, parameter)[0]).sum()

    arrays = x, a_param if name == "rg_lru" else weight
    with backend.use(Backend.MLX):
        expected = mx.grad(loss, argnums=(0, 1))(*arrays)
    with (
        emulated(validate=True) as launches,
        pytest.warns(RuntimeWarning, match=f"{name}_backward"),
    ):
        found = mx.grad(loss, argnums=(0, 1))(*arrays)
    assert launched(launches).count(name) == 2  # the validation, the call
    for one, other in zip(found, expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_a_validation_leaves_the_random_state_alone():
    mx.random.seed(7)
    expected = mx.random.normal((3,))
    mx.random.seed(7)
    with emulated(validate=True):
        rg_lru()
    assert mx.array_equal(mx.random.normal((3,)), expected)


@needs_compiler
@pytest.mark.parametrize("transform", ["grad", "vjp", "checkpoint"])
def test_the_first_call_may_be_inside_a_transformation(transform):
    def loss(x):
        return mx.square(ops.rg_lru(x, 0.5 * x, x, x[0, 0])[0]).sum()

    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    run = {
        "grad": mx.grad(loss),
        "vjp": lambda x: mx.vjp(loss, [x], [mx.array(1.0)])[1][0],
        "checkpoint": mx.grad(mx.checkpoint(loss)),
    }[transform]
    with backend.use(Backend.MLX):
        expected = run(x)
    with emulated(validate=True) as launches:
        found = run(x)
    assert {"rg_lru", "rg_lru_backward"} <= set(launched(launches))
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("trace", ["compile", "vmap", "export"])
def test_a_validation_may_happen_while_a_graph_is_traced(trace):
    """Nothing of the graph can be evaluated then; the validation has arrays of its own."""
    validated = []

    def function(x):
        validated.append(FORWARD.validated(mx.float32, mx.float32))
        return 2.0 * x

    x = mx.ones((3, 4))
    with emulated(validate=True) as launches:
        mx.enable_compile()  # an emulated kernel cannot be compiled, but this graph has none
        if trace == "export":
            mx.export_function(lambda event: None, function, x)
        else:
            result = {"compile": mx.compile, "vmap": mx.vmap}[trace](function)(x)
            assert mx.array_equal(result, 2.0 * x)
    assert validated == [True]
    assert launched(launches) == ["rg_lru"]
