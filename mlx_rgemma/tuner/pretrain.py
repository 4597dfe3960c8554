"""Training a Griffin on text, from scratch or further, in a folder that it can go on from."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_rgemma import distributed
from mlx_rgemma.checkpoints.load import load_model, read_dtype
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.atomic import atomic_file, scratch_directory
from mlx_rgemma.io.hub import locate
from mlx_rgemma.io.reading import read_limited
from mlx_rgemma.ops import backend
from mlx_rgemma.tokenizers.load import SENTENCEPIECE, load_tokenizer
from mlx_rgemma.tokenizers.train import DEFAULT_VOCAB_SIZE, train_tokenizer
from mlx_rgemma.tuner.data.batch import Batch
from mlx_rgemma.tuner.data.batches import ConcatDataset, DataLoader, MixtureDataset
from mlx_rgemma.tuner.data.corpus import Source, digest, read_source, split_validation
from mlx_rgemma.tuner.data.packing import Documents, best_fit_pack, build_row, stack_rows
from mlx_rgemma.tuner.dropout import add_dropout
from mlx_rgemma.tuner.ema import EMA
from mlx_rgemma.tuner.init import initialize
from mlx_rgemma.tuner.memory_estimate import check_memory, pretraining_bytes
from mlx_rgemma.tuner.optim import adamw, learning_rate_schedule
from mlx_rgemma.tuner.parallel import broadcast_initial_state, check_rows
from mlx_rgemma.tuner.pretrain_config import TrainConfig
from mlx_rgemma.tuner.train_state import TrainingState, load_state, save_state
from mlx_rgemma.tuner.trainer import LoopSettings, TrainingCallback, fit

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
MODEL = "model"
EMBEDDED = "embedded"
"""How a recipe calls the small model that comes with the package."""

MAX_TOKENIZER_BYTES = 100_000_000

PLACES = (
    "data",
    "valid_data",
    "init_from",
    "tokenizer",
    "steps_per_report",
    "steps_per_eval",
    "steps_per_save",
    "sample_prompt",
    "sample_tokens",
)
"""Settings that may differ when a run is taken up: where things lie, and what is looked at."""


@dataclass(frozen=True)
class ValidationSet:
    """Text to measure a model on while it is trained.

    Attributes:
        batches: Packed, documents whole where a row holds them.
        nbytes: Bytes of UTF-8, with one for the end of each document.
    """

    batches: Sequence[Batch]
    nbytes: int

    def measure(self, model: Model, loss: Any) -> dict[str, float]:
        """The mean loss of a token, in nats, and the bits that a byte takes."""
        total, tokens = 0.0, 0
        for batch in self.batches:
            found, counted = loss(model, batch)
            total, tokens = total + found.item(), tokens + int(counted.item())
        return {
            "val_loss": total / tokens,
            "val_bits_per_byte": total / math.log(2) / self.nbytes,
        }


class Pretraining:
    """One training run.

    Args:
        recipe: How.
        folder: Where checkpoint, log, tokenizer and the exported model lie. A checkpoint that is
            there is gone on from.
        group: Processes that share the work.

    Raises:
        UserError: If the recipe and its texts do not make a run.
        CheckpointError: If what is in the folder cannot be gone on from.
    """

    def __init__(
        self, recipe: TrainConfig, folder: Path, group: mx.distributed.Group | None = None
    ) -> None:
        self.recipe, self.folder, self.group = recipe, folder, group
        self.first = group is None or group.rank() == 0
        check_rows(recipe.batch_size, group)
        sources, held = _texts(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self._tokenizer_file(sources)
        try:
            self._begin(sources, held)
        except BaseException:
            if trained:  # a run that has not begun leaves nothing
                (folder / SENTENCEPIECE).unlink(missing_ok=True)
            raise

    def _begin(self, sources: Sequence[Source], held: Sequence[str]) -> None:
        """Build all that is trained, from the folder's checkpoint if it has one."""
        recipe, folder, group = self.recipe, self.folder, self.group
        if group is not None:
            self._share_tokenizer(group)
        self.tokenizer = load_tokenizer(folder)
        self.model = self._model()
        rows = [
            ConcatDataset(
                encode(self.tokenizer, source.documents),
                recipe.context_length,
                _seed(recipe.seed, number),
            )
            for number, source in enumerate(sources)
        ]
        weights = [source.weight for source in sources]
        self._shares = [
            (source.name, int(row.documents.steps.sum()), source.weight / sum(weights))
            for source, row in zip(sources, rows, strict=True)
        ]
        mixed = MixtureDataset(rows, weights, recipe.seed)
        self.batches = DataLoader(mixed, recipe.batch_size)
        self.held_out = validation_set(self.tokenizer, held, recipe) if held else None
        self.state = self._state()
        settings = {k: v for k, v in recipe.as_dict().items() if k not in PLACES}
        self.fingerprint = {
            **settings,
            "weights": weights,
            "texts": [digest(source.documents) for source in sources],
            "tokenizer": digest([(folder / SENTENCEPIECE).read_bytes()]),
        }
        checkpoint = folder / CHECKPOINT
        self.resumed = distributed.broadcast_object(checkpoint.exists(), group)
        load = functools.partial(load_state, checkpoint, self.state, self.fingerprint)
        broadcast_initial_state(self.state, self.fingerprint, load if self.resumed else None, group)

    def description(self) -> list[str]:
        """What is going to happen, in lines for the terminal."""
        recipe, progress = self.recipe, self.state.progress
        parameters: Any = tree_flatten(self.model.parameters())
        size = sum(value.size for _, value in parameters)
        per_iteration = recipe.batch_size * recipe.context_length
        held = f"{self.held_out.nbytes} bytes" if self.held_out is not None else "nothing"
        lines = [
            f"Model: {size / 1e6:.2f} million parameters, vocabulary {self.model.args.vocab_size}",
            *(
                f"Text: {name}, {tokens} tokens, {share:.1%} of what is read,"
                f" {share * per_iteration * recipe.iters / tokens:.2f} times"
                for name, tokens, share in self._shares
            ),
            f"Held out: {held}",
        ]
        found = self.model.args.vocab_size
        chosen = recipe.vocab_size or recipe.tokenizer or recipe.init_from
        if not chosen and found < DEFAULT_VOCAB_SIZE:
            lines.append(f"Vocabulary: {found} tokens, as many as a text of this size supports")
        if self.resumed:
            lines.append(f"Resuming after iteration {progress.iteration}")
        return [*lines, f"Starting training..., iters: {recipe.iters}"]

    def run(self, callback: TrainingCallback | None, loss: Any) -> None:
        """Train to the end, then export the model.

        Raises:
            UserError: If the loss stops being a finite number.
            KeyboardInterrupt: After Ctrl-C, with checkpoint and model as they are then.
        """
        recipe = self.recipe
        fit(
            self.state,
            self.batches,
            LoopSettings.of(recipe),
            loss,
            evaluate=(lambda: self.evaluate(loss)) if self.held_out is not None else None,
            save=self.save if self.first else None,
            callback=callback if self.first else None,
            group=self.group,
            compute_dtype=None if recipe.dtype == "float32" else read_dtype(recipe.dtype),
        )
        if self.first:
            self.export()

    def evaluate(self, loss: Any) -> dict[str, Any]:
        """Measure the weights that would be exported, and have them write a sample."""
        found: dict[str, Any] = {}
        with self.exported_weights():
            assert self.held_out is not None
            found |= self.held_out.measure(self.model, loss)
            if self.recipe.sample_prompt:
                found["sample"] = self.sample()
        return found

    def exported_weights(self) -> Any:
        """A context in which the model has the weights that are exported."""
        average = self.state.average
        return nullcontext() if average is None else average.applied(self.model)

    def sample(self) -> str:
        """What the model writes, greedily."""
        from mlx_rgemma.generation.api import generate

        return generate(
            self.model,
            self.tokenizer,
            self.recipe.sample_prompt,
            max_tokens=self.recipe.sample_tokens,
        )

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint."""
        save_state(self.folder / CHECKPOINT, state, self.fingerprint)

    def export(self) -> None:
        """Write the model in Hugging Face's layout, in place of the one before."""
        target = self.folder / MODEL
        with scratch_directory(target) as scratch, self.exported_weights():
            save_model(
                scratch / "new",
                self.model,
                source=self.folder,
                dtype=read_dtype(self.recipe.save_dtype),
                torch_layout=True,
            )
            if target.exists():
                target.rename(scratch / "old")
            (scratch / "new").rename(target)

    def _tokenizer_file(self, sources: Sequence[Source]) -> bool:
        """See that the folder has a `tokenizer.model`: a begun run's own, or the recipe's.

        Returns:
            Whether it was written.
        """
        recipe, path = self.recipe, self.folder / SENTENCEPIECE
        begun = path.exists() and (self.folder / CHECKPOINT).exists()
        if begun or not self.first:
            return False
        given = recipe.tokenizer
        if given is None and recipe.init_from is not None:
            given = str(locate(_place(recipe.init_from)).folder / SENTENCEPIECE)
        if given is None:
            texts = [d for source in sources for d in source.documents]
            data = train_tokenizer(texts, recipe.vocab_size)
        elif Path(given).is_file():
            data = read_limited(Path(given), MAX_TOKENIZER_BYTES)
        else:
            raise UserError(f"{given}: no such file; give a SentencePiece tokenizer.model.")
        _write(path, data)
        return True

    def _share_tokenizer(self, group: mx.distributed.Group) -> None:
        """Give the others the first one's tokenizer, which may have been trained just now."""
        path = self.folder / SENTENCEPIECE
        data = distributed.broadcast_object(path.read_bytes() if self.first else None, group)
        if not self.first and not (path.exists() and path.read_bytes() == data):
            _write(path, data)

    def _model(self) -> Model:
        recipe = self.recipe
        if recipe.init_from is not None:
            model, _ = load_model(_place(recipe.init_from), dtype="float32", lazy=True)
            self._check_memory(model.args)
        else:
            config = recipe.config(len(self.tokenizer.get_vocab()))
            self._check_memory(config)
            model = Model(config)
            initialize(model, recipe.seed)
        tokens = len(self.tokenizer.get_vocab())
        if tokens > model.args.vocab_size:
            raise UserError(
                f"the tokenizer has {tokens} tokens, the model {model.args.vocab_size}; train it"
                " with its own tokenizer."
            )
        backend.prepare(model, dequantize=False)
        if recipe.dropout:
            add_dropout(model, recipe.dropout)
        return model

    def _check_memory(self, config: GriffinConfig) -> None:
        recipe = self.recipe
        rows = recipe.batch_size // (1 if self.group is None else self.group.size())
        copies = 5 if recipe.average_decay else 4
        check_memory(
            "such a model, --batch-size and --context-length do not fit into memory",
            pretraining_bytes(config, rows * recipe.context_length, copies),
        )

    def _state(self) -> TrainingState:
        recipe = self.recipe
        schedule = learning_rate_schedule(
            recipe.learning_rate,
            recipe.iters // recipe.grad_accumulation_steps,
            warmup=recipe.warmup,
            decay=recipe.lr_decay,
            end=recipe.min_learning_rate,
        )
        optimizer = adamw(schedule, weight_decay=recipe.weight_decay)
        average = EMA(self.model, recipe.average_decay) if recipe.average_decay else None
        return TrainingState(self.model, optimizer, average)


def encode(tokenizer: Any, documents: Sequence[str]) -> Documents:
    """Texts in tokens, each between begin-of-text and end-of-text."""
    eos = tokenizer.eos_token_id
    return Documents.of([[*tokenizer.encode(text), eos] for text in documents])


def validation_set(tokenizer: Any, documents: Sequence[str], recipe: TrainConfig) -> ValidationSet:
    """Lay held-out texts into batches."""
    encoded = encode(tokenizer, documents)
    length, size = recipe.context_length, recipe.batch_size
    rows = [build_row(encoded, pieces, length) for pieces in best_fit_pack(encoded.steps, length)]
    batches = [stack_rows(rows[i : i + size]) for i in range(0, len(rows), size)]
    return ValidationSet(batches, sum(len(d.encode()) + 1 for d in documents))


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def _texts(recipe: TrainConfig) -> tuple[list[Source], list[str]]:
    """What is read, and what is held out."""
    if not recipe.data:
        raise UserError("there is no text to train on; name it with --data.")
    sources: list[Source] = []
    held: list[str] = []
    for place in recipe.data:
        source = read_source(place, whole_files=recipe.whole_files)
        if not recipe.valid_data and recipe.valid_fraction:
            source, part = split_validation(source, recipe.valid_fraction)
            held.extend(part)
        sources.append(source)
    for place in recipe.valid_data:
        held.extend(read_source(place, whole_files=recipe.whole_files).documents)
    return sources, held


def _place(init_from: str) -> str | None:
    """What `load_model` calls the place of a model."""
    return None if init_from == EMBEDDED else init_from


def _seed(seed: int, number: int) -> int:
    """Another seed for each source."""
    return seed * 1000 + number
