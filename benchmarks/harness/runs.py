"""Run a plan: the trials of all engines alternate, one process computes at a time."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.engines import (
    BASELINES,
    MLX_LM,
    OURS,
    TRANSFORMERS,
    Unsupported,
    check_installed,
)
from benchmarks.harness.hf_export import in_mlx_layout
from benchmarks.harness.plan import Case, Plan
from benchmarks.harness.processes import Worker, WorkerError, environment
from benchmarks.harness.results import Result
from mlx_rgemma.checkpoints.formats.huggingface import CheckpointFolder
from mlx_rgemma.checkpoints.schema import expected_tensors
from mlx_rgemma.evaluation.random_model import SHAPES, UNQUANTIZED, recipe
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.io.hub import locate
from mlx_rgemma.io.memory import physical_memory

Listener = Callable[["Report", Result], None]
"""Called after every trial; the last trial of the result is new."""

TRAINING_COPIES = 4
"""Copies of the weights: weights, gradients, and two moments."""

BUSY = 0.5
"""Load average per core above which speeds are not reliable."""

SEED = 0


@dataclass
class Report:
    """Results of a benchmark.

    Attributes:
        plan: The cases.
        name: Name of the model.
        config: Shape of the model.
        facts: Facts about the machine and this package.
        baselines: Facts about each baseline.
        results: The figures.
        notes: Cases that were not measured, and why.
    """

    plan: Plan
    name: str
    config: GriffinConfig
    facts: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Return the number of the model's parameters."""
        return sum(wanted.size for wanted in expected_tensors(self.config))

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)


def prepare(plan: Plan) -> Report:
    """Check a plan before anything slow is done.

    Raises:
        UserError: If a baseline is not installed, a label or the model is unknown.
    """
    for name in plan.baselines:
        check_installed(name)
    for label in plan.quantizations:
        recipe(label)
    if plan.shape is not None:
        return Report(plan, f"{plan.shape}, random weights", SHAPES[plan.shape])
    source = locate(plan.model)
    return Report(plan, source.name, CheckpointFolder.open(source.folder).config)


def run(report: Report, begun: Callable[[Report], None], listener: Listener) -> None:
    """Measure all cases of a report's plan.

    Args:
        report: From `prepare`; filled in.
        begun: Called once the machine and the packages are known.
        listener: Called after every trial.

    Raises:
        UserError: If this package fails. A failure of a baseline becomes a note.
    """
    plan = report.plan
    with ExitStack() as stack:
        probe = stack.enter_context(Worker(OURS))
        report.facts = probe.request("describe")
        for name in plan.baselines:
            with Worker(name, environment(name)) as worker:
                report.baselines[name] = worker.request("describe")
        load = os.getloadavg()[0]
        if load > BUSY * report.facts["cores"]:
            report.note(
                f"the machine was busy at the start (load {load:.1f}): do not trust speeds."
            )
        begun(report)
        layers = {
            "layers": report.config.num_hidden_layers,
            "block_types": report.config.block_types,
        }
        launches = {
            name: probe.request("launches", **layers, theirs=name == MLX_LM)
            for name in plan.engines
            if name in (OURS, MLX_LM)
        }
        for dtype in plan.dtypes:
            with tempfile.TemporaryDirectory(prefix="mlx_rgemma_") as place:
                model, dtype = _model(report, dtype, Path(place), probe)
                for label in plan.quantizations:
                    _Comparison(report, model, dtype, label, probe, launches, listener).run()


def _model(
    report: Report, dtype: str | None, place: Path, probe: Worker
) -> tuple[dict[str, Any], str | None]:
    """Return the model for the engines: a folder if baselines read it too, else a shape."""
    plan, device = report.plan, {"device": report.facts["device"]}
    if plan.shape is None:
        folder = locate(plan.model).folder
        quantized = report.config.quantization is not None
        if TRANSFORMERS in plan.baselines and not quantized and in_mlx_layout(folder):
            probe.request("copy", folder=str(place), source=str(folder))
            folder = place
        return {"folder": str(folder), **device}, dtype
    dtype = dtype or ("float32" if report.facts["device"] == "cpu" else "bfloat16")
    if not plan.baselines:
        return {"shape": plan.shape, **device}, dtype
    probe.request("write", folder=str(place), shape=plan.shape, dtype=dtype)
    return {"folder": str(place), **device}, dtype


@dataclass
class _Held:
    """A process with a loaded model."""

    worker: Worker
    loaded: dict[str, Any]


class _Comparison:
    """The engines with one model in one dtype and quantization."""

    def __init__(
        self,
        report: Report,
        model: dict[str, Any],
        dtype: str | None,
        label: str,
        probe: Worker,
        launches: dict[str, int],
        listener: Listener,
    ) -> None:
        self.report, self.plan = report, report.plan
        self.model, self.dtype, self.label = model, dtype, label
        self.probe, self.launches, self.listener = probe, launches, listener

    def run(self) -> None:
        """Measure every case; the trials of engines alternate if memory holds all of them."""
        engines = self.plan.engines
        together = self._bytes() * len(engines) <= physical_memory() / 2
        if not together:
            self.report.note("the engines were measured one after the other: memory holds one.")
        for group in [engines] if together else [(name,) for name in engines]:
            with ExitStack() as stack:
                held = [h for h in (self._load(name, stack) for name in group) if h is not None]
                for cases, trials in self.plan.rounds():
                    self._take_turns(held, cases, trials)

    def _bytes(self) -> int:
        """Return the approximate bytes of an engine."""
        per_weight = 4 if (self.dtype or "float32") == "float32" else 2
        copies = TRAINING_COPIES if self.plan.train_tokens else 1
        return self.report.parameters * per_weight * copies

    def _load(self, name: str, stack: ExitStack) -> _Held | None:
        worker = stack.enter_context(Worker(name, environment(name)))
        request = {"model": self.model, "dtype": self.dtype, "quantization": self.label}
        loaded = self._asked(worker, "load", request, "loading")
        if loaded is not None and name == OURS:
            self.dtype = loaded["dtype"]  # the baselines load the same
        return None if loaded is None else _Held(worker, loaded)

    def _take_turns(self, held: Sequence[_Held], cases: Sequence[Case], trials: int) -> None:
        entries = [(h, case, self._result(h, case)) for case in cases for h in held]
        for _ in range(self.plan.warmup):
            entries = [e for e in entries if self._measure(*e, keep=False)]
        for _ in range(trials if entries else 0):
            bandwidth = self.probe.request("bandwidth")
            for entry in list(entries):
                time.sleep(self.plan.delay)
                if not self._measure(*entry, keep=True):
                    entries.remove(entry)
                    continue
                entry[2].bandwidth.append(bandwidth)
                self.listener(self.report, entry[2])
        self.report.results += [result for _, _, result in entries]

    def _result(self, held: _Held, case: Case) -> Result:
        name, loaded = held.worker.name, held.loaded
        launches = None if case.kind == "train" or case.batch_size > 1 else self.launches.get(name)
        return Result(
            name,
            loaded["dtype"],
            loaded["quantization"],
            case,
            loaded["weight_bytes"],
            loaded["read_bytes"],
            launches=launches,
        )

    def _measure(self, held: _Held, case: Case, result: Result, *, keep: bool) -> bool:
        """Run one trial; return whether the engine can."""
        do, request = self._request(case, held.loaded["vocab_size"])
        answer = self._asked(held.worker, do, request, case.title)
        if answer is not None and keep:
            result.trials.append(answer)
        return answer is not None

    def _request(self, case: Case, vocab_size: int) -> tuple[str, dict[str, Any]]:
        plan, dice = self.plan, random.Random(SEED)
        common = {"tokens": plan.generation_tokens, "step_size": plan.step_size}
        if case.kind == "after":
            return "generate_after", {"context": case.length, **common}
        length = case.length + (case.kind == "train")
        rows = [[dice.randrange(vocab_size) for _ in range(length)] for _ in range(case.batch_size)]
        if case.kind == "train":
            return "train", {"sequences": rows, "kind": plan.training}
        return "generate", {"prompts": rows, **common}

    def _asked(self, worker: Worker, do: str, request: dict[str, Any], what: str) -> Any:
        """Return the answer, or None and add a note. A failure of this package is raised."""
        what += f", quantization {self.label}" if self.label != UNQUANTIZED else ""
        try:
            return worker.request(do, **request)
        except Unsupported as reason:
            self.report.note(f"{worker.name}, {what}: left out; it {reason}.")
        except WorkerError as error:
            if worker.name not in BASELINES:
                raise
            self.report.note(f"{what}: left out; {error}")
        return None


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON values."""
    from benchmarks.harness.results import flatness, ratios

    plan = {key: value for key, value in asdict(report.plan).items() if key != "engines"}
    return {
        "machine": report.facts,
        "baselines": report.baselines,
        "model": {
            "name": report.name,
            "parameters": report.parameters,
            "config": report.config.to_dict(),
        },
        "plan": plan,
        "results": [result.as_dict() for result in report.results],
        "ratios": [_flat(asdict(ratio)) for ratio in ratios(report.results)],
        "flatness": [asdict(found) for found in flatness(report.results)],
        "notes": report.notes,
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {**values.pop("case"), **values}
