"""What each of several processes checks of a model that they share; run by `test_launch`.

Arguments: a folder for files, in which those named quantized-* are models to be shared, each also
by one process. The first process prints "all well" at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.assertions import LOGITS_ATOL, max_error
from helpers.models import golden, golden_model
from helpers.random_models import EMBEDDED, TOKENS, random_model, write

import mlx_rgemma
from mlx_rgemma import distributed, load, register
from mlx_rgemma.errors import UserError
from mlx_rgemma.sessions.prompt_cache import load_prompt_cache, read_prompt_cache, save_prompt_cache


def shard(model, group):
    model.shard(group)
    mx.eval(model.parameters())
    model.fuse_projections()
    return model


def golden_logits_and_text(group) -> None:
    model = shard(golden_model("tiny-sharded", fuse=False), group)
    data = golden("decode/tiny-sharded.npz")
    assert max_error(model(mx.array(data["tokens"])), data["google_full"]) < LOGITS_ATOL
    data = golden("greedy/tiny-sharded.npz")
    cache = model.make_cache(3)
    tokens = mx.array(data["prompts"])
    for expected in data["generated"].T[: 12 // group.size()]:
        logits = model(tokens, cache=cache)[:, -1]
        tokens = mx.argmax(logits, axis=-1)[:, None]
        assert tokens[:, 0].tolist() == expected.tolist()
    bits = distributed.broadcast_object(np.array(logits).tobytes())
    assert bits == np.array(logits).tobytes(), "logits differ between processes"


def quantized(group, folder: Path) -> None:
    """From files, of which a process reads its part: the logits, and the text that they choose."""
    tokens = 12 // group.size()
    for path in sorted(folder.glob("quantized-*")):
        expected_text, expected = write(load(path, dtype="float32")[0], tokens)
        model, _ = load(path, dtype="float32", group=group)
        assert model.layers[0].temporal_block.linear_out.weight.nbytes * group.size() == (
            quantized_nbytes(path, "model.layers.0.temporal_block.linear_out.weight")
        )
        text, logits = write(model, tokens)
        assert max_error(logits, expected) < LOGITS_ATOL, path.name
        assert text == expected_text, path.name


def quantized_nbytes(folder: Path, name: str) -> int:
    return mx.load(str(folder / "model.safetensors"))[name].nbytes


def states_in_files(group, folder: Path) -> None:
    whole, parts = random_model(), shard(random_model(), group)
    cache = parts.make_cache()
    parts(TOKENS[:1, :9], cache=cache)
    together, alone = folder / "together.safetensors", folder / "alone.safetensors"
    save_prompt_cache(together, parts, cache, {"text": "of all"})
    if group.rank() == 0:
        save_prompt_cache(alone, whole, load_prompt_cache(together, whole))
    again, metadata = read_prompt_cache(alone, parts)
    assert [np.array(a).tobytes() for layer in again for a in layer.state] == [
        np.array(a).tobytes() for layer in cache for a in layer.state
    ]
    again, metadata = read_prompt_cache(together, parts)
    assert metadata["text"] == "of all" and again[0].h.shape == cache[0].h.shape
    try:
        read_prompt_cache(folder / "missing.safetensors", parts)
    except UserError as error:
        assert "no such file" in str(error)
    else:
        raise AssertionError("a missing file was read")


def in_mlx_lm(group) -> None:
    from mlx_lm.utils import sharded_load

    register()
    theirs, _ = sharded_load(str(EMBEDDED), None, group)
    assert isinstance(theirs, mlx_rgemma.Model) and theirs.group.size() == group.size()
    theirs.set_dtype(mx.float32)
    whole, _ = load(dtype="float32")
    assert max_error(theirs(TOKENS), np.array(whole(TOKENS))) < LOGITS_ATOL


def words_and_arrays(group) -> None:
    value = {"rank": group.rank(), "text": "é" * 1000}
    assert distributed.broadcast_object(value)["rank"] == 0
    arrays = [mx.array([1.5, -0.0, 3e38]).astype(mx.bfloat16), mx.array(7), mx.array([True])]
    shared = distributed.broadcast(arrays if group.rank() == 0 else None, group)
    assert [np.array(a.astype(mx.float32)).tobytes() for a in shared] == [
        np.array(a.astype(mx.float32)).tobytes() for a in arrays
    ]
    sampler = distributed.synchronized_sampler(lambda logprobs: mx.array([group.rank() + 5]))
    assert sampler(mx.zeros((1, 3))).item() == 5
    numbers = mx.random.uniform(shape=(3,)).tolist()
    assert distributed.broadcast_object(numbers) == numbers, (
        "random numbers differ between processes"
    )


def main() -> None:
    group, folder = distributed.join(), Path(sys.argv[1])
    golden_logits_and_text(group)
    quantized(group, folder)
    states_in_files(group, folder)
    if group.size() == 2:  # four that wait by spinning are slow on two cores
        in_mlx_lm(group)
        words_and_arrays(group)
    print("all well", flush=True)
    distributed.leave(status=0)


if __name__ == "__main__":
    main()
