"""Loading a checkpoint's tokenizer in mlx-lm's wrapper."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import CheckpointError
from mlx_rgemma.io.reading import read_json, reason
from mlx_rgemma.tokenizers.chat_template import limit_rendering
from mlx_rgemma.tokenizers.check import (
    JSON_FILES,
    SENTENCEPIECE,
    TEXT_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_tokenizer_files,
)
from mlx_rgemma.tokenizers.sentencepiece import END_OF_TURN, START_OF_TURN, convert_sentencepiece

TOKENIZER_FILES = (TOKENIZER, SENTENCEPIECE, *JSON_FILES, *TEXT_FILES)
"""Files that a tokenizer may consist of."""

BASE_MODEL = re.compile(r"(recurrentgemma-)?(2b|9b)", re.IGNORECASE)
"""Names of released base models: they know the tokens of a chat, but were not trained on chats."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return (folder / TOKENIZER).is_file() or (folder / SENTENCEPIECE).is_file()


def load_tokenizer(
    folder: str | os.PathLike[str], eos_token_ids: Iterable[int] = (), *, name: str = ""
) -> Any:
    """Load the tokenizer of a folder.

    It begins every text with the beginning-of-text token, which RecurrentGemma needs, and stops on
    `eos_token_ids`, its end-of-text token and, with a chat template, the end of a turn.

    Args:
        folder: Folder of `tokenizer.json`, or of a SentencePiece `tokenizer.model`, which gets a
            chat template if it knows turns and its model is not a released base model.
        eos_token_ids: End-of-text tokens of the model's configuration.
        name: Name of the model, if it is not that of the folder.

    Returns:
        mlx-lm's `TokenizerWrapper`.

    Raises:
        CheckpointError: If there is no tokenizer, or it is damaged.
    """
    folder = Path(folder)
    check_tokenizer_files(folder)
    if (folder / TOKENIZER).is_file():
        tokenizer = _load(folder, folder / TOKENIZER, eos_token_ids)
    elif (folder / SENTENCEPIECE).is_file():
        with tempfile.TemporaryDirectory() as converted:
            write_converted(folder, Path(converted), name=name)
            tokenizer = _load(Path(converted), folder / SENTENCEPIECE, eos_token_ids)
    else:
        raise CheckpointError(
            f"{folder}: no tokenizer: neither {TOKENIZER} nor {SENTENCEPIECE}; download it too, or"
            " use load_model for a model without tokenizer."
        )
    if tokenizer.has_chat_template:
        _stop_at_end_of_turn(tokenizer)
    return tokenizer


def write_converted(folder: Path, target: Path, *, name: str = "") -> None:
    """Convert a `tokenizer.model` to `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        CheckpointError: If the SentencePiece model is damaged.
    """
    own_config = folder / TOKENIZER_CONFIG
    chat = not BASE_MODEL.fullmatch(name or folder.resolve().name)
    tokenizer, config = convert_sentencepiece(folder / SENTENCEPIECE, chat=chat)
    if own_config.is_file():
        # The publisher's settings take precedence, but for the class, which reads other files.
        stated = read_json(own_config)
        config = {**stated, **{k: v for k, v in config.items() if k not in stated}}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for file, values in ((TOKENIZER, tokenizer), (TOKENIZER_CONFIG, config)):
        text = json.dumps(values, ensure_ascii=False, indent=None if file == TOKENIZER else 2)
        (target / file).write_text(text, encoding="utf-8")


def _load(folder: Path, origin: Path, eos_token_ids: Iterable[int]) -> Any:
    from mlx_lm import tokenizer_utils

    try:
        tokenizer = tokenizer_utils.load(folder, eos_token_ids=list(eos_token_ids))
        _begin_with_bos(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        why = reason(error)
        raise CheckpointError(f"{origin}: not a tokenizer that can be read: {why}") from error
    limit_rendering(tokenizer._tokenizer)
    return tokenizer


def _begin_with_bos(tokenizer: Any) -> None:
    """Make a tokenizer add the beginning-of-text token, whatever its files say."""
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer.encode("a")[:1] != [bos]:
        tokenizer.add_bos_token = True


def _stop_at_end_of_turn(tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    if START_OF_TURN in vocabulary and END_OF_TURN in vocabulary:
        tokenizer.add_eos_token(END_OF_TURN)
