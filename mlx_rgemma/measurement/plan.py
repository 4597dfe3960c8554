"""What a benchmark is to measure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlx_rgemma.measurement.engines import OURS

OFTEN = 3
"""Generation with a state that is there already takes little time, and so varies most."""


@dataclass(frozen=True)
class Case:
    """One thing that is timed again and again; lengths are in tokens.

    Attributes:
        kind: "generate": read a prompt, then generate; "after": generate with a state that has read
            a long text; "train": a training step.
        length: Of the prompt, of the text read before, or of a row.
        batch_size: How many of them at once.
    """

    kind: str
    length: int
    batch_size: int = 1

    @property
    def title(self) -> str:
        """In words."""
        if self.kind == "after":
            return f"generation after {self.length:,} tokens"
        what = "prompt" if self.kind == "generate" else "training"
        batch = f", batch {self.batch_size}" if self.batch_size > 1 else ""
        return f"{what} {self.length:,}{batch}"


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        shape: Name of a shape, with random weights; or None.
        model: Folder or Hub repository; or None for the embedded model, without a shape.
        prompt_tokens, batch_sizes: Each with each is a prompt to read.
        generation_tokens: Tokens to generate after each prompt.
        after: Texts to read before generating, as long as these.
        train_tokens: Training steps on rows as long as these.
        training: "full" or "lora".
        dtypes: dtypes of the weights; None leaves the choice to `load`.
        quantizations: Labels, as `shapes.recipe` reads them.
        peers: Engines to compare with.
        trials: How often each case is timed; generation after a text, `OFTEN` times as often.
        warmup: Runs before that.
        delay: Seconds to rest before each trial.
        step_size: Tokens of a prompt to read at a time.
    """

    shape: str | None = None
    model: str | None = None
    prompt_tokens: tuple[int, ...] = ()
    generation_tokens: int = 1
    batch_sizes: tuple[int, ...] = (1,)
    after: tuple[int, ...] = ()
    train_tokens: tuple[int, ...] = ()
    training: str = "full"
    dtypes: tuple[str | None, ...] = (None,)
    quantizations: tuple[str, ...] = ("none",)
    peers: tuple[str, ...] = ()
    trials: int = 5
    warmup: int = 1
    delay: float = 0.0
    step_size: int = 2048
    engines: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engines", (OURS, *self.peers))

    def rounds(self) -> Iterator[tuple[list[Case], int]]:
        """Cases whose trials take turns, and how many those are.

        Training comes last: it changes the model.
        """
        batches = self.batch_sizes
        text = [Case("generate", n, batch) for n in self.prompt_tokens for batch in batches]
        yield text, self.trials
        yield [Case("after", n) for n in self.after], self.trials * OFTEN
        rows = [Case("train", n, batch) for n in self.train_tokens for batch in batches]
        yield rows, self.trials
