"""Long texts are cut into pieces that have the tokens of the whole, in bounded memory."""

from __future__ import annotations

import io
import random
import tracemalloc

import pytest

from mlx_rgemma import load
from mlx_rgemma.io.text import read_documents
from mlx_rgemma.tokenizers.chunked import ChunkedTokenizer


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.mark.parametrize("piece", [1, 2, 5, 16, 100])
def test_the_pieces_of_a_text_have_the_tokens_of_the_whole(embedded, piece):
    _, tokenizer = embedded
    pieces = ChunkedTokenizer(tokenizer, chunk=piece)
    rng = random.Random(piece)
    stories = "\n\n".join(read_documents())
    for n in range(60):
        length, at = rng.randint(1, 300), rng.randrange(len(stories))
        noise = "".join(rng.choice("ab .\n  é\t-\"'<s></s>") for _ in range(length))
        text = noise if n % 2 else stories[at : at + length]
        bos = text.startswith(tokenizer.bos_token)
        expected = list(tokenizer.encode(text, add_special_tokens=not bos))
        for source in (text, io.StringIO(text)):
            found = [t for tokens in pieces.tokens(source, begin=True) for t in tokens]
            assert found == expected


@pytest.mark.parametrize("spaces", ["before", "around"])
def test_the_pieces_of_a_tokenizer_that_looks_at_the_whole_text(spaces):
    """As Gemma's: no rule splits the text before pairs are merged; spaces and newlines pile up."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁cat", "the", "cat", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<bos>"]
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("▁", "the"), ("▁", "cat")]
    merges += [("▁", "▁"), ("▁▁", "▁▁"), ("\n", "\n"), ("\n\n", "\n")]
    if spaces == "around":  # a token that goes on over the end of a word
        words.append("e▁")
        merges.insert(0, ("e", "▁"))
    vocab = [*"theca▁\n.", "th", "ca", *words]
    fast = Tokenizer(models.BPE({w: i for i, w in enumerate(vocab)}, merges, unk_token="."))
    fast.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<bos>")
    rng = random.Random(0)
    for n in range(200):
        text = "".join(rng.choice(["the", "cat", " ", "\n", "  ", "."]) for _ in range(40))
        expected = tokenizer.encode(text)
        found = list(ChunkedTokenizer(tokenizer, chunk=n % 9 + 1).tokens(text, begin=True))
        assert [t for tokens in found for t in tokens] == expected
        assert len(found) > 1


class Endless(io.TextIOBase):
    """A text file of many megabytes that takes no room."""

    name = "endless.txt"

    def __init__(self, characters: int, text: str = "The cat sat. ") -> None:
        self.left, self.text = characters, text

    def read(self, size: int = -1) -> str:
        text = (self.text * (size // len(self.text) + 1))[: min(size, self.left)]
        self.left -= len(text)
        return text


@pytest.mark.parametrize("text", ["The cat sat. ", "x"], ids=["words", "no-space"])
def test_a_file_of_any_size_needs_no_more_memory(embedded, text):
    _, tokenizer = embedded
    pieces = ChunkedTokenizer(tokenizer, chunk=1 << 12, max_chunk=1 << 13)

    def peak(characters: int) -> int:
        tracemalloc.start()
        total = sum(len(t) for t in pieces.tokens(Endless(characters, text), begin=True))
        assert total > characters // 10
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10_000)
    assert peak(400_000) < 1.5 * peak(40_000)
