"""Fast loading of a simple tokenizer, with the `tokenizers` library alone.

mlx-lm's wrapper needs transformers, whose import takes longer than everything else before the first
token. A `tokenizer.json` whose configuration has only the usual special tokens needs no wrapper; it
is loaded when an attribute is used that `FastTokenizer` does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlx_rgemma.io.reading import read_json
from mlx_rgemma.tokenizers.check import read_tokenizer

SPACE = "▁"
OPTIONS = {
    "tokenizer_class": ("PreTrainedTokenizerFast",),
    "add_bos_token": (True,),
    "add_eos_token": (False,),
    "clean_up_tokenization_spaces": (False,),
}
"""Settings of a simple tokenizer, and their values."""

WITHOUT_EFFECT = ("padding_side", "model_max_length")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MORE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files with more settings, which need the wrapper."""

_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class FastTokenizer:
    """The part of mlx-lm's `TokenizerWrapper` that generation uses; it loads the rest on demand.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        special: Special tokens by name ("bos_token" and so on).
        eos_token_ids: Tokens that end a text, besides the end-of-text token.
        strip: Whether decoding removes the first space of a text.
        wrapper: Loads the wrapper.
    """

    has_chat_template = False

    def __init__(
        self,
        tokenizer: Any,
        special: dict[str, str],
        eos_token_ids: Iterable[int],
        strip: bool,
        wrapper: Callable[[], Any],
    ) -> None:
        self._tokenizer, self._wrapper, self._loaded = tokenizer, wrapper, None
        self.bos_token, self.eos_token = special["bos_token"], special["eos_token"]
        self.bos_token_id: int = tokenizer.token_to_id(self.bos_token)
        self.eos_token_id: int = tokenizer.token_to_id(self.eos_token)
        self.eos_token_ids = {*eos_token_ids, self.eos_token_id}
        pieces = map(tokenizer.id_to_token, range(len(self)))
        self._detokenizer = Detokenizer([_characters(piece) for piece in pieces], strip)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if self._loaded is None:
            self._loaded = self._wrapper()
        return getattr(self._loaded, name)

    @property
    def detokenizer(self) -> Detokenizer:
        """A new detokenizer."""
        return Detokenizer(self._detokenizer.pieces, self._detokenizer.strip)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, with the beginning-of-text token by default."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(found.ids)

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        return dict(self._tokenizer.get_vocab())

    def get_added_vocab(self) -> dict[str, int]:
        """Return the id of each special token."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def add_eos_token(self, token: str) -> None:
        """Add a token that ends a text.

        Args:
            token: The token, or its id.

        Raises:
            ValueError: If there is no such token.
        """
        number = int(token) if token.isdecimal() else self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{token!r} is not a token for this tokenizer")
        self.eos_token_ids.add(number)


class Detokenizer:
    """Streaming detokenizer with mlx-lm's interface.

    Args:
        pieces: Bytes of each token; some are part of a UTF-8 character.
        strip: Whether to remove the first space of a text.

    Attributes:
        text: The text so far, without an incomplete character.
        tokens: The tokens so far.
        offset: End of the last segment in the text.
    """

    def __init__(self, pieces: list[bytes], strip: bool) -> None:
        self.pieces, self.strip = pieces, strip
        self.text, self.offset, self.tokens = "", 0, list[int]()
        self._held = b""

    def add_token(self, token: int) -> None:
        """Add a token."""
        self.tokens.append(token)
        self._held += self.pieces[token]
        text = self._held.decode("utf-8", "replace")
        if not text.endswith("\ufffd"):
            self._take(text)

    def finalize(self) -> None:
        """Emit the held bytes: there is no further token."""
        self._take(self._held.decode("utf-8", "replace"))

    @property
    def last_segment(self) -> str:
        """The text since the last use of this attribute."""
        segment = self.text[self.offset :]
        self.offset = len(self.text)
        return segment

    def _take(self, text: str) -> None:
        self._held = b""
        self.text += text.removeprefix(" ") if self.strip and not self.text else text


def fast_tokenizer(
    folder: Path, eos_token_ids: Iterable[int], wrapper: Callable[[], Any]
) -> FastTokenizer | None:
    """Load the tokenizer of a folder if it is simple; return None if it needs the wrapper.

    Args:
        folder: The folder.
        eos_token_ids: End-of-text tokens of the model's configuration.
        wrapper: Loads the wrapper.
    """
    from tokenizers import Tokenizer

    try:
        config = read_json(folder / "tokenizer_config.json")
        content = read_tokenizer(folder / "tokenizer.json")
        if any((folder / file).exists() for file in MORE_FILES) or not _is_simple(config, content):
            return None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {name: config[name] for name in SPECIAL_TOKENS}
        if tokenizer.encode("a").ids[:1] != [tokenizer.token_to_id(special["bos_token"])]:
            return None
        strip = content["decoder"]["decoders"][-1] == _STRIP
        return FastTokenizer(tokenizer, special, eos_token_ids, strip, wrapper)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a damaged file, or a Rust panic: loading the wrapper reports it
        return None


def _is_simple(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Return whether there are no settings besides those of a simple tokenizer."""
    if content.get("padding") is not None or content.get("truncation") is not None:
        return False
    if set(config) - {*OPTIONS, *WITHOUT_EFFECT, *SPECIAL_TOKENS}:
        return False
    if any(config.get(name) not in values for name, values in OPTIONS.items()):
        return False
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    if not all(config.get(name) in special for name in SPECIAL_TOKENS):
        return False
    return content["decoder"] in (
        {"type": "Sequence", "decoders": _DECODERS},
        {"type": "Sequence", "decoders": [*_DECODERS, _STRIP]},
    )


def _characters(piece: str) -> bytes:
    """Return the bytes of a token."""
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")
