"""Sessions and prompt caches."""

from __future__ import annotations

from pathlib import Path
from random import Random

from fuzz.families.models import (
    damage_safetensors,
    generate,
    join_safetensors,
    split_safetensors,
)
from fuzz.job import Box, Family, Job
from fuzz.mutations import NUMBERS, TEXTS, brief


def _resume(box: Box, state: Path, note: str) -> Job:
    return generate(box, box.sources / "tiny", note, "--prompt-cache-file", str(state))


def _state(box: Box, rng: Random) -> Job:
    state = box.copy(rng.choice(("session.safetensors", "cache.safetensors")))
    if rng.random() < 0.5:
        note = damage_safetensors(rng, state)
    else:
        header, data = split_safetensors(state.read_bytes())
        note = _damage_metadata(rng, header["__metadata__"])
        state.write_bytes(join_safetensors(header, data))
    return _resume(box, state, note)


def _damage_metadata(rng: Random, metadata: dict[str, str]) -> str:
    """Change texts of the metadata, where mlx-lm keeps classes, offsets and flattened trees."""
    key = rng.choice(list(metadata))
    action = rng.randrange(5)
    if action == 0:
        del metadata[key]
        return f"metadata {key} removed"
    if action == 1:
        name = f"{rng.randrange(3)}.{rng.choice((0, 1, 3, 99, '', -1, 10**12, 'a'))}"
        metadata[name] = str(rng.choice(NUMBERS))
        return f"metadata {name} added"
    if action == 2:
        value = rng.choice(
            (
                "KVCache",
                "RotatingKVCache",
                "ArraysCache",
                "CacheList",
                "os",
                "GriffinCache",
                "object",
            )
        )
    else:
        value = str(rng.choice((NUMBERS, TEXTS)[action == 3][: None if action == 4 else -1]))
    metadata[key] = value
    return f"metadata {key} = {brief(value)}"


FAMILIES = (
    Family(
        "state",
        "command",
        {
            "sound session": lambda box, rng: _resume(box, box.copy("session.safetensors"), ""),
            "sound name without suffix": lambda box, rng: _resume(
                box, box.copy("named") / "book", ""
            ),
            "sound cache": lambda box, rng: _resume(box, box.copy("cache.safetensors"), ""),
        },
        _state,
    ),
)
