"""Data sets to fine-tune on, in mlx-lm's formats: chats, prompts with completions, texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import UserError
from mlx_rgemma.tuner.packing import Documents

SPLITS = ("train", "valid", "test")


def read_examples(args: Any, tokenizer: Any) -> dict[str, Documents]:
    """Read and tokenize the data set that the arguments name.

    Args:
        args: mlx-lm's arguments: `data` (a folder with train, valid and test.jsonl, or a data set
            of the Hugging Face Hub) or `hf_dataset`, `train`, `test`, `mask_prompt`, and the names
            of features.
        tokenizer: mlx-lm's `TokenizerWrapper`.

    Returns:
        The documents of "train", "valid" and "test"; none where the set has none.

    Raises:
        UserError: If there is no such data, or it is not in one of the formats.
    """
    if not getattr(args, "hf_dataset", None) and not args.data:
        raise UserError("--data is missing: a folder with train.jsonl, or a data set of the Hub.")
    folder = Path(args.data or "").expanduser()
    if getattr(args, "hf_dataset", None) or not folder.exists():
        sets = _download(args, tokenizer)
    else:
        sets = [_read_file(folder / f"{split}.jsonl", args, tokenizer) for split in SPLITS]
    documents = {split: _documents(s, split) for split, s in zip(SPLITS, sets, strict=True)}
    for split in SPLITS:
        if split != "valid" and getattr(args, split, False) and not len(documents[split]):
            raise UserError(f"{folder}: holds no {split}.jsonl with examples.")
    return documents


def _download(args: Any, tokenizer: Any) -> Sequence[Any]:
    from mlx_lm.tuner.datasets import load_dataset

    name = args.data if not getattr(args, "hf_dataset", None) else "hf_dataset"
    try:
        sets: Sequence[Any] = load_dataset(args, tokenizer)
    except ImportError as error:
        raise UserError(
            f"{name}: no such folder; a data set of the Hub needs pip install datasets."
        ) from error
    except Exception as error:  # whatever the Hub and its library find wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}: no such folder, nor a data set of the Hub ({reason}).") from error
    return [_plain(s, tokenizer) for s in sets]


def _read_file(path: Path, args: Any, tokenizer: Any) -> Any:
    """One file of JSON lines as one of mlx-lm's data sets."""
    from mlx_lm.tuner.datasets import create_dataset

    if not path.exists():
        return []
    examples: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON.") from error
        if not isinstance(example, dict) or (examples and set(examples[0]) - set(example)):
            wanted = ", ".join(examples[0]) if examples else "a JSON object"
            raise UserError(f"{path}: line {number} lacks what the first has: {wanted}.")
        examples.append(example)
    if not examples:
        return []
    try:
        return _plain(create_dataset(examples, tokenizer, args), tokenizer)
    except ValueError as error:
        if "masking" in str(error):
            raise UserError("--mask-prompt needs chats or completions; texts have none.") from error
        raise UserError(
            f"{path}: examples have {', '.join(examples[0])}; expected messages, prompt and"
            " completion, or text."
        ) from error


def _plain(examples: Any, tokenizer: Any) -> Any:
    """Without a chat template, a completion simply follows its prompt."""
    from mlx_lm.tuner.datasets import CompletionsDataset

    if isinstance(examples, CompletionsDataset) and not tokenizer.has_chat_template:
        return PlainCompletions(examples)
    return examples


class PlainCompletions:
    """Prompts and completions for a model that knows no chats: one text, and an end of it.

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
        """-> tokens, and how many of them are the prompt's (0 if the prompt counts, too)."""
        own, tokenizer = self.examples, self.examples.tokenizer
        prompt = tokenizer.encode(example[own.prompt_key])
        completion = tokenizer.encode(example[own.completion_key], add_special_tokens=False)
        tokens = [*prompt, *completion, tokenizer.eos_token_id]
        return tokens, len(prompt) if own.mask_prompt else 0


def _documents(examples: Any, split: str) -> Documents:
    tokens, first_targets = [], []
    for number in range(len(examples)):
        try:
            found, offset = examples.process(examples[number])
        except Exception as error:  # chat templates are programs of their own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{split}: example {number + 1} is not one ({reason}).") from error
        tokens.append(found)
        first_targets.append(max(offset, 1))
    return Documents.of(tokens, first_targets)
