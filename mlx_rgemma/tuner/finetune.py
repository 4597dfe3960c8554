"""Fine-tuning of a model on a data set: LoRA, DoRA or all weights of the last layers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_rgemma import distributed
from mlx_rgemma.adapters.files import (
    RUN,
    WEIGHTS_FILE,
    AdapterConfig,
    add_adapters,
    load_adapter_weights,
    load_adapters,
    save_adapter_config,
    save_adapter_weights,
)
from mlx_rgemma.errors import UserError
from mlx_rgemma.griffin.model import Model
from mlx_rgemma.tuner.data.batches import Batches, DataLoader, PackedDataset, PaddedBatches
from mlx_rgemma.tuner.data.corpus import digest
from mlx_rgemma.tuner.data.packing import Batch, Documents, Span, build_sequence, stack_documents
from mlx_rgemma.tuner.data.tbptt import StatefulBatches, StatefulLoss
from mlx_rgemma.tuner.grad_checkpoint import checkpoint_layers
from mlx_rgemma.tuner.loss import batch_loss
from mlx_rgemma.tuner.memory_estimate import check_memory
from mlx_rgemma.tuner.optim import make_optimizer
from mlx_rgemma.tuner.train_state import (
    TrainingState,
    broadcast_initial_state,
    check_batch_size,
    load_state,
    save_state,
)
from mlx_rgemma.tuner.trainer import LoopSettings, TrainingCallback, fit

STATE_FILE = "training_state.safetensors"

FINGERPRINT = (
    "model",
    "fine_tune_type",
    "lora_parameters",
    "lora_gates",
    "num_layers",
    "optimizer",
    "optimizer_config",
    "learning_rate",
    "lr_schedule",
    "batch_size",
    "grad_accumulation_steps",
    "max_seq_length",
    "mask_prompt",
    "pack",
    "carry_state",
    "dtype",
    "window",
    "seed",
)
"""Settings that a resumed run must share with the interrupted one."""


def check(args: SimpleNamespace) -> None:
    """Check the settings before a model is loaded.

    Raises:
        UserError: Naming the first that is wrong.
    """
    if args.train:
        AdapterConfig.of({**vars(args), "num_layers": args.num_layers or -1}, "settings")
        make_optimizer(args)
        if not args.adapter_path:
            raise UserError("--adapter-path is empty; training writes into that folder.")
        if Path(args.adapter_path).exists() and not Path(args.adapter_path).is_dir():
            raise UserError(f"--adapter-path: {args.adapter_path} is a file, expected a folder.")


def prepare(model: Model, args: SimpleNamespace) -> AdapterConfig:
    """Add adapters to a model (or select its last layers), and freeze everything else.

    Raises:
        UserError: If the settings or the initial adapter weights do not fit the model.
    """
    config = AdapterConfig.of(vars(args), "settings")
    mx.random.seed(args.seed)
    add_adapters(model, config)
    if args.resume_adapter_file is not None:
        load_adapter_weights(model, args.resume_adapter_file, partial=True)
    if not tree_flatten(model.trainable_parameters()):
        raise UserError(f"num-layers is {config.num_layers}: there is nothing to train.")
    if args.grad_checkpoint:
        checkpoint_layers(model)
    return config


def train(
    model: Model,
    examples: dict[str, Documents],
    args: SimpleNamespace,
    *,
    callback: TrainingCallback | None,
    show: Callable[[str], None] = print,
    group: mx.distributed.Group | None = None,
) -> None:
    """Train the trainable parameters of a model, and write them to the adapters' folder.

    The folder gets mlx-lm's files, and `training_state.safetensors`, from which `args.resume`
    resumes bit-exactly, with the same data and settings; without that file it starts a new run. The
    caller has locked the folder.

    Args:
        model: From `prepare`.
        examples: From `read_examples`.
        args: mlx-lm's settings, and `pack`, `carry_state`, `resume`.
        callback: Receives the reports, on rank 0.
        show: Prints a line.
        group: Ranks that split the sequences of every batch; rank 0 reports and writes.

    Raises:
        UserError: If data or settings do not fit, or the loss becomes NaN or infinite.
        KeyboardInterrupt: After Ctrl-C, once the checkpoint is written.
    """
    settings = LoopSettings.of(args, steps_per_save=args.save_every)
    check_batch_size(args.batch_size, group)
    if group is not None and args.carry_state:
        raise UserError(
            "--carry-state is for one process: sequences carry their state to the next batch."
        )
    first = group is None or group.rank() == 0
    documents = examples["train"]
    check_batch_memory(model, documents, args)
    batches = training_batches(documents, args)
    state = TrainingState(model, make_optimizer(args))
    loss: Any = batch_loss
    if args.carry_state:
        loss = state.loss_state = StatefulLoss(model, args.batch_size)
    folder = Path(args.adapter_path)
    fingerprint = {
        **{key: getattr(args, key) for key in FINGERPRINT},
        "training data": digest(
            np.ascontiguousarray(part).tobytes()
            for part in (documents.ids, documents.offsets, documents.first_targets)
        ),
    }
    checkpoint = folder / STATE_FILE
    resume = distributed.broadcast_object(args.resume and checkpoint.exists(), group)
    load = partial(load_state, checkpoint, state, fingerprint)
    broadcast_initial_state(state, fingerprint, load if resume else None, group)
    if resume:
        show(f"Resuming after iteration {state.progress.iteration}")
    elif args.resume:
        show(f"No {STATE_FILE} in {folder}: starting at iteration 0")
    run = digest([json.dumps(fingerprint, sort_keys=True)])

    def save(state: TrainingState) -> None:
        weights: Any = dict(tree_flatten(model.trainable_parameters()))
        iteration = state.progress.iteration
        numbered = folder / f"{iteration:07d}_{WEIGHTS_FILE}"
        # Not earlier: until there are weights, the folder's files belong to one run.
        save_adapter_config(folder, {**vars(args), RUN: run})
        for file in (folder / WEIGHTS_FILE, numbered):
            save_adapter_weights(file, weights, run)
        save_state(checkpoint, state, fingerprint)
        show(f"Iter {iteration}: Saved adapter weights to {folder / WEIGHTS_FILE} and {numbered}.")

    def validate() -> dict[str, Any]:
        loss = evaluate(model, examples["valid"], args, args.val_batches)
        return {"val_loss": loss}

    fit(
        state,
        batches,
        settings,
        loss,
        evaluate=validate if len(examples["valid"]) else None,
        save=save if first else None,
        callback=callback if first else None,
        group=group,
    )
    show(f"Saved final weights to {folder / WEIGHTS_FILE}.")


def warnings(examples: Mapping[str, Documents], args: SimpleNamespace) -> list[str]:
    """Return warnings about a data set.

    Raises:
        UserError: If it has no target.
    """
    found = [] if len(examples["valid"]) else ["no validation set; training without."]
    documents, longest = examples["train"], args.max_seq_length
    whole = args.pack or args.carry_state
    steps = documents.steps if whole else np.minimum(documents.steps, longest - 1)
    if not (steps >= documents.first_targets).any():
        raise UserError(
            "the training set has nothing to learn"
            + ("." if whole else f" within the first {longest} tokens (--max-seq-length).")
        )
    cut = int((documents.steps >= longest).sum())
    if cut and not whole:
        found.append(
            f"{cut} of {len(documents)} training examples are longer than --max-seq-length"
            f" {longest} and will be truncated; --carry-state reads them whole."
        )
    return found


def check_batch_memory(model: Model, documents: Documents, args: SimpleNamespace) -> None:
    """Refuse batches whose activations exceed the memory.

    Raises:
        UserError: If they do.
    """
    whole = args.pack or args.carry_state
    longest = int(documents.steps.max(initial=0))
    length = args.max_seq_length if whole else min(args.max_seq_length, longest)
    check_memory(
        "a batch of this --batch-size and --max-seq-length does not fit into memory",
        4 * args.batch_size * length * model.args.hidden_size,
    )


def training_batches(documents: Documents, args: SimpleNamespace) -> Batches:
    """Return the training batches: padded, packed, or chunks with carried state."""
    length, size = args.max_seq_length, args.batch_size
    if args.carry_state:
        return StatefulBatches(documents, size, length, args.seed)
    if args.pack:
        return DataLoader(PackedDataset(documents, length, args.seed), size)
    return PaddedBatches(documents, size, length, args.seed)


def evaluate(model: Model, documents: Documents, args: SimpleNamespace, max_batches: int) -> float:
    """Return the mean loss per target, in nats.

    With carried state documents are read whole, otherwise up to `max_seq_length`.

    Args:
        model: The model; it is put into evaluation mode.
        documents: The documents.
        args: Its `batch_size`, `max_seq_length` and `carry_state` are used.
        max_batches: Number of batches, at most; -1 for all.
    """
    model.eval()
    loss: Any = batch_loss
    batches: Iterator[Batch]
    if args.carry_state:
        size = min(args.batch_size, int((documents.steps > 0).sum()))
        chunks = StatefulBatches(documents, size, args.max_seq_length, None)
        loss, batches = StatefulLoss(model, size), (chunks[i] for i in range(len(chunks)))
    else:
        batches = _in_order(documents, args.batch_size, args.max_seq_length)
    total = count = 0.0
    for number, batch in enumerate(batches):
        if number == max_batches:
            break
        of_batch = loss(model, batch)
        mx.eval(of_batch)
        total, count = total + of_batch[0].item(), count + of_batch[1].item()
    return total / max(count, 1)


def test(model: Model, documents: Documents, args: SimpleNamespace) -> str:
    """Evaluate a model on the test set, and return mlx-lm's line."""
    check_batch_memory(model, documents, args)
    loss = evaluate(model, documents, args, args.test_batches)
    return f"Test loss {loss:.3f}, Test ppl {math.exp(loss):.3f}."


def load_trained(model: Model, folder: str) -> None:
    """Load trained adapters; an empty path means none, as in mlx-lm."""
    if folder:
        load_adapters(model, folder)


def parameter_line(model: Model) -> str:
    """Format the number of trainable parameters like mlx-lm."""
    from mlx_lm.utils import get_total_parameters

    total = get_total_parameters(model) / 1e6
    flat: Any = tree_flatten(model.trainable_parameters())
    trained = sum(value.size for _, value in flat) / 1e6
    return f"Trainable parameters: {100 * trained / total:.3f}% ({trained:.3f}M/{total:.3f}M)"


def _in_order(documents: Documents, batch_size: int, max_length: int) -> Iterator[Batch]:
    """Yield all documents once, one per sequence, documents of similar length together."""
    order = np.argsort(documents.steps, kind="stable")
    steps = np.minimum(documents.steps, max_length - 1)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(int(steps[chosen].max()), 1)
        yield stack_documents(
            [build_sequence(documents, [Span(int(d), 0, int(steps[d]))], length) for d in chosen]
        )
