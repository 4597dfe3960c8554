"""Run each kernel on inputs that reveal its mutants, and compare with a reference."""

from __future__ import annotations

import functools
from collections.abc import Callable

import metal_emulator
import mlx.core as mx
import numpy as np
from metal_emulator import Launch

from helpers.attention_cases import Case, counted, packed, windowed_attention
from helpers.emulated import FORWARD_RTOL, GRADIENT_RTOL, assert_close, emulated
from helpers.float64 import to64
from helpers.recurrent_decode_cases import Case as DecodeCase
from mlx_rgemma import ops
from mlx_rgemma.ops import backend, metal
from mlx_rgemma.ops.backend import Backend

KERNELS = {kernel.name: kernel for kernel in metal.registered()}

_HEADS = ("q", "k", "v", "kv", "ring")
NEVER_TINY = {"prefill_attention": _HEADS, "decode_attention": _HEADS, "rotary": _HEADS}
"""Inputs that have 8 elements or more in every call, as a head has 8 channels or more."""


def static_findings(launch: Launch) -> tuple[metal_emulator.Finding, ...]:
    """Return the findings of the static checks on a launch."""
    never_tiny = NEVER_TINY.get(launch.name.removeprefix("mlx_rgemma_"), ())
    return metal_emulator.check_launch(launch, portable=True, never_tiny=never_tiny).findings


# ---- RG-LRU, convolution: the launch alone, against its reference in float32


@functools.cache
def prepared(name: str, case: str):
    """Return the arguments of a kernel, and the results of its reference in float32."""
    kernel = KERNELS[name]
    dtype = mx.bfloat16 if case == "bf16" else mx.float32
    variant = (dtype, 4) if name.startswith("causal") else (dtype, dtype)
    shape = {"shape": (2, 128, 35)} if case == "whole tiles" else {}
    arguments = list(kernel.sample_inputs(*variant, **shape))
    if case == "saturated":
        saturate(arguments, entry=7 if name == "rg_lru_backward" else None)
    if case == "no biases":
        arguments[6] = arguments[7] = mx.array([0.0])
    exact = [x.astype(mx.float32) if x.dtype in metal.FLOATS else x for x in arguments]
    with backend.use(Backend.MLX):
        expected = kernel.reference(*exact)
    mx.eval(arguments, expected)
    return arguments, [to64(x) for x in expected]


def saturate(arguments, entry):
    """Set coefficients to 1 or close to it, and gates to open or shut."""
    arguments[3] = mx.array([-40.0, -20.0, -10.0, 0.0, 10.0] * 7)
    odd = mx.arange(35) % 2 == 1
    for gate in (1, 2):
        arguments[gate] = mx.where(odd, 100.0 * arguments[gate], arguments[gate])
    if entry is not None:  # the states that the forward pass computes from these
        x, i, r, a_param, types, *biases = arguments[:entry]
        h0 = arguments[entry][:, 0]
        with backend.use(Backend.MLX):
            arguments[entry] = KERNELS["rg_lru"].reference(x, i, r, a_param, h0, types, *biases)[2]


def run_launch(name: str, mode: str, case: str) -> list[Launch]:
    """Launch a kernel, and compare with its reference."""
    kernel = KERNELS[name]
    arguments, expected = prepared(name, case)
    rtol = GRADIENT_RTOL if name.endswith("_backward") else FORWARD_RTOL
    with emulated(mode, "reverse") as launches:
        found = kernel.launch(*arguments)
    for result, value, exact in zip(kernel.results or kernel.outputs, found, expected, strict=True):
        assert_close(result, value, exact, rtol)
    return launches


# ---- attention

ATTENTION_CASES = {
    "prefill_attention": [
        Case(3, 20, 12, np.concatenate([packed(29, 20, start=9), counted(3, 29)]), 2, 13, 5),
        Case(2, 20, 12, counted(50, 3), slots=7, write_pos=2, bounded=False),
        Case(1, 20, 40, counted(0, 70), bounded=False),
    ],
    "decode_attention": [
        Case(3, 20, 70, np.array([[41], [80]]), 2, slots=71, write_pos=5),
        Case(10, 20, 9, counted(6, 1), 8, slots=10),
    ],
    "rotary": [Case(2, 20, 5, np.array([[3, 4, 5], [7, 0, 1]]), 2)],
}


def run_attention(name: str, mode: str, _: str) -> list[Launch]:
    """Run an attention kernel, and compare with float64."""
    launches: list[Launch] = []
    for case in ATTENTION_CASES[name]:
        windowed = name == "prefill_attention"
        turned = case if windowed else case.rotated()
        with emulated(mode) as launched:
            if windowed:
                out = windowed_attention(
                    *(case.q, case.k, case.v),
                    window=case.window,
                    max_lookback=case.max_lookback,
                    ring=case.ring,
                )
            else:
                out, kv = ops.prefill_attention(
                    *(case.q, case.k, case.v, *case.angles()),
                    window=case.window,
                    max_lookback=case.max_lookback,
                    ring=case.ring,
                )
                assert mx.array_equal(kv, mx.concatenate([turned.k, turned.v], axis=1))
            assert_close("out", out, turned.expected(), FORWARD_RTOL)
        launches += launched[:1]
    return launches


# ---- decode step of the recurrent block

DECODE_CASES = (
    DecodeCase(3, 3, block=18, token_type=[[0, 1, 0], [0, 0, 0], [0, 2, 2]]),
    DecodeCase(9, 1, token_type=[[n % 3] for n in range(9)]),
    DecodeCase(1, 2, block=40, dtype=mx.bfloat16, weight_dtype=mx.float32),
)


def run_decode(_: str, mode: str, __: str) -> list[Launch]:
    """Run the decode step, and compare with float64."""
    launches: list[Launch] = []
    for case in DECODE_CASES:
        with emulated(mode) as launched:
            results = ops.recurrent_decode(*case.arrays)
            mx.eval(results)
        launches += launched
        for (name, exact), value in zip(case.expected().items(), results, strict=True):
            assert_close(name, value, exact, FORWARD_RTOL)
    return launches


# ---- norms

EPS = 1e-6


def run_norm(kernel: str, mode: str, _: str) -> list[Launch]:
    """Run a norm, and compare with float64."""
    launches: list[Launch] = []
    for width, scale in ((300, 1e-3), (37, 1.0)):
        rng = np.random.default_rng(width)
        x, delta = (mx.array(rng.standard_normal((3, width), np.float32)) * scale for _ in range(2))
        delta = delta.astype(mx.bfloat16)
        weight = mx.array(rng.standard_normal(width, np.float32)).astype(mx.bfloat16)
        with emulated(mode) as launched:
            if kernel == "rms_norm":
                y = ops.rms_norm(x, weight, EPS, dtype=mx.bfloat16)
            else:
                total, y = ops.add_rms_norm(x, delta, weight, EPS)
                x = x + delta.astype(mx.float32)
                assert mx.array_equal(total, x)
            mx.eval(y)
        launches += launched
        z = to64(x)
        exact = z / np.sqrt(np.square(z).mean(axis=-1, keepdims=True) + EPS) * (1 + to64(weight))
        assert_close("y", y, exact, FORWARD_RTOL)
    return launches


RUNS: dict[str, Callable[[str, str, str], list[Launch]]] = {
    "add_rms_norm": run_norm,
    "causal_conv1d": run_launch,
    "causal_conv1d_backward": run_launch,
    "recurrent_decode": run_decode,
    "rg_lru": run_launch,
    "rg_lru_backward": run_launch,
    "decode_attention": run_attention,
    "rms_norm": run_norm,
    "rotary": run_attention,
    "prefill_attention": run_attention,
}
"""By kernel: a function of kernel, mode of the emulator and case that asserts the values."""
