"""The emulator kills every mutant of the sample kernel, and `mutation` judges kills correctly."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest
import sample_kernel
from metal_emulator import KernelError, Launch, emulate, mutation
from metal_emulator.mutation import Edit, Mutant
from requirements import needs_compiler

HERE = Path(__file__).parent
MUTANTS = mutation.load(HERE / "mutants")


def run(read: mutation.Read, mode: str) -> list[Launch]:
    """Run the sample kernel from the sources that `read` returns, and assert its values."""
    launches: list[Launch] = []
    given = sample_kernel.case(2, 37, 64, mx.float32)
    body, header = read("decayed_sum.metal"), read("decay.metal")
    with emulate(mode, record=launches, time_limit_s=1):
        y, last = sample_kernel.call(sample_kernel.make(body, header), given)
    for actual, expected in zip((y, last), sample_kernel.reference(given), strict=True):
        assert sample_kernel.relative_error(actual, expected) < 1e-6
    return launches


def test_every_mutant_is_listed_once():
    names = [mutant.name for mutants in MUTANTS.values() for mutant in mutants]
    assert len(set(names)) == len(names) == 34


@needs_compiler
@pytest.mark.parametrize("mutant", MUTANTS["decayed_sum"], ids=str)
def test_the_checked_mode_kills(mutant):
    read = mutant.apply(sample_kernel.read)
    mutation.require_killed(mutant, lambda mode: run(read, mode))


ALL_CHECKS = {
    "values": mutation.values("no sum", "a * running_sum +", "", file="decayed_sum.metal"),
    "checked": mutation.checked("all write", "if (s == 0)", "if (true)", file="decayed_sum.metal"),
    "static": mutation.static(
        "double", "float running_sum = 0", "double running_sum = 0", file="decayed_sum.metal"
    ),
}


@needs_compiler
@pytest.mark.parametrize("check", mutation.CHECKS)
def test_a_mutant_is_killed_by_the_first_check_that_detects_it(check):
    mutant = ALL_CHECKS[check]
    read = mutant.apply(sample_kernel.read)
    kill = mutation.killed_by(mutant, lambda mode: run(read, mode))
    assert kill is not None
    assert kill.check == check
    assert bool(kill.findings) == (check != "values")
    mutation.require_killed(mutant, lambda mode: run(read, mode))


@needs_compiler
@pytest.mark.parametrize("check", mutation.CHECKS)
def test_the_kernel_itself_survives(check):
    harmless = Mutant("none", check, (Edit("a", "b"),))
    assert mutation.killed_by(harmless, lambda mode: run(sample_kernel.read, mode)) is None
    with pytest.raises(AssertionError, match=f"mutant 'none' survives, expected a kill by {check}"):
        mutation.require_killed(harmless, lambda mode: run(sample_kernel.read, mode))


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"check": "values"}, "is killed by checked, expected values"),
        ({"message": "divergent"}, "expected 'divergent' at ''"),
        ({"message": "data race", "line": "carry ="}, "expected 'data race' at 'carry ='"),
        ({"message": "data race"}, "expected 'data race' at ''"),  # it names a line
    ],
)
def test_a_mutant_must_be_killed_as_it_says(changes, error):
    defect = {"name": "all write", "check": "checked", "message": "data race", "line": "last[b"}
    edits = (Edit("if (s == 0)", "if (true)", file="decayed_sum.metal"),)
    given = {**defect, "line": "", **changes} if "message" in changes else {**defect, **changes}
    mutant = Mutant(edits=edits, **given)
    read = mutant.apply(sample_kernel.read)
    with pytest.raises(AssertionError, match=error):
        mutation.require_killed(mutant, lambda mode: run(read, mode))


@needs_compiler
def test_a_mutant_that_does_not_compile_proves_nothing():
    mutant = mutation.checked("typo", "float carry =", "flaot carry =", file="decayed_sum.metal")
    read = mutant.apply(sample_kernel.read)
    with pytest.raises(KernelError, match="does not compile"):
        mutation.killed_by(mutant, lambda mode: run(read, mode))


@pytest.mark.parametrize(
    ("occurrence", "expected"),
    [(0, "xbaba"), (1, "abxba"), (2, "ababx"), (-1, "ababx"), (-3, "xbaba"), (None, "xbxbx")],
)
def test_edits(occurrence, expected):
    assert Edit("a", "x", occurrence).apply("ababa") == expected


@pytest.mark.parametrize(("old", "occurrence"), [("a", 3), ("a", -4), ("c", 0), ("c", None)])
def test_an_edit_that_does_not_apply_is_an_error(old, occurrence):
    mutant = Mutant("stale", "values", (Edit(old, "x", occurrence, "k.metal"),))
    with pytest.raises(ValueError, match=f"'stale' does not apply: '{old}' occurs . times in k"):
        mutant.apply(lambda file: "ababa")


def test_an_edit_that_changes_nothing_is_an_error():
    mutant = Mutant("same", "values", (Edit("a", "a", file="k.metal"),))
    with pytest.raises(ValueError, match=r"'same' changes nothing in k\.metal"):
        mutant.apply(lambda file: "ababa")


def test_edits_of_one_file_follow_each_other():
    edits = (Edit("a", "b", file="k"), Edit("b", "c", None, file="k"), Edit("h", "i", file="l"))
    read = Mutant("three", "values", edits).apply({"k": "ab", "l": "h", "m": "z"}.__getitem__)
    assert (read("k"), read("l"), read("m")) == ("cc", "i", "z")


def test_an_unknown_check_is_an_error():
    with pytest.raises(ValueError, match="check: found 'luck', expected one of values, checked"):
        Mutant("lucky", "luck", ())


def test_mutants_are_loaded_by_kernel(tmp_path):
    listed = 'values("one", "a", "b"), values("two", "c", "d", None, file="common.metal", case="x")'
    code = f"from metal_emulator.mutation import values\nMUTANTS = [{listed}]\n"
    (tmp_path / "scale.py").write_text(code)
    (tmp_path / "shift.py").write_text("MUTANTS = []")
    before = set(sys.modules)
    loaded = mutation.load(tmp_path)
    assert loaded["shift"] == ()
    one, two = loaded["scale"]
    assert one.edits == (Edit("a", "b", 0, "scale.metal"),)
    assert two.edits == (Edit("c", "d", None, "common.metal"),)
    assert (two.case, two.check, str(two)) == ("x", "values", "two")
    assert set(sys.modules) == before
