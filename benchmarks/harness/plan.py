"""The cases of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.harness.engines import OURS

DECODE_TRIALS_FACTOR = 3
"""Cases that only decode are short and noisy: they get more trials."""


@dataclass(frozen=True)
class Case:
    """One thing to time; lengths in tokens.

    Attributes:
        kind: "generate": read a prompt, then generate; "after": generate with a state that has read
            a long text; "train": a training step.
        length: Of the prompt, of the text read before, or of a sequence.
        batch_size: Prompts or sequences at once.
    """

    kind: str
    length: int
    batch_size: int = 1

    @property
    def title(self) -> str:
        """Return the case in words."""
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
        prompt_tokens, batch_sizes: Every pair of them is a case.
        generation_tokens: Tokens to generate after each prompt.
        after: Lengths of texts to read before generating.
        train_tokens: Lengths of sequences to train on.
        training: "full" or "lora".
        dtypes: dtypes of the weights; None: the default of `load`.
        quantizations: Labels, as `random_model.recipe` reads them.
        baselines: Engines to compare with.
        trials: Timed runs of each case; `DECODE_TRIALS_FACTOR` times as many after a text.
        warmup: Runs before that.
        delay: Seconds before each trial.
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
    baselines: tuple[str, ...] = ()
    trials: int = 5
    warmup: int = 1
    delay: float = 0.0
    step_size: int = 2048
    engines: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engines", (OURS, *self.baselines))

    def rounds(self) -> Iterator[tuple[list[Case], int]]:
        """Yield cases whose trials alternate, and the number of trials.

        Training comes last: it changes the model.
        """
        batches = self.batch_sizes
        text = [Case("generate", n, batch) for n in self.prompt_tokens for batch in batches]
        yield text, self.trials
        yield [Case("after", n) for n in self.after], self.trials * DECODE_TRIALS_FACTOR
        rows = [Case("train", n, batch) for n in self.train_tokens for batch in batches]
        yield rows, self.trials
