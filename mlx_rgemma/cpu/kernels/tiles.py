"""GEMM microkernels whose result stays in registers, for Numba kernels.

A Python loop would write each sum to memory after each multiply-add: the compiler cannot know that
arrays do not overlap. So the inner loop is written as LLVM IR, for a tile of rows and columns that
fills the registers (Goto and van de Geijn, "Anatomy of High-Performance
Matrix Multiplication", 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic


def _has_avx512() -> bool:
    """Of the processor that Numba compiles for: this one, unless its settings say otherwise."""
    given: str | None = getattr(config, "CPU_FEATURES", None)
    if given is not None:
        return "+avx512f" in given
    return bool(get_host_cpu_features().get("avx512f"))


WIDE = _has_avx512()
"""Whether there are 32 registers of 16 numbers; else 16 of 8, or 32 of 4, are reckoned with."""
LANES = 16 if WIDE else 8
"""Numbers of a vector."""
ROWS, COLUMNS = 8 if WIDE else 6, 2 * LANES
"""Of a tile."""
NARROW_ROWS = 8
"""Of a tile of `LANES` columns."""

_INDEX, _FLOAT = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_CONTRACT = ("contract",)


class _Matrix:
    """A float32 array whose columns are neighbours in memory, as the code to be made sees it."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any) -> None:
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.data = builder, array.data
        self.shape = cgutils.unpack_tuple(builder, array.shape)
        bytes_ = cgutils.unpack_tuple(builder, array.strides)[0]
        self.stride = builder.sdiv(bytes_, _INDEX(4))

    def row(self, number: Any) -> Any:
        return self.builder.gep(self.data, [self.builder.mul(number, self.stride)])

    def vector(self, row: Any, number: int) -> Any:
        """Return the address of a vector of a row."""
        place = self.builder.gep(row, [_INDEX(number * LANES)])
        return self.builder.bitcast(place, _VECTOR.as_pointer())


def _tile_product(rows: int, columns: int, *, add_of_columns: bool = False) -> Any:
    """Make ``c = a @ b``, or ``c += a.T @ b``, of one tile of `c`."""
    vectors = columns // LANES
    tile = list(product(range(rows), range(vectors)))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, c = (
            _Matrix(context, builder, kind, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        rows_of_c = [c.row(_INDEX(r)) for r in range(rows)]
        places = [c.vector(rows_of_c[r], v) for r, v in tile]
        zeros = [ir.Constant(_VECTOR, [0.0] * LANES)] * len(places)
        rows_of_a = [] if add_of_columns else [a.row(_INDEX(r)) for r in range(rows)]

        def step(k: Any, acc: list[Any]) -> list[Any]:
            row = b.row(k)
            loaded = [builder.load(b.vector(row, v), align=4) for v in range(vectors)]
            if add_of_columns:
                column = a.row(k)
                numbers = [builder.gep(column, [_INDEX(r)]) for r in range(rows)]
            else:
                numbers = [builder.gep(start, [k]) for start in rows_of_a]
            spread = [_spread(builder, builder.load(number)) for number in numbers]
            products = [builder.fmul(spread[r], loaded[v], flags=_CONTRACT) for r, v in tile]
            return [builder.fadd(*z, flags=_CONTRACT) for z in zip(products, acc, strict=True)]

        found = _repeat(builder, a.shape[0 if add_of_columns else 1], zeros, step)
        for place, value in zip(places, found, strict=True):
            if add_of_columns:  # as one: rounding then grows with the number of blocks alone
                value = builder.fadd(builder.load(place, align=4), value)
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    @intrinsic
    def compute(_, a, b, c):
        return types.void(a, b, c), generate

    return compute


def _spread(builder: Any, number: Any) -> Any:
    """A vector that has this number everywhere."""
    nothing, place = ir.Constant(_VECTOR, ir.Undefined), ir.IntType(32)
    first = builder.insert_element(nothing, number, place(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(place, LANES), None))


def _repeat(
    builder: Any, times: Any, values: list[Any], step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Return the values after at least one step, each from its index and the values before."""
    before = builder.block
    body, behind = (builder.append_basic_block(name) for name in ("products", "behind"))
    builder.branch(body)
    builder.position_at_end(body)
    number = builder.phi(_INDEX)
    held = [builder.phi(value.type) for value in values]
    found = step(number, held)
    following = builder.add(number, _INDEX(1))
    for place, first, later in zip(
        [number, *held], [_INDEX(0), *values], [following, *found], strict=True
    ):
        place.add_incoming(first, before)
        place.add_incoming(later, body)
    builder.cbranch(builder.icmp_signed("<", following, times), body, behind)
    builder.position_at_end(behind)
    return found


tile_product = _tile_product(ROWS, COLUMNS)
"""``c = a @ b``: a (ROWS, n), b (n, COLUMNS or more), c (ROWS, COLUMNS or more); n above 0."""
add_tile_product = _tile_product(ROWS, COLUMNS, add_of_columns=True)
"""``c += a.T @ b``: a (n, ROWS or more)."""

narrow_tile_product = _tile_product(NARROW_ROWS, LANES)
add_narrow_tile_product = _tile_product(NARROW_ROWS, LANES, add_of_columns=True)
"""The same with `NARROW_ROWS` and `LANES`."""


@intrinsic
def prefetch(_, array):
    """Prefetch the cache line at an array's beginning."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _Matrix(context, builder, signature.args[0], arguments[0]).data
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(prefetch, [builder.bitcast(data, byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array), generate
