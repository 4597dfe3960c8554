"""Model folders: weights, index, configuration, adapters."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzz.job import Box, Family, Job
from fuzz.mutations import WHOLE, Pairs, brief, dumps, mutate_bytes, mutate_json, nasty
from fuzz.payloads import overlays

GOLDEN = Path(__file__).parents[2] / "golden"
PROMPT = f"Lily met {'a' * 50}b"
"""It makes expressions like `(a+)+$` try every way to split it."""
DTYPES = ("F64", "I8", "U32", "BOOL", "F8_E4M3", "C64", "", "x" * 20_000, "\x1b[2J", 3, None)


def convert(box: Box, source: Path, note: str, *options: str) -> Job:
    """Convert a source into the box's target."""
    argv = ["--hf-path", str(source), "--mlx-path", str(box.out), *options]
    return Job("convert", argv, note, ("out",))


def generate(box: Box, model: Path, note: str, *options: str) -> Job:
    """Generate two tokens with a model."""
    return Job("generate", ["--model", str(model), "-p", PROMPT, "-m", "2", *options], note)


def either(rng: Random, box: Box, model: Path, note: str) -> Job:
    """Convert or generate."""
    return convert(box, model, note) if rng.random() < 0.4 else generate(box, model, note)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, and what follows it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    raw = dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def damage_safetensors(rng: Random, path: Path) -> str:
    """Damage a safetensors file: its bytes, its header's values, sizes, offsets, names."""
    content = path.read_bytes()
    header, data = split_safetensors(content)
    action = rng.choice(("bytes", "header", "header", "entry", "entry", "entry", "size", "data"))
    if action == "bytes":
        content, note = mutate_bytes(rng, content, len(content) - len(data))
    elif action == "header":
        value, note = mutate_json(rng, header)
        content = join_safetensors(value, data)
    elif action == "entry":
        note = _damage_entry(rng, header)
        content = join_safetensors(header, data)
    elif action == "size":
        size = rng.choice((*WHOLE, len(content), len(content) - 8, len(content) - 9))
        content = (size % 2**64).to_bytes(8, "little") + content[8:]
        note = f"header of {size} bytes"
    else:
        data, note = mutate_bytes(rng, data)
        content = join_safetensors(header, data)
    path.write_bytes(content)
    return f"{path.name}: {action}: {note}"


def _damage_entry(rng: Random, header: dict[str, Any]) -> str:
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    action = rng.choice(("dtype", "shape", "offsets", "twice", "swap", "more", "name"))
    if action == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
        return f"{name}: dtype {brief(entry['dtype'])}"
    if action == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            (
                [],
                shape[::-1],
                [*shape, 1],
                [0, *shape],
                [2**31, 2**33],
                [-1],
                [-8, -4],
                [1] * 1000,
                [2**63],
                shape[:-1] or [1],
                [nasty(rng)],
            )
        )
        return f"{name}: shape {brief(entry['shape'])}"
    if action == "offsets":
        entry["data_offsets"] = rng.choice(
            (
                [0, 0],
                [4, 0],
                [-4, 8],
                [0, 2**40],
                [2**63, 2**63 + 4],
                [1.5, 8],
                [0],
                [0, 4, 8],
                nasty(rng),
            )
        )
        return f"{name}: offsets {brief(entry['data_offsets'])}"
    if action == "swap":
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
        return f"{name} swapped with {other}"
    if action == "more":
        extra = rng.choice(
            (
                "lm_head.weight",
                "x",
                "",
                "model.layers.99.x",
                "\x1b[2J",
                "a" * 20_000,
                "__metadata__",
            )
        )
        header[extra] = dict(entry)
        return f"one more tensor {brief(extra)}"
    if action == "twice":
        pairs = Pairs([*header.items(), (name, {**entry, "dtype": "F32"})])
        header["__metadata__"] = rng.choice(
            (Pairs([("a", "1"), ("a", "2")]), {"format": nasty(rng)}, pairs)
        )
        return "odd metadata"
    extra = name.replace(
        "layers.0", rng.choice(("layers.00", "layers.-1", "layers.99999999999999999999"))
    )
    header[extra] = header.pop(name)
    return f"{name} renamed to {extra}"


def _safetensors(box: Box, rng: Random) -> Job:
    model = box.copy(rng.choice(("tiny", "tiny", "quantized")))
    return either(rng, box, model, damage_safetensors(rng, model / "model.safetensors"))


CONFIG_KEYS = (
    "quantization",
    "quantization_config",
    "rope_scaling",
    "rope_parameters",
    "window",
    "_block_types",
    "layer_types",
    "tie_word_embeddings",
    "auto_map",
    "model_file",
    "dtype",
    "pad_token_id",
    "head_dim",
    "num_key_value_heads",
    "eos_token_id",
    "attention_window_size",
)


def _config(box: Box, rng: Random) -> Job:
    model = box.copy(rng.choice(("tiny", "tiny", "quantized")))
    path = model / rng.choice(
        ("config.json", "config.json", "config.json", "generation_config.json")
    )
    note = damage_json(rng, path, CONFIG_KEYS)
    return either(rng, box, model, note)


def damage_json(rng: Random, path: Path, keys: tuple[str, ...] = ()) -> str:
    """Damage a JSON file: mostly its values, sometimes its bytes."""
    if rng.random() < 0.15:
        content, note = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(content)
    else:
        value, note = mutate_json(rng, json.loads(path.read_text()), keys)
        path.write_bytes(dumps(value).encode("utf-8", "surrogatepass"))
    return f"{path.name}: {note}"


def _index(box: Box, rng: Random) -> Job:
    source = box.inputs / "sharded"
    _copy_golden("tiny-sharded", source)
    note = damage_json(rng, source / "model.safetensors.index.json", ("metadata", "weight_map"))
    return convert(box, source, note)


def _copy_golden(name: str, target: Path) -> None:
    target.mkdir()
    for file in (GOLDEN / name).iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def _sound_index(box: Box, rng: Random) -> Job:
    _copy_golden("tiny-sharded", box.inputs / "sharded")
    return convert(box, box.inputs / "sharded", "")


ADAPTER_KEYS = ("fine_tune_type", "num_layers", "lora_parameters", "lora_gates", "keys", "use_dora")


def _adapters(box: Box, rng: Random) -> Job:
    adapters = box.copy("adapters")
    if rng.random() < 0.55:
        note = damage_json(rng, adapters / "adapter_config.json", ADAPTER_KEYS)
    else:
        note = damage_safetensors(rng, adapters / "adapters.safetensors")
    return _with_adapters(box, adapters, note, fuse=rng.random() < 0.4)


def _with_adapters(box: Box, adapters: Path, note: str, *, fuse: bool) -> Job:
    model = box.sources / "tiny"
    if fuse:
        argv = ["--model", str(model), "--adapter-path", str(adapters), "--save-path", str(box.out)]
        return Job("fuse", argv, note, ("out",))
    return generate(box, model, note, "--adapter-path", str(adapters))


def many_tensors(box: Box, rng: Random) -> Job:
    """Return a safetensors file with the header of a million tensors."""
    model = box.copy("tiny")
    entry = '"{}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}'
    header = ",".join(entry.format(i, 4 * i, 4 * i + 4) for i in range(1_000_000))
    raw = ("{" + header + "}").encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 4_000_000)
    return generate(box, model, "a million tensors")


def _overlay(file: str, values: dict[str, Any]) -> Callable[[Box, Random], Job]:
    def make(box: Box, rng: Random) -> Job:
        base = "adapters" if file == "adapter_config.json" else "tiny"
        folder = box.copy(base)
        path = folder / file
        path.write_text(dumps({**json.loads(path.read_text()), **values}))
        note = f"{file}: {brief(values)}"
        if base == "adapters":
            return _with_adapters(box, folder, note, fuse=False)
        return either(rng, box, folder, note)

    return make


FAMILIES = (
    Family(
        "safetensors",
        "command",
        {"sound": lambda box, rng: generate(box, box.copy("quantized"), "")},
        _safetensors,
        {"a million tensors": many_tensors},
    ),
    Family(
        "config",
        "command",
        {"sound": lambda box, rng: convert(box, box.copy("tiny"), "")},
        _config,
        {name: _overlay("config.json", values) for name, values in overlays("config").items()},
    ),
    Family("index", "command", {"sound": _sound_index}, _index),
    Family(
        "adapters",
        "command",
        {
            "sound": lambda box, rng: _with_adapters(box, box.copy("adapters"), "", fuse=False),
            "sound fuse": lambda box, rng: _with_adapters(box, box.copy("adapters"), "", fuse=True),
        },
        _adapters,
        {
            name: _overlay("adapter_config.json", values)
            for name, values in overlays("adapters").items()
        },
    ),
)
