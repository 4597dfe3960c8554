"""A plain tokenizer, read by the `tokenizers` library alone: a command's text begins sooner.

mlx-lm's wrapper needs transformers, which takes a second or two to import, more than everything
else on the way to the first token. A `tokenizer.json` whose configuration names nothing but the
usual special tokens says all there is to say; for the rest there is still the wrapper.
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
"""Settings that a plain tokenizer has, and their values."""

WITHOUT_EFFECT = ("padding_side", "model_max_length")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MORE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that say more of a tokenizer."""

_DECODERS = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class FastTokenizer:
    """The part of mlx-lm's `TokenizerWrapper` that generation needs; the rest is delegated to it.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        special: The special tokens by their names ("bos_token" and so on).
        eos_token_ids: Tokens that end a text, beside the end-of-text token.
        strip: Whether a text's first space is not part of it.
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
        """A new one."""
        return Detokenizer(self._detokenizer.pieces, self._detokenizer.strip)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, behind the beginning-of-text token unless asked otherwise."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return list(found.ids)

    def get_vocab(self) -> dict[str, int]:
        """Each token's number."""
        return dict(self._tokenizer.get_vocab())

    def get_added_vocab(self) -> dict[str, int]:
        """The special tokens' numbers."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items()}

    def add_eos_token(self, token: str) -> None:
        """Have one more token end a text.

        Args:
            token: The token, or its number.

        Raises:
            ValueError: If there is no such token.
        """
        number = int(token) if token.isdecimal() else self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{token!r} is not a token for this tokenizer")
        self.eos_token_ids.add(number)


class Detokenizer:
    """Text from tokens that come one by one: what mlx-lm's streaming detokenizers offer.

    Args:
        pieces: What each token stands for, in UTF-8; some for a part of a character.
        strip: Whether a text's first space is not part of it.

    Attributes:
        text: The text so far, without a character that is not whole yet.
        tokens: The tokens so far.
        offset: Where in the text the last segment ended.
    """

    def __init__(self, pieces: list[bytes], strip: bool) -> None:
        self.pieces, self.strip = pieces, strip
        self.text, self.offset, self.tokens = "", 0, list[int]()
        self._held = b""

    def add_token(self, token: int) -> None:
        """Take a token."""
        self.tokens.append(token)
        self._held += self.pieces[token]
        text = self._held.decode("utf-8", "replace")
        if not text.endswith("\ufffd"):
            self._take(text)

    def finalize(self) -> None:
        """Take what is held as it is: no token is to come."""
        self._take(self._held.decode("utf-8", "replace"))

    @property
    def last_segment(self) -> str:
        """The text since this was last asked for."""
        segment = self.text[self.offset :]
        self.offset = len(self.text)
        return segment

    def _take(self, text: str) -> None:
        self._held = b""
        self.text += text.removeprefix(" ") if self.strip and not self.text else text


def plain_tokenizer(
    folder: Path, eos_token_ids: Iterable[int], wrapper: Callable[[], Any]
) -> FastTokenizer | None:
    """The tokenizer of a folder, if it is plain; None where only the wrapper can tell.

    Args:
        folder: May hold a `tokenizer.json`.
        eos_token_ids: What the model's configuration says.
        wrapper: Loads the wrapper.
    """
    from tokenizers import Tokenizer

    try:
        config = read_json(folder / "tokenizer_config.json")
        content = read_tokenizer(folder / "tokenizer.json")
        if any((folder / file).exists() for file in MORE_FILES) or not _plain(config, content):
            return None
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {name: config[name] for name in SPECIAL_TOKENS}
        if tokenizer.encode("a").ids[:1] != [tokenizer.token_to_id(special["bos_token"])]:
            return None
        strip = content["decoder"]["decoders"][-1] == _STRIP
        return FastTokenizer(tokenizer, special, eos_token_ids, strip, wrapper)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a damaged file, or a panic of Rust's: loading the wrapper says which
        return None


def _plain(config: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether nothing is said but what a plain tokenizer does."""
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
    """What a token stands for, in UTF-8."""
    if piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")
