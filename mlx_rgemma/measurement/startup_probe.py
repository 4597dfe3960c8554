"""What `mlx_rgemma.generate` does up to its first token, stage by stage, noting when each ended.

Prints the stages with the time of day at their end, for `startup` to read.
"""

import time

_PYTHON = time.time()

import json  # noqa: E402
import sys  # noqa: E402


def main(model: str | None) -> None:
    """Go the way, and print the times."""
    ends = [("python", _PYTHON)]

    def ended(stage: str) -> None:
        ends.append((stage, time.time()))

    import mlx.core  # noqa: F401

    ended("mlx")
    from mlx_rgemma.checkpoints.folder import CheckpointFolder
    from mlx_rgemma.checkpoints.loading import load_model
    from mlx_rgemma.checkpoints.source import locate
    from mlx_rgemma.checkpoints.tokenizer import load_tokenizer
    from mlx_rgemma.generation import stream_generate

    ended("package")
    import mlx_lm.generate  # noqa: F401

    ended("mlx_lm")
    source = locate(model)
    folder = CheckpointFolder.open(source.folder)
    tokenizer = load_tokenizer(source.folder, folder.config.eos_token_ids, name=source.name)
    ended("tokenizer")
    loaded, _ = load_model(source.folder)
    ended("weights")
    next(iter(stream_generate(loaded, tokenizer, "Once upon a time", max_tokens=1)))
    ended("first_token")
    print(json.dumps(ends))


if __name__ == "__main__":
    main(sys.argv[2] if len(sys.argv) > 2 else None)
