"""Which form runs, when a kernel is tried, and what happens to one that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest
from helpers.emulated import emulated, launched, needs_compiler

from mlx_rgemma import ops
from mlx_rgemma.errors import UserError
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.autograd import inference_mode
from mlx_rgemma.ops.backend import Backend

SCAN = {kernel.name: kernel for kernel in metal.registered()}["linear_scan"]


@pytest.fixture(autouse=True)
def start_of_the_process():
    metal.reset()
    yield
    metal.reset()


@pytest.fixture
def edited(monkeypatch):
    """Make a change to the source of one kernel."""

    def edit(file: str, old: str, new: str) -> None:
        original = metal.source

        def source(name: str) -> str:
            text = original(name)
            if name != file:
                return text
            assert old in text
            return text.replace(old, new)

        monkeypatch.setattr(kernels, "source", source)
        metal.reset()

    return edit


def scan(dtype=mx.float32, length=20):
    x = mx.random.normal((2, length, 9), key=mx.random.key(0)).astype(dtype)
    a = mx.full(x.shape, 0.5, dtype)
    return ops.linear_scan(x, a)[0]


def verdict(name="linear_scan"):
    return {row.state for row in metal.status() if row.name == name}


def test_every_kernel_has_its_source_and_its_example():
    for kernel in metal.registered():
        assert "thread" in metal.source(kernel.file)
        assert kernel.variants
        with backend.use(Backend.MLX):
            results = kernel.reference(*kernel.example(*kernel.variants[0]))
        assert len(results) == len(kernel.results)
        assert all(mx.isfinite(result).all() for result in results), kernel.name


def test_every_source_belongs_to_a_kernel():
    files = {kernel.file for kernel in metal.registered()}
    headers = {header for kernel in metal.registered() for header in kernel.headers}
    assert {path.name for path in metal.folder().iterdir()} == files | headers


def test_without_metal_the_plain_form_runs(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    assert kernels.unavailable() == "no Metal on this machine"
    assert not SCAN.usable(mx.float32, mx.float32)
    assert verdict() == {"untried"}


def test_an_unknown_mode_is_an_error_that_names_the_modes(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "on")
    with pytest.raises(UserError, match="found 'on', expected one of auto, metal, off"):
        scan()


@needs_compiler
def test_off_is_off():
    with emulated(switch="off") as launches:
        scan()
        assert kernels.unavailable() == "MLX_RGEMMA_KERNELS is off"
    assert not launches


@needs_compiler
def test_auto_tries_each_variant_once():
    with emulated(switch="auto") as launches:
        scan()
        assert launched(launches) == ["linear_scan"] * 2  # the trial, the call
        scan(length=30)
        assert launched(launches) == ["linear_scan"] * 3
        scan(mx.bfloat16)
        assert launched(launches) == ["linear_scan"] * 5
        rows = [row for row in metal.status() if row.name == "linear_scan"]
        assert {row.variant for row in rows} == {(t, t) for t in (mx.float32, mx.bfloat16)}
        assert verdict() == {"agrees"}
        assert verdict("rg_lru") == {"untried"}


@needs_compiler
def test_metal_launches_untried():
    with emulated(switch="metal") as launches:
        scan()
    assert launched(launches) == ["linear_scan"]


@needs_compiler
def test_a_dtype_that_no_kernel_takes_uses_the_plain_form():
    with emulated() as launches:
        assert not SCAN.usable(mx.int32, mx.float32)
    assert not launches


@needs_compiler
@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("product[k] *= product[k - 1];", "", r"y is off by .* of its largest value"),
        ("const uint lane =", "const uint lane", "does not compile"),
        ("h_last[row * width + d] = h;", "", "h_last is off by nan"),
    ],
    ids=["wrong", "does not compile", "leaves an output unwritten"],
)
def test_a_kernel_that_fails_is_switched_off_with_one_warning(edited, old, new, reason):
    edited("linear_scan.metal", old, new)
    expected = scan()
    with emulated(switch="auto"):
        with pytest.warns(RuntimeWarning, match=f"linear_scan.metal.*is switched off.*{reason}"):
            found = scan()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scan()
        assert verdict() == {"off"}
    assert mx.array_equal(found, expected)


@needs_compiler
def test_a_backward_kernel_may_be_off_alone(edited):
    edited("rg_lru_backward.metal", "2000.0f", "nonsense")
    shape = (2, 20, 9)
    arrays = [mx.random.normal(shape, key=mx.random.key(i)) for i in range(3)]
    a_param = mx.random.normal((9,), key=mx.random.key(4))

    def loss(*arrays):
        return mx.square(ops.rg_lru(*arrays)[0]).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    expected = gradient(*arrays, a_param)
    with emulated(switch="auto") as launches, pytest.warns(RuntimeWarning, match="rg_lru_backward"):
        found = gradient(*arrays, a_param)
    assert "rg_lru" in launched(launches)
    for one, other in zip(found, expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", ["linear_scan", "causal_conv1d"])
def test_other_backward_kernels_may_be_off_alone(edited, name):
    edited(f"{name}_backward.metal", "const int length", "const int nonsense")
    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    weight = mx.random.normal((9, 4, 1), key=mx.random.key(1))

    def loss(x, weight):
        if name == "linear_scan":
            return mx.square(ops.linear_scan(x, x)[0]).sum()
        return mx.square(ops.causal_conv1d(x, weight)[0]).sum()

    expected = mx.grad(loss, argnums=(0, 1))(x, weight)
    with emulated(switch="auto"), pytest.warns(RuntimeWarning, match=f"{name}_backward"):
        found = mx.grad(loss, argnums=(0, 1))(x, weight)
    for one, other in zip(found, expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_a_trial_leaves_the_random_state_alone():
    mx.random.seed(7)
    expected = mx.random.normal((3,))
    mx.random.seed(7)
    with emulated(switch="auto"):
        scan()
    assert mx.array_equal(mx.random.normal((3,)), expected)


@needs_compiler
@pytest.mark.parametrize("transform", ["grad", "vjp", "checkpoint"])
def test_the_first_call_may_be_inside_a_transformation(transform):
    def loss(x):
        return mx.square(ops.linear_scan(x, 0.5 * x)[0]).sum()

    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    run = {
        "grad": mx.grad(loss),
        "vjp": lambda x: mx.vjp(loss, [x], [mx.array(1.0)])[1][0],
        "checkpoint": mx.grad(mx.checkpoint(loss)),
    }[transform]
    expected = run(x)
    with emulated(switch="auto") as launches:
        found = run(x)
    assert {"linear_scan", "linear_scan_backward"} <= set(launched(launches))
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("trace", ["compile", "vmap", "export"])
def test_a_trial_may_happen_while_a_graph_is_traced(trace):
    """Where nothing of the graph can be evaluated; the trial has arrays of its own."""
    usable = []

    def function(x):
        usable.append(SCAN.usable(mx.float32, mx.float32))
        return 2.0 * x

    x = mx.ones((3, 4))
    with emulated(switch="auto") as launches:
        mx.enable_compile()  # a stand-in cannot be compiled, but nothing launched here is
        if trace == "export":
            mx.export_function(lambda event: None, function, x)
        else:
            result = {"compile": mx.compile, "vmap": mx.vmap}[trace](function)(x)
            assert mx.array_equal(result, 2.0 * x)
    assert usable == [True]
    assert launched(launches) == ["linear_scan"]


class Recorded:
    """What a graph is made of, by `mx.export_function`, which needs no Metal for that."""

    def __init__(self, function, *arrays):
        self.primitives: list[str] = []
        mx.export_function(self._note, function, *arrays)

    def _note(self, event):
        if event["type"] == "primitive":
            self.primitives.append(event["name"])


@pytest.mark.parametrize("transform", ["plain call", "compile"])
def test_graphs_are_recorded_with_kernels(monkeypatch, transform):
    monkeypatch.setenv(kernels.VARIABLE, "metal")

    def loss(x, gate, a_param, h0):
        y, h_last = ops.rg_lru(x, gate, gate, a_param, h0)
        return y.sum() + h_last.sum()

    function = mx.compile(loss) if transform == "compile" else loss
    x = mx.zeros((2, 40, 9))
    with inference_mode():
        graph = Recorded(function, x, x, mx.zeros((9,)), mx.zeros((2, 9)))
    assert graph.primitives.count("CustomKernel") == 1


def test_a_recorded_call_is_one_primitive(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "metal")
    x, vector = mx.zeros((2, 40, 9)), mx.zeros((9,))
    weight, h0 = mx.zeros((9, 4, 1)), mx.zeros((2, 9))
    reset = mx.zeros((1, 40), mx.bool_)

    def scan(x, a, h0, reset):
        return ops.linear_scan(x, a, h0, reset)

    def rg_lru(x, gate, vector, h0, reset):
        bias = {"input_gate_bias": vector, "recurrent_gate_bias": vector}
        return ops.rg_lru(x, gate, gate, vector, h0, reset, **bias)

    def conv(x, weight, vector, state):
        return ops.causal_conv1d(x, weight, vector, state)

    for function, arrays in (
        (scan, (x, x, h0, reset)),
        (rg_lru, (x, x, vector, h0, reset)),
        (conv, (x, weight, vector, mx.zeros((2, 3, 9)))),
    ):
        with inference_mode():
            assert Recorded(function, *arrays).primitives == ["CustomKernel"], function


@pytest.mark.parametrize("transform", ["plain call", "compile", "vmap"])
def test_the_plain_form_is_exported_and_imported(tmp_path, transform):
    def loss(x, gate, a_param, weight):
        x, _ = ops.causal_conv1d(x, weight)
        y, _ = ops.rg_lru(x, gate, gate, a_param)
        return ops.linear_scan(y, mx.sigmoid(gate))[0].sum()

    x = mx.random.normal((2, 20, 9), key=mx.random.key(0))
    arrays = (x, 0.5 * x, x[0, 0], mx.random.normal((9, 4, 1), key=mx.random.key(1)))
    function = {
        "plain call": loss,
        "compile": mx.compile(loss),
        "vmap": mx.vmap(
            lambda x, g, *rest: loss(x[None], g[None], *rest), in_axes=(0, 0, None, None)
        ),
    }[transform]
    expected = function(*arrays)
    file = str(tmp_path / "function.mlxfn")
    with inference_mode():
        mx.export_function(file, function, *arrays)
    (found,) = mx.import_function(file)(*arrays)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_vmap_is_a_loop_over_the_plain_form():
    """MLX vectorizes no custom kernel: `plain_only` is for that."""
    x = mx.random.normal((3, 2, 20, 9), key=mx.random.key(0))
    a_param = mx.random.normal((3, 9), key=mx.random.key(1))
    weight = mx.random.normal((9, 4, 1), key=mx.random.key(2))

    def layer(x, a_param):
        x, _ = ops.causal_conv1d(x, weight)
        return ops.rg_lru(x, x, x, a_param)[0]

    gradient = mx.grad(lambda *arrays: mx.square(layer(*arrays)).sum(), argnums=(0, 1))
    with backend.use(Backend.MLX):
        assert mx.allclose(mx.vmap(layer)(x, a_param)[1], layer(x[1], a_param[1]), atol=1e-6)
        many, one = mx.vmap(gradient)(x, a_param), gradient(x[1], a_param[1])
    for some, expected in zip(many, one, strict=True):
        assert mx.allclose(some[1], expected, rtol=1e-4, atol=1e-5)


def test_the_sources_are_found_in_an_installed_package(tmp_path):
    """Inside the package, as a wheel has them; the clone's folder lies beside it."""
    package = tmp_path / "mlx_rgemma"
    package.symlink_to(os.path.dirname(os.path.dirname(kernels.__file__)))
    code = (
        "import pathlib, mlx_rgemma.ops.kernels as k;"
        "k.__file__ = r'%s/mlx_rgemma/ops/kernels.py';"
        "print(k.folder())"
    )
    metal = tmp_path / "site" / "mlx_rgemma" / "metal"
    metal.mkdir(parents=True)
    (metal / "common.metal").write_text("")
    out = subprocess.run(
        [sys.executable, "-c", code % (tmp_path / "site")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert out.stdout.strip() == str(metal)
    with pytest.raises(FileNotFoundError, match="neither in"):
        metal.folder(tmp_path)
