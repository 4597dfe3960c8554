"""Conversion of a SentencePiece model to a `tokenizer.json` with the same tokens.

Google's archives have a `tokenizer.model` only, but mlx-lm, transformers and the streaming
detokenizer run the `tokenizers` library. transformers' own converter needs one of its tokenizer
classes, and fails on a bare file (5.24: `SpmConverter` has no kind of model to extract).
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from mlx_rgemma.errors import CheckpointError, shown
from mlx_rgemma.io.reading import read_limited
from mlx_rgemma.tokenizers.charsmap import charsmap_problem
from mlx_rgemma.tokenizers.check import MAX_SENTENCEPIECE_BYTES

MAX_PIECES = 1_000_000
MAX_PIECE = 500
"""Characters of a piece."""

SPACE = "▁"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
UNIGRAM, BPE = 1, 2
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('this model knows no system role') }}"
    "{% elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns, the user first') }}"
    "{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma's chat format, with which RecurrentGemma's instruction-tuned models were trained."""


def convert_sentencepiece(path: Path, *, chat: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert a SentencePiece model to the format of the `tokenizers` library.

    Args:
        path: A `tokenizer.model`.
        chat: Whether to add Gemma's chat template, if the vocabulary has its two tokens.

    Returns:
        The contents of `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        CheckpointError: If the file is not a SentencePiece model, or of a kind that the
            `tokenizers` library cannot express.
    """
    proto = _read(path)
    pieces = [piece.piece for piece in proto.pieces]
    if len(set(pieces)) != len(pieces):
        raise CheckpointError(f"{path}: damaged: a piece occurs twice; download it again.")
    special = _special_tokens(path, proto)
    as_words = _user_defined_words(proto)
    turns = chat and {START_OF_TURN, END_OF_TURN} <= {
        piece.piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto, special, as_words),
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": _pre_tokenizer(as_words),
        "post_processor": _post_processor(special.get("bos_token"), pieces),
        "decoder": _decoder(proto.normalizer_spec),
        "model": _model(proto, special["unk_token"]),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": "bos_token" in special,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 10**30,
    }
    if turns:
        config["chat_template"] = CHAT_TEMPLATE
    return tokenizer, config


def _read(path: Path) -> Any:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(read_limited(path, MAX_SENTENCEPIECE_BYTES))
    except DecodeError:
        raise CheckpointError(f"{path}: not a SentencePiece model; download it again.") from None
    if not proto.pieces or not proto.HasField("trainer_spec"):
        raise CheckpointError(f"{path}: not a SentencePiece model; download it again.")
    if len(proto.pieces) > MAX_PIECES:
        raise CheckpointError(
            f"{path}: {len(proto.pieces):,} pieces, expected up to {MAX_PIECES:,}."
        )
    for number, piece in enumerate(proto.pieces):
        # protobuf returns bytes for text that is not UTF-8.
        if not isinstance(piece.piece, str) or not 0 < len(piece.piece) <= MAX_PIECE:
            raise CheckpointError(
                f"{path}: damaged: piece {number} is {shown(piece.piece)}; download it again."
            )
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(
            f"{path}: a SentencePiece model of kind {proto.trainer_spec.model_type}; only BPE (2)"
            " and unigram (1) can be read."
        )
    charsmap = proto.normalizer_spec.precompiled_charsmap
    if charsmap and (problem := charsmap_problem(charsmap)):
        raise CheckpointError(
            f"{path}: damaged: a precompiled_charsmap with {problem}; download it again."
        )
    return proto


def _special_tokens(path: Path, proto: Any) -> dict[str, str]:
    spec = proto.trainer_spec
    ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    found = {
        f"{name}_token": proto.pieces[i].piece
        for name, i in ids.items()
        if 0 <= i < len(proto.pieces)
    }
    if "unk_token" not in found:
        raise CheckpointError(f"{path}: has no token for unknown text; download it again.")
    return found


def _user_defined_words(proto: Any) -> list[str]:
    """Return the user-defined symbols to split off before BPE, as separate words.

    If SentencePiece inserts a space before the text, an added token inserts one after itself too. A
    symbol of one character needs no merges, so it can be an ordinary word instead.
    """
    if not proto.normalizer_spec.add_dummy_prefix or proto.trainer_spec.model_type != BPE:
        return []
    return [p.piece for p in proto.pieces if p.type == USER_DEFINED and len(p.piece) == 1]


def _added_tokens(proto: Any, special: dict[str, str], words: list[str]) -> list[dict[str, Any]]:
    hidden = {*special.values(), START_OF_TURN, END_OF_TURN}
    return [
        {
            "id": i,
            "content": piece.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # A symbol with spaces is found only after they are replaced by SentencePiece's.
            "normalized": SPACE in piece.piece,
            "special": piece.type == CONTROL or piece.piece in hidden,
        }
        for i, piece in enumerate(proto.pieces)
        if piece.piece in special.values()
        or (piece.type in (CONTROL, USER_DEFINED) and piece.piece not in words)
    ]


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append(_replace({"Regex": r"\A +| +\z"}, ""))
        steps.append(_replace({"Regex": " {2,}"}, " "))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace({"String": " "}, SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _pre_tokenizer(words: list[str]) -> dict[str, Any] | None:
    if not words:
        return None
    pattern = {"Regex": "|".join(re.escape(word) for word in words)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def _post_processor(bos: str | None, pieces: list[str]) -> dict[str, Any] | None:
    if bos is None:
        return None
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], first, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [pieces.index(bos)], "tokens": [bos]}},
    }


def _decoder(spec: Any) -> dict[str, Any]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _model(proto: Any, unknown: str) -> dict[str, Any]:
    spec = proto.trainer_spec
    if spec.model_type == UNIGRAM:
        return {
            "type": "Unigram",
            "unk_id": spec.unk_id,
            "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
            "byte_fallback": spec.byte_fallback,
        }
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    letters = _byte_letters(proto, vocabulary) if spec.byte_fallback else {}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {**vocabulary, **letters},
        "merges": _merges(proto, vocabulary.keys() | letters.keys()),
    }


def _byte_letters(proto: Any, vocabulary: dict[str, int]) -> dict[str, int]:
    """Return ASCII characters that occur in longer pieces only: alone they are a byte token."""
    letters = {c for piece in proto.pieces if piece.type == NORMAL for c in piece.piece}
    return {
        c: vocabulary[f"<0x{ord(c):02X}>"]
        for c in sorted(letters)
        if c not in vocabulary and c.isascii() and f"<0x{ord(c):02X}>" in vocabulary
    }


def _merges(proto: Any, parts: Any) -> list[list[str]]:
    """Return all pairs that merge to a piece, by descending score of the piece."""
    ranked = sorted(
        ((-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == NORMAL)
    )
    merges = []
    for _, i in ranked:
        piece = proto.pieces[i].piece
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in parts and right in parts:
                merges.append([left, right])
    return merges
