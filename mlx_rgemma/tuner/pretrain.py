"""Pre-training of a Griffin on text, from scratch or further, in a folder that it resumes from."""

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
from mlx_rgemma.checkpoints.load import load_model
from mlx_rgemma.checkpoints.save import save_model
from mlx_rgemma.checkpoints.tensors import read_dtype
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.config import GriffinConfig
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.io.atomic import atomic_file, scratch_directory
from mlx_rgemma.io.hub import locate
from mlx_rgemma.io.reading import read_limited
from mlx_rgemma.ops import backend
from mlx_rgemma.tokenizers.load import SENTENCEPIECE, load_tokenizer
from mlx_rgemma.tokenizers.train import DEFAULT_VOCAB_SIZE, train_tokenizer
from mlx_rgemma.tuner.config import TrainConfig
from mlx_rgemma.tuner.data.batches import ConcatDataset, DataLoader, MixtureDataset
from mlx_rgemma.tuner.data.corpus import Source, digest, read_source, split_validation
from mlx_rgemma.tuner.data.packing import (
    Batch,
    Documents,
    best_fit_pack,
    build_sequence,
    stack_sequences,
)
from mlx_rgemma.tuner.dropout import add_dropout
from mlx_rgemma.tuner.ema import EMA
from mlx_rgemma.tuner.init import initialize
from mlx_rgemma.tuner.memory_estimate import check_memory, pretraining_bytes
from mlx_rgemma.tuner.optim import adamw, learning_rate_schedule
from mlx_rgemma.tuner.train_state import (
    TrainingState,
    broadcast_initial_state,
    check_batch_size,
    load_state,
    save_state,
)
from mlx_rgemma.tuner.trainer import LoopSettings, TrainingCallback, fit

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"
MODEL = "model"
EMBEDDED = "embedded"
"""Name of the small model of this package, for `init_from`."""

MAX_TOKENIZER_BYTES = 100_000_000

NOT_FINGERPRINTED = (
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
"""Settings that a resumed run may change: paths and reports."""


@dataclass(frozen=True)
class ValidationSet:
    """Text to evaluate a model on during training.

    Attributes:
        batches: Packed batches; documents are whole if a sequence holds them.
        nbytes: Bytes of the UTF-8 text, plus one for the end of each document.
    """

    batches: Sequence[Batch]
    nbytes: int

    def measure(self, model: Model, loss: Any) -> dict[str, float]:
        """Return the mean loss per token, in nats, and the bits per byte."""
        total, tokens = 0.0, 0
        for batch in self.batches:
            found, counted = loss(model, batch)
            total, tokens = total + found.item(), tokens + int(counted.item())
        return {
            "val_loss": total / tokens,
            "val_bits_per_byte": total / math.log(2) / self.nbytes,
        }


class Pretraining:
    """A training run.

    Args:
        config: The configuration.
        folder: Folder of the checkpoint, log, tokenizer and exported model. The run resumes from
            an existing checkpoint.
        group: Ranks that share the sequences of each batch.

    Raises:
        UserError: If the configuration or its texts are wrong.
        CheckpointError: If the checkpoint is damaged or of another run.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, group: mx.distributed.Group | None = None
    ) -> None:
        self.config, self.folder, self.group = config, folder, group
        self.first = group is None or group.rank() == 0
        check_batch_size(config.batch_size, group)
        sources, validation = _texts(config)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self._write_tokenizer(sources)
        try:
            self._begin(sources, validation)
        except BaseException:
            if trained:  # a run that fails here leaves nothing
                (folder / SENTENCEPIECE).unlink(missing_ok=True)
            raise

    def _begin(self, sources: Sequence[Source], validation: Sequence[str]) -> None:
        """Build the data sets, the model and its state; load the checkpoint if there is one."""
        config, folder, group = self.config, self.folder, self.group
        if group is not None:
            self._broadcast_tokenizer(group)
        self.tokenizer = load_tokenizer(folder)
        self.model = self._model()
        datasets = [
            ConcatDataset(
                encode(self.tokenizer, source.documents),
                config.context_length,
                _seed(config.seed, number),
            )
            for number, source in enumerate(sources)
        ]
        weights = [source.weight for source in sources]
        self._shares = [
            (source.name, int(dataset.documents.steps.sum()), source.weight / sum(weights))
            for source, dataset in zip(sources, datasets, strict=True)
        ]
        mixture = MixtureDataset(datasets, weights, config.seed)
        self.batches = DataLoader(mixture, config.batch_size)
        self.validation = validation_set(self.tokenizer, validation, config) if validation else None
        self.state = self._state()
        settings = {k: v for k, v in config.as_dict().items() if k not in NOT_FINGERPRINTED}
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
        """Return the lines that a command prints before training."""
        config, progress = self.config, self.state.progress
        parameters: Any = tree_flatten(self.model.parameters())
        size = sum(value.size for _, value in parameters)
        per_iteration = config.batch_size * config.context_length
        validation = f"{self.validation.nbytes} bytes" if self.validation is not None else "none"
        lines = [
            f"Model: {size / 1e6:.2f} million parameters, vocabulary {self.model.args.vocab_size}",
            *(
                f"Text: {name}, {tokens} tokens, {share:.1%} of the training tokens,"
                f" {share * per_iteration * config.iters / tokens:.2f} epochs"
                for name, tokens, share in self._shares
            ),
            f"Validation set: {validation}",
        ]
        found = self.model.args.vocab_size
        chosen = config.vocab_size or config.tokenizer or config.init_from
        if not chosen and found < DEFAULT_VOCAB_SIZE:
            lines.append(f"Vocabulary: {found} tokens, the most that a text of this size supports")
        if self.resumed:
            lines.append(f"Resuming after iteration {progress.iteration}")
        return [*lines, f"Starting training..., iters: {config.iters}"]

    def run(self, callback: TrainingCallback | None, loss: Any) -> None:
        """Train to the end, then export the model.

        Raises:
            UserError: If the loss becomes NaN or infinite.
            KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.
        """
        config = self.config
        fit(
            self.state,
            self.batches,
            LoopSettings.of(config),
            loss,
            evaluate=(lambda: self.evaluate(loss)) if self.validation is not None else None,
            save=self.save if self.first else None,
            callback=callback if self.first else None,
            group=self.group,
            compute_dtype=None if config.dtype == "float32" else read_dtype(config.dtype),
        )
        if self.first:
            self.export()

    def evaluate(self, loss: Any) -> dict[str, Any]:
        """Evaluate the weights that would be exported, and generate a sample from them."""
        found: dict[str, Any] = {}
        with self.exported_weights():
            assert self.validation is not None
            found |= self.validation.measure(self.model, loss)
            if self.config.sample_prompt:
                found["sample"] = self.sample()
        return found

    def exported_weights(self) -> Any:
        """Return a context in which the model has the exported weights: the EMA, if any."""
        ema = self.state.ema
        return nullcontext() if ema is None else ema.applied(self.model)

    def sample(self) -> str:
        """Return text generated greedily."""
        from mlx_rgemma.generation.api import generate

        return generate(
            self.model,
            self.tokenizer,
            self.config.sample_prompt,
            max_tokens=self.config.sample_tokens,
        )

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint."""
        save_state(self.folder / CHECKPOINT, state, self.fingerprint)

    def export(self) -> None:
        """Write the model in Hugging Face's layout; an earlier export is replaced."""
        target = self.folder / MODEL
        with scratch_directory(target) as scratch, self.exported_weights():
            save_model(
                scratch / "new",
                self.model,
                source=self.folder,
                dtype=read_dtype(self.config.save_dtype),
                torch_layout=True,
            )
            if target.exists():
                target.rename(scratch / "old")
            (scratch / "new").rename(target)

    def _write_tokenizer(self, sources: Sequence[Source]) -> bool:
        """Write the `tokenizer.model` of a new run: given, of the initial model, or trained.

        Returns:
            Whether it was written.
        """
        config, path = self.config, self.folder / SENTENCEPIECE
        begun = path.exists() and (self.folder / CHECKPOINT).exists()
        if begun or not self.first:
            return False
        given = config.tokenizer
        if given is None and config.init_from is not None:
            given = str(locate(_model_path(config.init_from)).folder / SENTENCEPIECE)
        if given is None:
            texts = [d for source in sources for d in source.documents]
            data = train_tokenizer(texts, config.vocab_size)
        elif Path(given).is_file():
            data = read_limited(Path(given), MAX_TOKENIZER_BYTES)
        else:
            raise UserError(f"{given}: no such file; give a SentencePiece tokenizer.model.")
        _write(path, data)
        return True

    def _broadcast_tokenizer(self, group: mx.distributed.Group) -> None:
        """Broadcast the tokenizer of rank 0, which may have trained it."""
        path = self.folder / SENTENCEPIECE
        data = distributed.broadcast_object(path.read_bytes() if self.first else None, group)
        if not self.first and not (path.exists() and path.read_bytes() == data):
            _write(path, data)

    def _model(self) -> Model:
        config = self.config
        if config.init_from is not None:
            model, _ = load_model(_model_path(config.init_from), dtype="float32", lazy=True)
            self._check_memory(model.args)
        else:
            shape = config.model_config(len(self.tokenizer.get_vocab()))
            self._check_memory(shape)
            model = Model(shape)
            initialize(model, config.seed)
        tokens = len(self.tokenizer.get_vocab())
        if tokens > model.args.vocab_size:
            raise UserError(
                f"the tokenizer has {tokens} tokens, but the model {model.args.vocab_size}; train"
                " it with its own tokenizer."
            )
        backend.prepare(model, dequantize=False)
        if config.dropout:
            add_dropout(model, config.dropout)
        return model

    def _check_memory(self, shape: GriffinConfig) -> None:
        config = self.config
        sequences = config.batch_size // (1 if self.group is None else self.group.size())
        copies = 5 if config.average_decay else 4
        check_memory(
            "this model, --batch-size and --context-length do not fit into memory",
            pretraining_bytes(shape, sequences * config.context_length, copies),
        )

    def _state(self) -> TrainingState:
        config = self.config
        schedule = learning_rate_schedule(
            config.learning_rate,
            config.iters // config.grad_accumulation_steps,
            warmup=config.warmup,
            decay=config.lr_decay,
            end=config.min_learning_rate,
        )
        optimizer = adamw(schedule, weight_decay=config.weight_decay)
        ema = EMA(self.model, config.average_decay) if config.average_decay else None
        return TrainingState(self.model, optimizer, ema)


def encode(tokenizer: Any, documents: Sequence[str]) -> Documents:
    """Tokenize texts; each is between begin-of-text and end-of-text."""
    eos = tokenizer.eos_token_id
    return Documents.of([[*tokenizer.encode(text), eos] for text in documents])


def validation_set(tokenizer: Any, documents: Sequence[str], config: TrainConfig) -> ValidationSet:
    """Pack texts into a validation set."""
    encoded = encode(tokenizer, documents)
    length, size = config.context_length, config.batch_size
    packed = best_fit_pack(encoded.steps, length)
    sequences = [build_sequence(encoded, spans, length) for spans in packed]
    batches = [stack_sequences(sequences[i : i + size]) for i in range(0, len(sequences), size)]
    return ValidationSet(batches, sum(len(d.encode()) + 1 for d in documents))


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(data)


def _texts(config: TrainConfig) -> tuple[list[Source], list[str]]:
    """Read the training sources and the validation documents."""
    if not config.data:
        raise UserError("there is no text to train on; name it with --data.")
    sources: list[Source] = []
    validation: list[str] = []
    for place in config.data:
        source = read_source(place, whole_files=config.whole_files)
        if not config.valid_data and config.valid_fraction:
            source, part = split_validation(source, config.valid_fraction)
            validation.extend(part)
        sources.append(source)
    for place in config.valid_data:
        validation.extend(read_source(place, whole_files=config.whole_files).documents)
    return sources, validation


def _model_path(init_from: str) -> str | None:
    """Return the argument of `load_model`."""
    return None if init_from == EMBEDDED else init_from


def _seed(seed: int, number: int) -> int:
    """Return a different seed for each source."""
    return seed * 1000 + number
