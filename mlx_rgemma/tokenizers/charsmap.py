"""SentencePiece's map of characters, checked before the `tokenizers` library follows it.

The map is a double-array trie and the texts that its leaves point at. The library follows both
without a check of bounds and stops with a panic where they lead out.
"""

from __future__ import annotations

import numpy as np

LEAF = 1 << 31
"""The bit of a unit that holds a value, the position of a text."""


def charsmap_problem(charsmap: bytes) -> str | None:
    """Return what is wrong with a precompiled map of characters, if anything.

    Args:
        charsmap: Four bytes of size, the trie of this size, and texts that end with zeros.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or not 0 < size <= len(charsmap) - 4:
        return "a trie that is cut off"
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = charsmap[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        return "texts that are not UTF-8"
    positions = np.arange(len(units))
    # As Darts-clone packs a unit: an offset of 21 bits, shifted by 8 if bit 9 is set.
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    inner = units & LEAF == 0
    children = (positions ^ offsets) | 255
    if inner.any() and int(children[inner].max()) >= len(units):
        return "a trie that leads out of itself"
    starts = units[~inner] & (LEAF - 1)
    if starts.size and int(starts.max()) >= len(texts):
        return "a trie that leads out of its texts"
    content = np.frombuffer(texts, np.uint8)
    if starts.size and (content[starts] & 0xC0 == 0x80).any():
        return "a trie that leads into the middle of a character"
    return None
