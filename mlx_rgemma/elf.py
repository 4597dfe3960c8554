"""What a Linux shared library offers and uses, read from its file without running any of it.

Sections of the ELF format (System V gABI, chapters 4 and 5): 64 bits, little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

RELA, DYNSYM = 4, 11
"""Types of sections: relocations with addends, symbols for the dynamic linker."""

_HEADER = struct.Struct("<16x8xQQQ4xHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def defined_symbols(path: str | os.PathLike[str], names: Iterable[str]) -> set[str]:
    """Which of these names a library defines for others; none if it is no library of that kind.

    Raises:
        OSError: If the file cannot be read.
    """
    wanted = set(names)
    with _Library(path) as library:
        return {name for name, _, section in library.symbols(wanted) if section}


def import_slots(path: str | os.PathLike[str], name: str) -> list[int]:
    """Where a library keeps the address of a function that it takes from others.

    Returns:
        Offsets from where the library is loaded.

    Raises:
        OSError: If the file cannot be read.
    """
    with _Library(path) as library:
        indices = {index for _, index, section in library.symbols({name}) if not section}
        return library.relocations(indices) if indices else []


class _Library:
    """An open file and its sections."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> _Library:
        with open(self.path, "rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            self.data: mmap.mmap | bytes = (
                b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        self.sections = list(self._read_sections())
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.data, mmap.mmap):
            self.data.close()

    def _read_sections(self) -> Iterator[_Section]:
        # 64 bits, little-endian: x86-64 and aarch64 as MLX has wheels for them.
        if self.data[:6] != b"\x7fELF\x02\x01" or len(self.data) < _HEADER.size:
            return
        *_, start, _, _, _, size, count, _ = _HEADER.unpack_from(self.data)
        if size != _SECTION.size or start + count * size > len(self.data):
            return
        for i in range(count):
            section = _Section(*_SECTION.unpack_from(self.data, start + i * size))
            if section.type in (RELA, DYNSYM) and self._holds(section):
                yield section
            else:
                yield section._replace(type=0)

    def _holds(self, section: _Section) -> bool:
        return section.offset + section.size <= len(self.data)

    def symbols(self, names: set[str]) -> Iterator[tuple[str, int, int]]:
        """Name, index and section (0: not its own) of the dynamic symbols so named."""
        for table in self.sections:
            if table.type != DYNSYM or table.link >= len(self.sections):
                continue
            strings = self.sections[table.link]
            if not self._holds(strings):
                continue
            places = dict(self._places(strings, names))
            entries = self.data[table.offset : table.offset + table.size]
            entries = entries[: len(entries) // _SYMBOL.size * _SYMBOL.size]
            for index, symbol in enumerate(_SYMBOL.iter_unpack(entries)):
                if symbol[0] in places:
                    yield places[symbol[0]], index, symbol[3]

    def _places(self, strings: _Section, names: set[str]) -> Iterator[tuple[int, str]]:
        """Every place of the strings from which a symbol might take one of the names."""
        end = strings.offset + strings.size
        for name in names:
            text = name.encode() + b"\0"
            place = self.data.find(text, strings.offset, end)
            while place >= 0:
                yield place - strings.offset, name
                place = self.data.find(text, place + 1, end)

    def relocations(self, symbols: set[int]) -> list[int]:
        """Offsets that the dynamic linker fills with the addresses of these symbols."""
        found = []
        for table in self.sections:
            if table.type != RELA:
                continue
            entries = self.data[table.offset : table.offset + table.size]
            entries = entries[: len(entries) // _RELOCATION.size * _RELOCATION.size]
            found += [
                offset
                for offset, info, _ in _RELOCATION.iter_unpack(entries)
                if info >> 32 in symbols
            ]
        return found
