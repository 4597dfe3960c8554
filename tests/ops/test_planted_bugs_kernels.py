"""Every planted bug of the scan, RG-LRU and convolution kernels is caught."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest
from helpers.emulated import FORWARD_RTOL, GRADIENT_RTOL, assert_close, executed, needs_compiler
from helpers.float64 import to64
from metal_cpu import KernelError
from planted_bugs import BUGS, Bug

from mlx_rgemma.ops import kernels

pytestmark = needs_compiler

KERNELS = {kernel.name: kernel for kernel in kernels.registered()}
PLANTED = [
    pytest.param(name, bug, id=f"{name}: {bug.name}") for name, bugs in BUGS.items() for bug in bugs
]
CASES = sorted({(name, bug.case) for name, bugs in BUGS.items() for bug in bugs})


@functools.cache
def prepared(name: str, case: str):
    """Arguments of a kernel, and the float32 results of its reference, which others have tested."""
    kernel = KERNELS[name]
    dtype = mx.bfloat16 if case == "bf16" else mx.float32
    variant = (dtype, 4) if name.startswith("causal") else (dtype, dtype)
    shape = {"shape": (2, 128, 35)} if case == "whole tiles" else {}
    arguments = list(kernel.example(*variant, **shape))
    if case == "saturated":
        saturate(arguments, entry=7 if name == "rg_lru_backward" else None)
    if case == "no biases":
        arguments[6] = arguments[7] = mx.array([0.0])
    exact = [x.astype(mx.float32) if x.dtype in kernels.FLOATS else x for x in arguments]
    with kernels.plain_only():
        expected = kernel.reference(*exact)
    mx.eval(arguments, expected)
    return arguments, [to64(x) for x in expected]


def saturate(arguments, entry):
    """Coefficients of exactly 1 and next to it, and gates that are open or shut."""
    arguments[3] = mx.array([-40.0, -20.0, -10.0, 0.0, 10.0] * 7)
    odd = mx.arange(35) % 2 == 1
    for gate in (1, 2):
        arguments[gate] = mx.where(odd, 100.0 * arguments[gate], arguments[gate])
    if entry is not None:  # where the forward pass gets to with these
        x, i, r, a_param, kind, *biases = arguments[:entry]
        h0 = arguments[entry][:, 0]
        with kernels.plain_only():
            arguments[entry] = KERNELS["rg_lru"].reference(x, i, r, a_param, h0, kind, *biases)[2]


def run(name: str, case: str, mode: str) -> None:
    kernel = KERNELS[name]
    arguments, expected = prepared(name, case)
    rtol = GRADIENT_RTOL if name.endswith("_backward") else FORWARD_RTOL
    with executed(mode, "reverse"):
        found = kernel.launch(*arguments)
    for result, value, exact in zip(kernel.results, found, expected, strict=True):
        assert_close(result, value, exact, rtol)


@pytest.fixture(autouse=True)
def built_anew():
    kernels.forget()
    yield
    kernels.forget()


@pytest.mark.parametrize("name, case", CASES)
def test_without_a_bug_nothing_is_found(name, case):
    run(name, case, "checked")


@pytest.mark.parametrize("name, bug", PLANTED)
def test_bug_is_caught(monkeypatch, name: str, bug: Bug):
    original, edited = kernels.source, bug.file or KERNELS[name].file

    def source(file: str) -> str:
        return bug.edit(original(file)) if file == edited else original(file)

    monkeypatch.setattr(kernels, "source", source)
    with pytest.raises((KernelError, AssertionError)) as caught:
        run(name, bug.case, "checked")
    found = "checked" if caught.errisinstance(KernelError) else "numbers"
    assert found == bug.caught_by, caught.value
    assert "does not compile" not in str(caught.value)


def test_there_are_enough_of_them():
    assert len({param.id for param in PLANTED}) == len(PLANTED) >= 40
    assert all(len(bugs) >= 5 for bugs in BUGS.values())
