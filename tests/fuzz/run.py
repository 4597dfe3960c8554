"""Fuzz from the command line: `python tests/fuzz/run.py --cases 5000 --seed 7`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from fuzz.families import FAMILIES
from fuzz.harness import Harness, all_cases, shares
from fuzz.sources import sources


def main(argv: list[str] | None = None) -> int:
    """Run cases and print the failing ones; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--cases", type=int, default=400, help="Damaged cases, shared by all families. [400]")
    add("--seed", type=int, default=0, help="Seed of the damages. [0]")
    add("--family", action="append", choices=FAMILIES, help="Only this family; repeatable.")
    add("--only", action="append", metavar="FAMILY:CASE", help="Replay a case; repeatable.")
    add("--save", type=Path, metavar="FOLDER", help="Keep the files of failing cases here.")
    add("-v", "--verbose", action="store_true", help="Print every case.")
    args = parser.parse_args(argv)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-sources-") as folder:
        harness = Harness(sources(Path(folder)), args.seed, args.save)
        try:
            for name, cases in _plan(args).items():
                failed += _run(harness, name, cases, args.verbose or bool(args.only))
        finally:
            harness.close()
    print(f"\n{len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


def _plan(args: argparse.Namespace) -> dict[str, list[int | str]]:
    plan: dict[str, list[int | str]] = {}
    if args.only:
        for chosen in args.only:
            name, _, case = chosen.partition(":")
            plan.setdefault(name, []).append(int(case) if case.isdigit() else case)
        return plan
    names = args.family or list(FAMILIES)
    counts = (
        dict.fromkeys(names, -(-args.cases // len(names))) if args.family else shares(args.cases)
    )
    return {name: all_cases(FAMILIES[name], counts[name]) for name in names}


def _run(harness: Harness, name: str, cases: list[int | str], verbose: bool) -> list[str]:
    family, started = FAMILIES[name], time.monotonic()
    if family.needs and importlib.util.find_spec(family.needs) is None:
        print(f"{name}: left out, needs {family.needs}")
        return []
    verdicts: Counter[str] = Counter()
    failed = []
    for report in harness.run(family, cases):
        verdicts[report.result.verdict] += 1
        if report.result.failure is not None:
            failed.append(f"{name}:{report.case}  {report.result.failure.kind}")
            print(f"FAILED {report}", flush=True)
        elif verbose:
            print(f"{report.result.verdict} {report}", flush=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    print(f"{name}: {counts} ({time.monotonic() - started:.1f} s)", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
