"""Data sets for fine-tuning in mlx-lm's formats: chats, prompts with completions, texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError, shortened, shown
from mlx_rgemma.io.hub import REPOSITORY
from mlx_rgemma.io.reading import parse_object, read_lines, reason
from mlx_rgemma.tuner.config import check_keys
from mlx_rgemma.tuner.data.packing import Documents

SPLITS = ("train", "valid", "test")

FEATURES = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")
"""Names of a data set's columns, which a configuration file may set."""

HUB_KEYS = ("path", "config", "train_split", "valid_split", "test_split", "mask_prompt", *FEATURES)
"""Keys of each entry of `hf_dataset` in a configuration file."""


def check_data(args: Any) -> None:
    """Check the data arguments before a model is loaded.

    Args:
        args: mlx-lm's arguments: `data` (a folder with train, valid and test.jsonl, or a data set
            of the Hugging Face Hub) or `hf_dataset`, `train` and `test`.

    Raises:
        UserError: If an argument is missing or wrong.
    """
    for key in FEATURES:
        if not isinstance(name := getattr(args, key, ""), str):
            raise UserError(f"{key} is {shown(name)}, expected the name of a column.")
    if (chosen := getattr(args, "hf_dataset", None)) is not None:
        for one in chosen if isinstance(chosen, list) else [chosen]:
            check_keys("hf_dataset", one, HUB_KEYS)
            if not isinstance(options := one.get("config") or {}, dict):
                raise UserError(
                    f"hf_dataset: config is {shown(options)}, expected names with values."
                )
            for key in ("path", "test_split") if args.test else ("path",):
                if not isinstance(one.get(key), str):
                    raise UserError(f"hf_dataset: {key} is {shown(one.get(key))}, expected a name.")
        return
    if not args.data:
        raise UserError("--data is missing: a folder with train.jsonl, or a data set of the Hub.")
    folder = Path(args.data).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{folder}: a file; expected the folder that train.jsonl is in.")
    elif not REPOSITORY.fullmatch(args.data):
        raise UserError(f"{folder}: no such folder (a data set of the Hub is written owner/name).")


def read_examples(args: Any, tokenizer: Any) -> dict[str, Documents]:
    """Read and tokenize the data set of the arguments.

    Args:
        args: As for `check_data`, and `mask_prompt` and the names of columns.
        tokenizer: mlx-lm's `TokenizerWrapper`.

    Returns:
        The documents of "train", "valid" and "test", which may be empty.

    Raises:
        UserError: If the data set is missing or not in one of the formats.
    """
    check_data(args)
    folder = Path(args.data or "").expanduser()
    if getattr(args, "hf_dataset", None) is not None or not folder.exists():
        sets = _download(args, tokenizer)
    else:
        sets = [_read_file(folder / f"{split}.jsonl", args, tokenizer) for split in SPLITS]
    documents = {
        split: _documents(found, tokenizer) for split, found in zip(SPLITS, sets, strict=True)
    }
    for split in SPLITS:
        if split != "valid" and getattr(args, split, False) and not len(documents[split]):
            raise UserError(f"{folder}: holds no {split}.jsonl with examples.")
    return documents


@dataclass(frozen=True)
class _Set:
    """One of mlx-lm's data sets, or an empty one, and the place of each example for messages."""

    examples: Any
    place: Callable[[int], str]


def _download(args: Any, tokenizer: Any) -> list[_Set]:
    from mlx_lm.tuner.datasets import load_dataset

    custom = getattr(args, "hf_dataset", None) is not None
    name = "hf_dataset" if custom else f"{args.data}: no such folder, and as a data set of the Hub"
    try:
        with _quiet():
            sets = load_dataset(args, tokenizer)
    except ImportError as error:
        raise UserError(f"{name}: needs another package: pip install datasets.") from error
    except Exception as error:  # the Hub's library raises many types
        raise UserError(f"{name}: cannot be loaded ({reason(error).rstrip('.')}).") from error
    return [
        _Set(_plain(found, tokenizer), partial(_number_in, split))
        for split, found in zip(SPLITS, sets, strict=True)
    ]


def _number_in(split: str, number: int) -> str:
    return f"{split}: example {number + 1}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the Hub library's line for each retry."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_file(path: Path, args: Any, tokenizer: Any) -> _Set:
    """Read a file of JSON lines."""
    from mlx_lm.tuner.datasets import create_dataset

    numbers: list[int] = []
    found = _Set([], lambda number: f"{path}: line {numbers[number]}")
    if not path.exists():
        return found
    examples: list[dict[str, Any]] = []
    for number, line in read_lines(path):
        example = parse_object(f"{path}: line {number}", line)
        if examples and (lacking := [key for key in examples[0] if key not in example]):
            raise UserError(
                f"{path}: line {number} lacks keys of the first line: {shortened(lacking)}."
            )
        examples.append(example)
        numbers.append(number)
    if not examples:
        return found
    try:
        return _Set(_plain(create_dataset(examples, tokenizer, args), tokenizer), found.place)
    except ValueError as error:
        if "masking" in str(error):
            raise UserError("--mask-prompt needs chats or completions; texts have none.") from error
        raise UserError(
            f"{path}: examples have {shortened(examples[0])}; expected messages, prompt and"
            " completion, or text."
        ) from error


def _plain(examples: Any, tokenizer: Any) -> Any:
    """Without a chat template, concatenate prompts and completions."""
    from mlx_lm.tuner.datasets import CompletionsDataset, ConcatenatedDataset

    if isinstance(examples, ConcatenatedDataset):
        return ConcatenatedDataset([_plain(part, tokenizer) for part in examples._data])
    if isinstance(examples, CompletionsDataset) and not tokenizer.has_chat_template:
        return PlainCompletions(examples)
    return examples


class PlainCompletions:
    """Prompts and completions for a model without chat template: one text with an end token.

    Args:
        examples: mlx-lm's data set.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]

    def process(self, example: Any) -> tuple[list[int], int]:
        """Return the tokens, and the length of the prompt if it is masked, else 0."""
        own, tokenizer = self.examples, self.examples.tokenizer
        prompt = tokenizer.encode(example[own.prompt_key])
        completion = tokenizer.encode(example[own.completion_key], add_special_tokens=False)
        tokens = [*prompt, *completion, tokenizer.eos_token_id]
        return tokens, len(prompt) if own.mask_prompt else 0


def _documents(found: _Set, tokenizer: Any) -> Documents:
    tokens, first_targets = [], []
    for number in range(len(found.examples)):
        example = found.examples[number]
        if problem := _problem(found.examples, example, tokenizer):
            raise UserError(f"{found.place(number)}: {problem}.")
        try:
            ids, offset = found.examples.process(example)
        except Exception as error:  # chat templates raise exceptions of any type
            raise UserError(f"{found.place(number)}: cannot be used ({reason(error)}).") from error
        tokens.append(ids)
        first_targets.append(max(offset, 1))
    return Documents.of(tokens, first_targets)


def _problem(examples: Any, example: Any, tokenizer: Any) -> str:
    """Return the problem of an example, or an empty text."""
    from mlx_lm.tuner.datasets import ChatDataset, ConcatenatedDataset, TextDataset

    if isinstance(examples, ConcatenatedDataset):
        examples = examples._data[example["_dataset"]]
    if isinstance(examples, PlainCompletions):
        examples = examples.examples
    if isinstance(examples, ChatDataset):
        messages = example.get(examples.chat_key)
        if not _are_messages(messages):
            return f"{examples.chat_key} is {shown(messages)}, expected messages with their roles"
        if not tokenizer.has_chat_template:
            return "a chat, but the tokenizer has no chat template; give prompts with completions"
        return ""
    texts = isinstance(examples, TextDataset)
    keys = [examples.text_key] if texts else [examples.prompt_key, examples.completion_key]
    wrong = [key for key in keys if not isinstance(example.get(key), str)]
    return f"{wrong[0]} is {shown(example.get(wrong[0]))}, expected text" if wrong else ""


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )
