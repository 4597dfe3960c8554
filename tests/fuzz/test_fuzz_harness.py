"""The harness sees what it is there to see."""

from __future__ import annotations

from itertools import chain
from random import Random

import pytest

from fuzz import commands
from fuzz.commands import CommandTarget
from fuzz.families import FAMILIES
from fuzz.harness import GROUPS, Harness, all_cases, shares
from fuzz.job import Box, Failure, Job, Result
from fuzz.serving import Request, _judge_answer

KINDS = {
    "crash": ("crash", "SIGSEGV"),
    "loop": ("hang", "of CPU time"),
    "memory": ("memory", "and growing"),
    "short peak": ("memory", "GB"),
    "traceback": ("traceback", "RecursionError: too deep"),
    "half": ("left", "changed or left by a refusal: out"),
    "source": ("left", "changed or left by a refusal: in/source"),
    "temporary": ("left", "tmp/left"),
    "escape": ("escaped", "escaped"),
    "nothing made": ("left", "no out after status 0"),
    "long": ("message", "a line of 1007 characters"),
    "control": ("message", "control characters"),
    "two lines": ("message", "not one line of error"),
    "silent": ("message", "status 1"),
    "status": ("message", "status 7"),
    "exit": ("message", "status 'usage'"),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = CommandTarget(tmp_path_factory.mktemp("none"))
    yield made
    made.close()


def run(target: CommandTarget, tmp_path, what: str):
    (tmp_path / "case").mkdir()
    box = Box(tmp_path / "case" / "box", tmp_path)
    (box.inputs / "source").write_text("sound")
    place = {"half": box.out, "source": box.inputs / "source"}.get(what, "")
    made = ("out",) if what in ("nothing made", "half") else ()
    return target.run(Job("misbehaving", [what, str(place)], "", made, package="fuzz"), box)


@pytest.mark.parametrize("what", KINDS)
def test_what_is_wrong_is_seen(target, tmp_path, what, monkeypatch):
    monkeypatch.setattr(commands, "CPU_S", 2.0)
    result = run(target, tmp_path, what)
    assert result.failure is not None
    kind, detail = KINDS[what]
    assert result.failure.kind == kind and detail in result.failure.detail


@pytest.mark.parametrize("what", ["refused", "accepted"])
def test_what_is_right_is_left_alone(target, tmp_path, what):
    result = run(target, tmp_path, what)
    assert result.failure is None and result.verdict == what


def test_answers_of_a_server_are_judged():
    def judge(status: int, body: str, protocol: bool = False):
        return _judge_answer(f"HTTP/1.1 {status} X\r\n\r\n{body}".encode(), protocol)

    assert judge(200, "{}") is None
    assert judge(400, '{"error": {"message": "no"}}') is None
    for status, body in (
        (500, '{"error": {"message": "no"}}'),
        (400, '{"error": "no"}'),
        (400, "no"),
        (400, '{"error": {"message": "%s"}}' % ("x" * 501)),
        (400, '{"error": {"message": "\\u001b[2J"}}'),
    ):
        assert judge(status, body) is not None
    assert judge(501, "", protocol=True) is None and judge(500, "", protocol=True) is not None


def test_cases_can_be_replayed(harness, tmp_path):
    """The same seed makes the same files and arguments; another one does not."""

    def made(number: int, seed: int) -> tuple[object, ...]:
        box = Box(tmp_path / f"{number}", harness.sources)
        job = FAMILIES["safetensors"].make(box, Random(f"{seed} safetensors 5"))
        names = {k: v for k, v in box.contents().items() if k.startswith("in/")}
        return job.note, names

    assert made(1, 7) == made(2, 7) != made(3, 8)


def test_a_hang_is_believed_the_second_time(harness, monkeypatch):
    """A virtual machine that was paused charges the time to whoever ran."""
    family = FAMILIES["torch"]
    real, hang = harness._targets["command"].run, Failure("hang", "11 s of CPU time")
    for pauses, expected in ((1, "accepted"), (2, "failed")):
        results = iter([Result("failed", "", hang)] * pauses)
        monkeypatch.setattr(
            harness._targets["command"],
            "run",
            lambda *a, results=results, **k: next(results, None) or real(*a, **k),
        )
        (report,) = harness.run(family, ["sound"])
        assert report.result.verdict == expected


def test_failing_cases_are_kept(harness, tmp_path):
    family = FAMILIES["torch"]
    kept = Harness(harness.sources, 0, tmp_path / "kept")
    try:
        broken = {**family.sounds, "sound": family.payloads["system"]}
        changed = type(family)(family.name, "command", broken, family.make)
        (report,) = kept.run(changed, ["sound"])
    finally:
        kept.close()
    assert report.result.failure is not None and report.result.failure.kind == "sound"
    assert (tmp_path / "kept" / "torch-sound" / "x.pt").is_file()
    assert (tmp_path / "kept" / "torch-sound" / "command.json").is_file()


def test_every_family_is_run():
    assert sorted(chain(*GROUPS.values())) == sorted(FAMILIES)
    assert sum(shares(400).values()) == 400
    for family in FAMILIES.values():
        assert family.sounds and len(all_cases(family, 3)) >= 4


def test_requests_have_every_field():
    from fuzz.families.requests import FIELDS
    from mlx_rgemma.server import validation as request_checks

    known = {*request_checks.NUMBERS, *request_checks.COUNTS, *request_checks.ONLY}
    assert known <= set(FIELDS)
    assert Request(b"").leave_after_s == 0
