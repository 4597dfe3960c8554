"""The rule that decides which implementation of an operation runs."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_rgemma import ops
from mlx_rgemma.errors import UserError
from mlx_rgemma.ops import backend
from mlx_rgemma.ops.autograd import inference_mode
from mlx_rgemma.ops.backend import Backend, Operation

X = mx.array([1.0, 2.0])


@pytest.fixture
def no_variable(monkeypatch):
    """The environment variable is not set."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def uncached():
    """Look for the CPU backend, and read the variable, as at the start of a process."""
    caches = (backend._cpu, backend._named)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.fixture
def operation():
    """An operation, and the names of its implementations in the order of their calls."""
    ran: list[str] = []

    def reference(x, y=None, *, factor=1.0):
        ran.append("reference")
        return factor * x

    return Operation(reference), ran


def implement(operation: Operation, ran: list[str], name: str, *, result=None, **options) -> None:
    """Register an implementation for the MLX backend, which has none of its own here."""

    def run(x, y=None, *, factor=1.0):
        ran.append(name)
        return factor * x if result is None else result

    operation.implementation(Backend.MLX, **options)(run)


# The active backend.


def test_the_default_backend(no_variable):
    if mx.default_device().type == mx.gpu:
        assert backend.active() is Backend.METAL
    elif sys.platform == "linux":
        assert backend.active() is Backend.CPU
    else:
        assert backend.active() is Backend.MLX


@pytest.mark.parametrize("has_metal", [True, False], ids=["metal", "another GPU"])
def test_the_default_backend_of_a_gpu(no_variable, monkeypatch, has_metal):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: has_metal)
    assert backend.active() is (Backend.METAL if has_metal else Backend.MLX)


def test_the_default_backend_of_a_cpu_that_is_not_linux(no_variable, uncached, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    assert backend.active() is Backend.MLX


@pytest.mark.parametrize("value", ["metal", "mlx"])
def test_the_variable_names_the_backend(monkeypatch, value):
    monkeypatch.setenv(backend.VARIABLE, value)
    assert backend.active() is Backend(value)


@pytest.mark.parametrize("value", ["on", "", "METAL", "x" * 10_000], ids=lambda v: v[:5] or "empty")
def test_an_unknown_value_is_an_error_that_names_the_backends(monkeypatch, value):
    monkeypatch.setenv(backend.VARIABLE, value)
    message = f"MLX_RGEMMA_BACKEND: found '{value[:20]}.*expected one of metal, cpu, mlx"
    with pytest.raises(UserError, match=message) as error:
        ops.rms_norm(X, X)
    assert len(str(error.value)) < 200


def test_cpu_is_an_error_where_it_does_not_run(monkeypatch, uncached):
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="MLX_RGEMMA_BACKEND: found 'cpu', which is for Linux only"):
        ops.rms_norm(X, X)


def test_use_overrides_the_variable_and_nests(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "unknown")
    with backend.use(Backend.MLX):
        assert backend.active() is Backend.MLX
        with backend.use(Backend.METAL):
            assert backend.active() is Backend.METAL
        assert backend.active() is Backend.MLX
    with pytest.raises(UserError):
        backend.active()


def test_use_ends_with_an_exception(no_variable):
    before = backend.active()
    with pytest.raises(KeyError), backend.use(Backend.METAL):
        raise KeyError
    assert backend.active() is before


def test_use_is_for_one_thread(no_variable):
    before, seen = backend.active(), []
    with backend.use(Backend.METAL):
        thread = threading.Thread(target=lambda: seen.append(backend.active()))
        thread.start()
        thread.join()
    assert seen == [before]


# The choice among implementations.


def test_without_an_implementation_the_reference_runs(operation):
    function, ran = operation
    function.implementation(Backend.METAL)(lambda x: None)
    with backend.use(Backend.MLX):
        assert mx.array_equal(function(X, factor=2.0), 2.0 * X)
    assert ran == ["reference"]


def test_the_first_that_supports_the_arguments_runs(operation):
    function, ran = operation
    implement(function, ran, "long", supports=lambda x, y=None, **options: x.size > 2)
    implement(function, ran, "double", supports=lambda x, y=None, *, factor: factor == 2.0)
    implement(function, ran, "any", supports=lambda x, y=None, **options: y is not None)
    with backend.use(Backend.MLX):
        function(mx.zeros((3,)), factor=2.0)
        function(X, factor=2.0)
        function(X, X, factor=3.0)
        function(X, None, factor=3.0)
    assert ran == ["long", "double", "any", "reference"]


def test_an_implementation_without_gradients_runs_in_inference_mode_only(operation):
    function, ran = operation
    implement(function, ran, "inference", gradient="none")
    with backend.use(Backend.MLX):
        function(X)
        with inference_mode():
            function(X)
        assert mx.array_equal(mx.grad(lambda x: function(x).sum())(X), mx.ones((2,)))
    assert ran == ["reference", "inference", "reference"]


def test_not_implemented_passes_the_call_on(operation):
    function, ran = operation
    implement(function, ran, "first", gradient="none", result=NotImplemented)
    with backend.use(Backend.MLX), inference_mode():
        assert mx.array_equal(function(X), X)
        implement(function, ran, "second", gradient="none")
        assert mx.array_equal(function(X), X)
    assert ran == ["first", "reference", "first", "second"]


def test_the_gradient_is_the_references_unless_it_has_its_own(operation):
    """An implementation that returns wrong values shows whose gradient is taken."""
    for gradient, expected in (("reference", 2.0), ("own", 0.0)):
        function = Operation(lambda x: 2.0 * x)
        function.implementation(Backend.MLX, gradient=gradient)(lambda x: mx.zeros_like(x))
        with backend.use(Backend.MLX):
            value, slope = mx.value_and_grad(lambda x, f=function: f(x).sum())(X)
        assert value.item() == 0.0
        assert mx.array_equal(slope, mx.full((2,), expected)), gradient


def test_replaced_takes_the_place_of_all_implementations(operation):
    function, ran = operation
    implement(function, ran, "first")
    with backend.use(Backend.MLX):
        with function.replaced(Backend.MLX, lambda x: 5.0 * x):
            assert mx.array_equal(function(X), 5.0 * X)
        function(X)
    assert ran == ["first"]


def test_an_operation_keeps_the_references_name_and_text():
    assert ops.gated_gelu.__name__ == "gated_gelu"
    assert "GELU" in ops.gated_gelu.__doc__


# The hooks for more than an operation.


@pytest.mark.parametrize("name", [Backend.METAL, Backend.MLX], ids=str)
def test_other_backends_leave_models_and_optimizers_as_they_are(name):
    model, optimizer = object(), object()
    with backend.use(name):
        assert backend.prepare(model, dequantize=True) == 0
        assert backend.decoder(model) is None
        assert backend.optimizer(optimizer) is optimizer


def test_the_cpu_backend_has_hooks(monkeypatch):
    cpu = SimpleNamespace(
        prepare=lambda model, dequantize: f"prepared {model} {dequantize}",
        decoder=lambda model: f"decoder of {model}",
        optimizer=lambda inner: f"optimizer of {inner}",
    )
    monkeypatch.setattr(backend, "_cpu", lambda: cpu)
    with backend.use(Backend.CPU):
        assert backend.prepare("m", dequantize=False) == "prepared m False"
        assert backend.decoder("m") == "decoder of m"
        assert backend.optimizer("o") == "optimizer of o"
