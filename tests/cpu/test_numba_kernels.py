"""Numba kernels agree with the references, and run only where they should."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.assertions import LOGITS_ATOL, max_error, relative_error
from helpers.attention_cases import windowed_attention
from helpers.float64 import conv as conv64
from helpers.float64 import rg_lru as rg_lru64
from helpers.float64 import to64
from helpers.models import golden, golden_model

from mlx_rgemma.cpu import numba_runtime
from mlx_rgemma.ops import (
    add_rms_norm,
    causal_conv1d,
    gated_gelu,
    inference_mode,
    rg_lru,
    rms_norm,
)
from mlx_rgemma.ops.backend import Backend, use
from mlx_rgemma.ops.ring_buffer import RingBuffer

FLOATS = {"fp32": mx.float32, "bf16": mx.bfloat16, "fp16": mx.float16}
ROUNDING = {mx.float32: 0.0, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}


def normal(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def both(compute, ran: list[str]) -> tuple[list[mx.array], list[mx.array]]:
    """Results of the references, and of the kernels."""
    with use(Backend.MLX):
        plain = compute()
        mx.eval(plain)
    assert not ran
    with inference_mode():
        found = compute()
    assert ran
    return plain, found


def agree(compute, ran: list[str], bound: float = 5e-7) -> None:
    for plain, found in zip(*both(compute, ran), strict=True):
        assert found.dtype == plain.dtype and found.shape == plain.shape
        error = relative_error(found.astype(mx.float32), np.array(plain.astype(mx.float32)))
        assert error < bound + 2.0 * ROUNDING[plain.dtype]  # both are rounded


SHAPES = [(1, 16, 32), (3, 100, 99), (2, 300, 160), (1, 17, 1)]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu(ran, shape, dtype):
    gate, x = 3.0 * normal(*shape), normal(*shape, seed=1)
    agree(lambda: [gated_gelu(gate.astype(dtype), x.astype(dtype))], ran)


def test_gelu_of_numbers_far_out(ran):
    gate = mx.array([[-np.inf, -1e30, -90.0, -0.0, 0.0, 90.0, 1e30, np.inf, np.nan]] * 16)
    with inference_mode():
        found = np.array(gated_gelu(gate, mx.ones(gate.shape)))
    assert ran == ["gated_gelu"]
    assert (np.abs(found[:, 1:5]) < 1e-8).all() and np.isnan(found[:, 8]).all()
    assert (
        (found[:, 5] == 90.0).all() and (found[:, 6] > 9e29).all() and np.isinf(found[:, 7]).all()
    )


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(ran, shape, dtype):
    x, delta = normal(*shape), normal(*shape, seed=1, dtype=dtype)
    weight = normal(shape[-1], seed=2, dtype=dtype)
    agree(lambda: [rms_norm(x, weight, dtype=dtype), *add_rms_norm(x, delta, weight)], ran)
    assert ran == ["rms_norm", "add_rms_norm"]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("taps", [2, 4, 7])
@pytest.mark.parametrize("layout", ["plain", "packed", "shared", "ragged"])
def test_convolution(ran, taps, layout, dtype):
    batch, length, width = 3, 50, 35
    x, bias = normal(batch, length, width, dtype=dtype), normal(width, seed=1, dtype=dtype)
    weight = normal(width, taps, 1, seed=2, dtype=dtype)
    state = normal(batch, taps - 1, width, seed=3, dtype=dtype)
    pos = (mx.arange(length) + mx.arange(batch)[:, None]) % 5
    lengths = mx.array([length, 0, 9]) if layout == "ragged" else None
    given = {"plain": None, "packed": pos, "shared": pos[:1], "ragged": pos}[layout]

    def compute():
        return list(causal_conv1d(x, weight, bias, state, segment_pos=given, lengths=lengths))

    agree(compute, ran)
    ran.clear()
    agree(lambda: list(causal_conv1d(x, weight, None, segment_pos=given)), ran)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_convolution_in_float64(ran, layout):
    batch, length, width, taps = 2, 40, 24, 4
    x, bias, weight = normal(batch, length, width), normal(width, seed=1), normal(width, taps, 1)
    state = normal(batch, taps - 1, width, seed=3)
    pos = (mx.arange(length) % 6)[None] + mx.zeros((batch, 1), mx.int32)
    far = np.full((batch, length), 99)
    given = pos if layout == "packed" else None
    zeros = np.zeros(x.shape), np.zeros(state.shape)
    where = far if given is None else np.array(pos)
    arrays = (to64(z) for z in (x, weight, bias, state))
    expected = conv64(*arrays, where, np.full(batch, length), *zeros)
    with inference_mode():
        y, new_state = causal_conv1d(x, weight, bias, state, segment_pos=given)
    assert ran and relative_error(y, expected["y"]) < 5e-7
    assert relative_error(new_state, expected["new_state"]) == 0.0


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("kinds", ["normal", "shared resets", "resets", "padding"])
@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 100, 99), (2, 300, 160)], ids=str)
def test_rg_lru(ran, shape, kinds, dtype):
    """From a memory without end (a = 1) to none, over every kind of step; beside float64."""
    batch, length, width = shape
    x, gate_i, gate_r = (normal(*shape, seed=i, dtype=dtype) for i in range(3))
    a_param = mx.where(mx.arange(width) == 0, -40.0, mx.arange(width) % 16 - 11.0)
    bias_i, bias_r = normal(width, seed=4), normal(width, seed=5)
    h0 = normal(batch, width, seed=6)
    steps = mx.arange(length) + 3 * mx.arange(batch)[:, None]
    reset = {"normal": None, "shared resets": steps[:1] % 9 == 0}.get(kinds, steps % 9 == 0)
    mask = steps < length - 5 if kinds == "padding" else None
    kind = np.zeros((batch, length), int) if reset is None else np.broadcast_to(reset, steps.shape)
    kind = np.where(True if mask is None else np.array(mask), kind, 2)

    def compute(*floats):
        x, gate_i, gate_r, a_param, h0, bias_i, bias_r = floats
        more = {"input_gate_bias": bias_i, "recurrent_gate_bias": bias_r}
        return list(rg_lru(x, gate_i, gate_r, a_param, h0, reset, mask, **more))

    arrays = (x, gate_i, gate_r, a_param, h0, bias_i, bias_r)
    agree(lambda: compute(*arrays), ran, 5e-6)
    zeros = np.zeros(shape), np.zeros(h0.shape)
    exact = [to64(z) for z in arrays]
    expected = rg_lru64(*exact[:5], kind, *exact[5:], *zeros)
    with inference_mode():
        y, h_last = compute(*arrays)
    assert relative_error(y.astype(mx.float32), expected["y"]) < 2e-6 + ROUNDING[dtype]
    assert relative_error(h_last, expected["h_last"]) < 2e-6


def test_rg_lru_without_state_and_biases(ran):
    arrays = [normal(2, 40, 64, seed=i) for i in range(3)]
    agree(lambda: list(rg_lru(*arrays, normal(64, seed=3))), ran)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("positions", ["all", "shared", "by row"])
@pytest.mark.parametrize("past, head", [(0, 0), (150, 0), (200, 63)])
@pytest.mark.parametrize("length", [16, 130, 400])
@pytest.mark.parametrize("heads, dim", [(3, 16), (2, 64), (1, 80)])
def test_attention(ran, heads, dim, length, past, head, positions, dtype):
    """A window of 150; the softmax in fp32, of products in the dtype given."""
    q, k, v = (
        normal(2, count, length, dim, seed=i, dtype=dtype) for i, count in enumerate((heads, 1, 1))
    )
    ring = RingBuffer(normal(2, 2, past, dim, seed=5, dtype=dtype), head) if past else None
    steps = mx.arange(length) + 11 * mx.arange(2)[:, None]
    max_lookback = {"all": None, "shared": steps[:1] % 37, "by row": steps % 67}[positions]
    max_lookback = None if max_lookback is None else mx.minimum(max_lookback, 150).astype(mx.int32)

    def compute(dtype=dtype):
        past = None if ring is None else RingBuffer(ring.kv.astype(dtype), ring.write_pos)
        arrays = (z.astype(dtype) for z in (q, k, v))
        options = {"window": 150, "max_lookback": max_lookback, "ring": past}
        return windowed_attention(*arrays, **options)

    with use(Backend.MLX):  # in fp32: MLX rounds scores of half precision
        expected = np.array(compute(mx.float32))
    assert not ran
    with inference_mode():
        found = compute()
    assert ran and found.dtype == dtype
    assert relative_error(found.astype(mx.float32), expected) < 2e-6 + ROUNDING[dtype]


def test_scores_far_out(ran):
    """One key far above all others takes everything; a number that is none spoils its row alone."""
    q, k, v = normal(1, 2, 40, 16), normal(1, 1, 40, 16, seed=1), normal(1, 1, 40, 16, seed=2)
    k[:, :, 7] = q[:, :1, 20] * 1e4
    q[0, 1, 30] = mx.nan
    plain, found = both(lambda: [windowed_attention(q, k, v, window=40)], ran)
    plain, found = np.array(plain[0]), np.array(found[0])
    assert np.isnan(found[0, 1, 30]).all() and np.isnan(found).sum() == 16
    assert np.abs(np.nan_to_num(found) - np.nan_to_num(plain)).max() < 1e-5
    assert np.abs(found[0, 0, 20] - np.array(v[0, 0, 7])).max() < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_makes_no_difference(ran, monkeypatch, threads):
    arrays = [normal(2, 33, 40, seed=i) for i in range(3)]

    def compute():
        with inference_mode():
            found = [gated_gelu(*arrays[:2]), *add_rms_norm(*arrays[:2], arrays[2][0, 0])]
            found += rg_lru(*arrays, arrays[0][0, 0])
            q, kv = arrays[0].reshape(2, 4, 33, 10), arrays[1].reshape(2, 4, 33, 10)
            return [*found, windowed_attention(q, kv[:, :1], kv[:, 1:2], window=20)]

    expected = [np.array(x) for x in compute()]
    monkeypatch.setattr(numba_runtime, "num_threads", lambda: threads)
    assert all((np.array(x) == y).all() for x, y in zip(compute(), expected, strict=True))


@pytest.mark.parametrize("size", [16, 40, 1000])
def test_logits_are_googles(ran, model_name, size):
    """A model that generates reads its prompt by loops, in chunks of any size."""
    model = golden_model(model_name)
    model.eval()
    data = golden(f"decode/{model_name}.npz")
    tokens, expected = mx.array(data["tokens"]), data["google_full"]
    cache, found = model.make_cache(tokens.shape[0]), []
    for at in range(0, tokens.shape[1], size):
        found.append(np.array(model(tokens[:, at : at + size], cache=cache)))
    assert max_error(np.concatenate(found, axis=1), expected) < LOGITS_ATOL
    every = {
        "gated_gelu",
        "rms_norm",
        "add_rms_norm",
        "causal_conv1d",
        "rg_lru",
        "sliding_window_attention",
    }
    assert set(ran) == every


def test_a_decode_loop_runs_none(ran):
    """It never waits for an array: all that a step computes is computed when its token is read."""
    model = golden_model("tiny-2b")
    model.eval()
    cache = model.make_cache(1)
    for _ in range(3):
        model(mx.array([[3]]), cache=cache)
        model(mx.array([[3, 4, 5, 6, 7]]), cache=cache)
    assert not ran


def test_a_model_that_is_trained_runs_none(ran):
    model = golden_model("tiny-2b")
    model.train()
    model(mx.ones((2, 64), mx.int32))
    model(mx.ones((2, 64), mx.int32), cache=model.make_cache(2))
    model.eval()
    model(mx.ones((2, 64), mx.int32))  # its gradient may be asked for
    assert not ran


def test_small_arrays_and_short_sequences_run_none(ran, monkeypatch):
    monkeypatch.setattr(numba_runtime, "MIN_ELEMENTS", 40 * 64)
    for shape, expected in (((1, 40, 64), True), ((1, 39, 64), False), ((64, 15, 64), False)):
        ran.clear()
        with inference_mode():
            gated_gelu(normal(*shape), normal(*shape))
        assert bool(ran) == expected, shape


def test_without_numba_other_implementations_run(ran, monkeypatch):
    monkeypatch.setattr(numba_runtime, "available", lambda: False)
    gate = normal(1, 64, 64)
    with inference_mode():
        found = gated_gelu(gate, gate)
    assert mx.array_equal(found, gated_gelu(gate, gate)) and not ran


@pytest.mark.parametrize("backend", [Backend.MLX, Backend.METAL])
def test_other_backends_run_none(ran, backend):
    gate = normal(1, 64, 64)
    with use(backend), inference_mode():
        gated_gelu(gate, gate)
    assert not ran


def test_arrays_without_values_take_plain_operations(ran):
    """Within `mx.vmap`; for `mx.compile` see the tests of Adam and of a step by loops."""
    x, weight = normal(3, 40, 64), normal(64, seed=1)
    cos = [normal(3, 2, 40, 16, seed=2), *(normal(3, 1, 40, 16, seed=s) for s in (3, 4))]

    def everything(x, q, k, v):
        y, _ = causal_conv1d(x, mx.ones((64, 4, 1)))
        h, _ = rg_lru(y, x, x, weight)
        total, normalized = add_rms_norm(x, h, weight)
        out = windowed_attention(q, k, v, window=20)
        return [gated_gelu(rms_norm(total, weight), normalized), out]

    def lists(x, q, k, v):
        return everything(x[None], q[None], k[None], v[None])

    plain = everything(x, *cos)
    with inference_mode():
        mapped = mx.vmap(lists)(x, *cos)
    assert not ran
    for a, b in zip(plain, mapped, strict=True):
        assert relative_error(b[:, 0], np.array(a)) < 2e-6


def test_in_other_threads(ran):
    gate = normal(1, 64, 64)
    mx.eval(gate)
    found = []

    def work():
        with inference_mode():
            found.append(np.array(gated_gelu(gate, gate)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all((x == found[0]).all() for x in found)


def test_importing_and_decoding_do_not_load_numba():
    """It takes a third of a second."""
    code = (
        "import sys, mlx_rgemma; from mlx_rgemma.ops import gated_gelu, inference_mode\n"
        "import mlx.core as mx\n"
        "x = mx.ones((1, 1, 99999))\n"
        "with inference_mode(): mx.eval(gated_gelu(x, x))\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_a_place_for_what_was_compiled(tmp_path):
    """A package in a folder, and a home, that cannot be written to: it is compiled each time."""
    blocked = tmp_path / "file"
    blocked.touch()
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from mlx_rgemma.cpu import numba_runtime\n"
        "import numpy as np\n"
        "x, y = np.ones(64, np.float32), np.empty(64, np.float32)\n"
        "numba_runtime.run('gated_gelu', 64, x, x, y)\n"
        "assert abs(y - 0.841192).max() < 1e-5, y\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(blocked / "below")}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)


RINGS = [(1, 0, 41), (1, 1, 41), (3, 7, 41), (20, 30, 41), (20, 5, 41), (41, 40, 41), (41, 11, 41)]
RINGS += [(300, 150, 300), (257, 0, 300), (130, 290, 600)]


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("heads, dim", [(3, 16), (8, 64), (10, 80), (16, 128), (17, 24)])
@pytest.mark.parametrize("seen, begin, slots", RINGS)
def test_attention_over_a_ring_in_splits(parts, heads, dim, seen, begin, slots, new):
    """In parts, of a ring that is not full, goes around its end, or is full; against float64."""
    from mlx_rgemma.cpu.kernels.attention import combine_splits, flash_decode_split

    rng = np.random.default_rng(seen + begin)
    ring = rng.normal(size=(2, slots, dim)).astype(np.float32)
    older = (begin - 1 - np.arange(slots)) % slots
    ring[:, older[seen:]] = np.nan  # of no use to anybody
    q, own = (rng.normal(size=(*n, dim)).astype(np.float32) for n in ((heads,), (new, 2)))
    found = [np.empty((parts, heads, *n), np.float32) for n in ((), (), (dim,))]
    out, scale = np.empty_like(q), np.float32(dim**-0.5)
    for part in range(parts):
        places = (x[part] for x in found)
        flash_decode_split(part, parts, q, ring[0], ring[1], begin, seen, scale, *places)
    for n in range(heads):
        combine_splits(q[n], own, scale, tuple(x[:, n] for x in found), out[n])
    visible = np.concatenate([ring[:, older[:seen]], own.swapaxes(0, 1)], axis=1)
    keys, values = visible.astype(np.float64)
    scores = q @ keys.T * dim**-0.5
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = powers / powers.sum(axis=1, keepdims=True) @ values
    assert np.abs(out - expected).max() < 2e-6


def test_attention_on_a_processor_without_wide_registers():
    """Its tiles have other shapes."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    command += ["-k", "test_attention and all or test_attention_over_a_ring_in_splits or googles"]
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    environment.pop("NUMBA_CPU_FEATURES", None)
    code = "from mlx_rgemma.cpu import kernels; print(kernels.QUERIES)"
    tiles = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert tiles.stdout.strip() == b"48"
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_what_is_kept_on_disk_is_named_by_all_that_it_may_be_made_of(tmp_path, monkeypatch):
    """Numba itself looks at the file alone that a loop stands in."""
    code = (
        "import numpy as np; from mlx_rgemma.cpu import kernels; x = np.ones(9, np.float32)\n"
        "kernels.gated_gelu(0, 9, x, x, x); print(kernels.compiler._DIGEST)\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept = [path.name for path in (tmp_path / "kept").rglob("*.nbi")]
    assert any("gated_gelu" in name for name in kept) and any("exp2" in name for name in kept)
    assert all(f"_{done.stdout.strip()}-" in name for name in kept)

    from mlx_rgemma.cpu.kernels import compiler

    folder = tmp_path / "compiled"
    shutil.copytree(Path(compiler.__file__).parent, folder)
    monkeypatch.setattr(compiler, "__file__", str(folder / "compiler.py"))
    before = compiler._digest()
    assert before == compiler._DIGEST
    with (folder / "functions.py").open("a") as file:
        file.write("# changed")
    assert compiler._digest() != before
