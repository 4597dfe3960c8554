"""What the trainers read: data, settings, and folders of runs that are taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.families.models import (
    ADAPTER_KEYS,
    damage_json,
    damage_safetensors,
    join_safetensors,
    split_safetensors,
)
from fuzz.job import Box, Family, Job
from fuzz.mutations import brief, dumps, mutate_bytes, mutate_json, mutate_text
from fuzz.payloads import files
from fuzz.sources import LORA, TRAIN


def _lora(
    box: Box, note: str, *options: str, data: Path | None = None, adapters: str = "out"
) -> Job:
    argv = [
        "--model",
        str(box.sources / "tiny"),
        "--train",
        "--adapter-path",
        str(box.root / adapters),
    ]
    argv += ["--data", str(data or box.sources / "data"), *LORA, *options]
    return Job("lora", argv, note, (adapters,), runs=True)


def _train(box: Box, note: str, *options: str, run: str = "out") -> Job:
    argv = ["--data", str(box.sources / "texts"), "--save-path", str(box.root / run), *TRAIN]
    return Job("train", [*argv, *options], note, (run,), runs=True)


ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Who is Ann?", "completion": "It is Ann."},
    {"text": "Ann saw Ben."},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]},
)
ROW_KEYS = ("messages", "prompt", "completion", "text", "tools", "role", "content")


def _jsonl(box: Box, rng: Random) -> Job:
    data = box.inputs / "data"
    data.mkdir()
    rows, notes = [dumps(row) for row in [rng.choice(ROWS)] * 4], []
    for number in rng.sample(range(4), rng.choice((1, 1, 2))):
        value, note = mutate_json(rng, json.loads(rows[number]), ROW_KEYS)
        rows[number] = dumps(value)
        notes.append(f"line {number + 1}: {note}")
    content = rng.choice(("\n", "\n", "\r\n", "\n\n")).join(rows).encode("utf-8", "surrogatepass")
    if rng.random() < 0.25:
        content, note = mutate_bytes(rng, content)
        notes.append(note)
    if rng.random() < 0.1:
        content = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n" * 1000)) + content
    for split in ("train", "valid") if rng.random() < 0.3 else ("train",):
        (data / f"{split}.jsonl").write_bytes(content)
    options = rng.choice(((), ("--mask-prompt",), ("--pack",), ("--carry-state",)))
    return _lora(box, "; ".join(notes), "--iters", "1", *options, data=data)


def _stored_jsonl(content: bytes) -> Callable[[Box, Random], Job]:
    def make(box: Box, rng: Random) -> Job:
        (box.inputs / "data").mkdir()
        (box.inputs / "data" / "train.jsonl").write_bytes(content)
        return _lora(box, brief(content), "--iters", "1", data=box.inputs / "data")

    return make


def _huge_line(box: Box, rng: Random) -> Job:
    """Return a data set with a line of 60 MB."""
    return _stored_jsonl(b'{"text": "' + b"Ann saw Ben. " * 5_000_000 + b'"}')(box, rng)


LORA_SETTINGS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "optimizer_config": {"adam": {"betas": [0.9, 0.999]}},
    "seed": 1,
    "learning_rate": 1e-4,
    "steps_per_report": 1,
    "save_every": 1,
    "grad_checkpoint": False,
    "grad_accumulation_steps": 1,
    "lr_schedule": {"name": "cosine_decay", "warmup": 2, "arguments": [1e-4, 10, 1e-6]},
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 2.0, "keys": ["mlp_block.up_proj"]},
    "mask_prompt": False,
    "pack": False,
    "test": False,
}
LORA_KEYS = (
    *(
        "num_layers",
        "batch_size",
        "val_batches",
        "max_seq_length",
        "report_to",
        "hf_dataset",
        "dtype",
    ),
    *("carry_state", "lora_gates", "window", "resume_adapter_file", "clear_cache_threshold"),
    *("project_name", "trust_remote_code", "config", "test_batches", "steps_per_eval", "train"),
)
TRAIN_SETTINGS: dict[str, Any] = {
    "whole_files": False,
    "valid_fraction": 0.1,
    "learning_rate": 0.003,
    "min_learning_rate": 0.0,
    "lr_decay": "cosine",
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "dropout": 0.0,
    "average_decay": 0.9,
    "dtype": "float32",
    "save_dtype": "bfloat16",
    "seed": 3,
    "steps_per_report": 1,
    "steps_per_save": 1,
    "sample_prompt": "A cat",
}
TRAIN_KEYS = (
    "shape",
    "init_from",
    "tokenizer",
    "valid_data",
    "plot",
    "config",
    "iters",
    "grad_accumulation_steps",
)
YAML_TOKENS = (
    "&x [*x]",
    "&x {a: *x}",
    "<<: *x",
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system",
    "!!binary ////",
    "!!timestamp 9999-99-99",
    "!!float x",
    "!!set {a, b}",
    "? [a]: b",
    "\t",
    "---\n",
    "%YAML 9.9\n",
    "1:1:1:1:1:1:1:1:1:1:1:1",
    "0x" + "f" * 5000,
    "1e999",
    ".nan",
    "{" * 500,
    "[" * 500,
    "2020-13-45",
    "|\n",
    '"\\UFFFFFFFF"',
    "\x85\u2028",
    "a: " * 300,
)


def _settings(box: Box, name: str, text: bytes, note: str) -> Job:
    """Return a run of `lora` or `train` with a settings file; small enough, whatever that says."""
    file = box.inputs / "settings.yaml"
    file.write_bytes(text)
    run = _lora if name == "lora" else _train
    job = run(box, note, "--iters", "1", "-c", str(file))
    if text.startswith(b"data:"):
        at = job.argv.index("--data")
        del job.argv[at : at + 2]
    job.interrupt = True
    return job


def _yaml(box: Box, rng: Random) -> Job:
    name = rng.choice(("lora", "train"))
    values = LORA_SETTINGS if name == "lora" else TRAIN_SETTINGS
    keys = LORA_KEYS if name == "lora" else TRAIN_KEYS
    value, note = mutate_json(rng, values, keys) if rng.random() < 0.7 else (values, "")
    text = dumps(value)
    if isinstance(value, dict) and rng.random() < 0.6:
        text = "\n".join(f"{key}: {dumps(inner)}" for key, inner in value.items())
    if not note or rng.random() < 0.2:
        text, more = mutate_text(rng, text, YAML_TOKENS)
        note = f"{note}; {more}"
    return _settings(box, name, text.encode("utf-8", "surrogatepass"), f"{name}: {note}")


def _stored_settings(name: str, content: bytes) -> Callable[[Box, Random], Job]:
    def make(box: Box, rng: Random) -> Job:
        job = _settings(box, name.split("-")[0], content, brief(content))
        job.interrupt = False
        return job

    return make


def _sound_settings(name: str) -> Callable[[Box, Random], Job]:
    values = LORA_SETTINGS if name == "lora" else TRAIN_SETTINGS
    text = "\n".join(f"{key}: {dumps(value)}" for key, value in values.items())
    return lambda box, rng: _settings(box, name, text.encode(), "")


PROGRESS_KEYS = ("iteration", "updates", "trained_tokens", "recent_loss", "recent_tokens")


def _resumed(box: Box, rng: Random) -> Job:
    if rng.random() < 0.5:
        folder = box.copy("adapters")
        state = folder / "training_state.safetensors"
        others = [folder / "adapter_config.json", folder / "adapters.safetensors"]
        job = _lora(box, "", "--iters", "3", "--resume", adapters="in/adapters")
    else:
        folder = box.copy("run")
        state = folder / "checkpoint.safetensors"
        others = [
            folder / "log.jsonl",
            folder / "tokenizer.model",
            folder / "model" / "config.json",
        ]
        job = _train(box, "", "--iters", "2", run="in/run")
    if rng.random() < 0.75:
        job.note = _damage_state(rng, state)
    else:
        path = rng.choice(others)
        if path.suffix == ".safetensors":
            job.note = damage_safetensors(rng, path)
        elif path.suffix == ".json":
            job.note = damage_json(rng, path, ADAPTER_KEYS)
        else:
            content, note = mutate_bytes(rng, path.read_bytes())
            path.write_bytes(content)
            job.note = f"{path.name}: {note}"
    job.interrupt = True
    return job


def _damage_state(rng: Random, path: Path) -> str:
    """Damage a training state, often the JSON that it keeps as text."""
    if rng.random() < 0.5:
        return damage_safetensors(rng, path)
    header, data = split_safetensors(path.read_bytes())
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    if rng.random() < 0.7 and metadata[key][:1] == "{":
        value, note = mutate_json(rng, json.loads(metadata[key]), PROGRESS_KEYS)
        metadata[key] = dumps(value)
    else:
        metadata[key], note = mutate_text(rng, metadata[key], ("{", "null", "9" * 30))
    path.write_bytes(join_safetensors(header, data))
    return f"{path.name}: metadata {key}: {note}"


def _sound_lora(box: Box, rng: Random) -> Job:
    box.copy("adapters")
    return _lora(box, "", "--iters", "3", "--resume", adapters="in/adapters")


def _sound_train(box: Box, rng: Random) -> Job:
    box.copy("run")
    return _train(box, "", "--iters", "2", run="in/run")


def _resume_before_the_first(box: Box, rng: Random) -> Job:
    """Return a run that was killed before its first checkpoint: it begins, or says so."""
    folder = box.copy("adapters")
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            path.unlink()
    return _lora(box, "no checkpoint yet", "--iters", "3", "--resume", adapters="in/adapters")


FAMILIES = (
    Family(
        "jsonl",
        "command",
        {"sound": lambda box, rng: _lora(box, "", "--iters", "1")},
        _jsonl,
        {
            "a line of 60 MB": _huge_line,
            **{name: _stored_jsonl(content) for name, content in files("jsonl").items()},
        },
    ),
    Family(
        "yaml",
        "command",
        {f"sound {name}": _sound_settings(name) for name in ("lora", "train")},
        _yaml,
        {name: _stored_settings(name, content) for name, content in files("yaml").items()},
    ),
    Family(
        "resumed",
        "command",
        {"sound lora": _sound_lora, "sound train": _sound_train},
        _resumed,
        {"no checkpoint yet": _resume_before_the_first},
    ),
)
