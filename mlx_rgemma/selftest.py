"""The command `mlx_rgemma.selftest`: every Metal kernel compared with its reference."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_rgemma import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import mlx.core as mx

    from mlx_rgemma.ops.metal import MetalKernel

TIMINGS = ("none", "example", "model")


class Row(NamedTuple):
    """The comparison of one variant of a kernel; times in milliseconds, None if not taken."""

    name: str
    file: str
    variant: str
    shapes: str
    error: float | None
    allowed: float | None
    kernel_ms: float | None
    reference_ms: float | None
    state: str
    reason: str


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = cli.make_parser(
        "mlx_rgemma.selftest",
        "Compare every Metal kernel with its reference in plain MLX, and time both.",
        ["--timing none", "--kernel rg_lru ring_attention --repeat 100", "--json > selftest.json"],
        epilog="Exits with 1 if a kernel fails or disagrees. Where there is no Metal nothing can"
        " be compared, and the command says so.",
    )
    add = parser.add_argument
    add("--kernel", nargs="+", default=[], help="Only these; default: all.")
    add(
        "--timing",
        choices=TIMINGS,
        help="On the small example that is compared, or on 2048 tokens of the 2B model's size."
        " Default: model on Metal, none on an emulator, whose times mean nothing.",
    )
    add("--repeat", type=cli.int_at_least(1), default=20, help="Runs timed. Default: 20.")
    add("--json", action="store_true", help="Print one JSON object, and nothing else.")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = build_parser().parse_args(argv)
    return cli.run(lambda: _selftest(args))


def _selftest(args: argparse.Namespace) -> int:
    from importlib.metadata import version

    import mlx.core as mx

    from mlx_rgemma import __version__, ops  # noqa: F401  (importing them registers the kernels)
    from mlx_rgemma.errors import UserError
    from mlx_rgemma.ops import metal

    chosen = metal.registered()
    unknown = set(args.kernel) - {kernel.name for kernel in chosen}
    if unknown:
        names = ", ".join(kernel.name for kernel in chosen)
        raise UserError(f"--kernel: found '{min(unknown)}', expected one of {names}.")
    if args.kernel:
        chosen = tuple(kernel for kernel in chosen if kernel.name in args.kernel)

    device = mx.device_info().get("device_name", "unknown device")
    mlx_version = version("mlx")
    head = {"mlx_rgemma": __version__, "mlx": mlx_version, "device": device}
    unavailable = metal.unavailable_reason()
    timing = args.timing or ("model" if mx.default_device().type == mx.gpu else "none")
    rows: list[Row] = []
    if unavailable is None:
        for kernel in chosen:
            for variant in kernel.variants:
                rows.append(_examine(kernel, variant, timing, args.repeat))
    failed = any(row.state != "passed" for row in rows)
    if args.json:
        found = [row._asdict() for row in rows]
        untried = [kernel.name for kernel in chosen]
        print(json.dumps({**head, "not_run": unavailable, "kernels": found or untried}, indent=1))
    else:
        print(f"mlx_rgemma {__version__}, MLX {mlx_version}, {device}")
        _print_rows(rows)
        if unavailable is not None:
            print(f"kernels not run: {unavailable}; the reference runs instead.")
            print(f"kernels: {', '.join(kernel.name for kernel in chosen)}")
        elif failed:
            print("The reference runs in place of kernels that are off, at a cost in speed.")
    return int(failed)


def _examine(kernel: MetalKernel, variant: tuple[Any, ...], timing: str, repeat: int) -> Row:
    from mlx_rgemma.ops import backend, metal

    error = allowed = kernel_ms = reference_ms = None
    try:
        shapes = _shapes(kernel.sample_inputs(*variant))
        found = kernel.compare(*variant)
        worst = max(range(len(found.errors)), key=lambda i: found.errors[i] / found.allowed[i])
        error, allowed, reason = found.errors[worst], found.allowed[worst], found.error
        if timing != "none" and not reason:
            small = timing == "example" or kernel.benchmark_inputs is None
            make: Any = kernel.sample_inputs if small else kernel.benchmark_inputs
            arguments = make(*variant)
            shapes = _shapes(arguments)
            kernel_ms = _milliseconds(kernel.launch, arguments, repeat)
            with backend.use(backend.Backend.MLX):
                reference_ms = _milliseconds(kernel.reference, arguments, repeat)
    except Exception as exception:  # a compiler or a driver may raise anything
        shapes, reason = "", f"{type(exception).__name__}: {exception}"
    return Row(
        name=kernel.name,
        file=kernel.file,
        variant=metal.format_variant(variant),
        shapes=shapes,
        error=error,
        allowed=allowed,
        kernel_ms=kernel_ms,
        reference_ms=reference_ms,
        state="off" if reason else "passed",
        reason=reason,
    )


def _milliseconds(
    function: Callable[..., Sequence[mx.array]], arguments: Sequence[Any], repeat: int
) -> float:
    """Return the median time of a call, arguments and results evaluated."""
    import mlx.core as mx

    mx.eval(arguments)
    mx.eval(function(*arguments))
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        mx.eval(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _shapes(arguments: Sequence[Any]) -> str:
    """Return the first argument's shape, which determines the size of the problem."""
    return "x".join(str(n) for n in arguments[0].shape)


def _print_rows(rows: Sequence[Row]) -> None:
    if not rows:
        return
    titles = (
        "kernel",
        "variant",
        "shape",
        "error",
        "allowed",
        "kernel ms",
        "reference ms",
        "state",
    )
    table: list[tuple[str, ...]] = [titles]
    for row in rows:
        errors = [_number(row.error, ".1e"), _number(row.allowed, ".1e")]
        times = [_number(row.kernel_ms, ".3f"), _number(row.reference_ms, ".3f")]
        table.append((row.name, row.variant, row.shapes, *errors, *times, row.state))
    widths = [max(len(line[i]) for line in table) for i in range(len(titles))]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    for row in rows:
        if row.reason:
            print(f"{row.file} ({row.variant}) is off: {row.reason}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
