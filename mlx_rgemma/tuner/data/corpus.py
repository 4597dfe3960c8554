"""Text files for pre-training: documents, weights, and the validation split."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlx_rgemma.errors import UserError
from mlx_rgemma.io.atomic import gigabytes
from mlx_rgemma.io.reading import open_regular
from mlx_rgemma.tuner.memory_estimate import physical_memory

SUFFIXES = (".txt", ".txt.xz")


@dataclass(frozen=True)
class Source:
    """A source of text.

    Attributes:
        name: Its file or folder.
        weight: Its share of the training tokens, relative to the sum of all weights.
        documents: Its documents.
    """

    name: str
    weight: float
    documents: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its documents in UTF-8."""
        return sum(len(document.encode()) for document in self.documents)


def read_source(place: str, *, whole_files: bool = False) -> Source:
    """Read a source of the command line.

    Args:
        place: A `.txt` or `.txt.xz` file, or a folder of them; ``PLACE=WEIGHT`` sets a weight
            other than its size in bytes.
        whole_files: Each file is one document; otherwise blank lines separate documents.

    Raises:
        UserError: If there is no such file or folder, or it holds no UTF-8 text.
    """
    name, weight = _split_weight(place)
    path = Path(name).expanduser()
    files = _files(path)
    documents = tuple(d for file in files for d in _documents(file, whole_files))
    if not documents:
        raise UserError(f"{path}: holds no text.")
    found = Source(name, weight or 0.0, documents)
    return found if weight is not None else Source(name, float(found.nbytes), documents)


def split_validation(source: Source, fraction: float) -> tuple[Source, tuple[str, ...]]:
    """Split off validation documents, chosen by a hash of their text: the same in every run.

    Args:
        source: The source.
        fraction: Fraction of documents to split off; at least one of several documents.

    Returns:
        The training source and the validation documents.
    """
    hashes = [zlib.crc32(document.encode()) for document in source.documents]
    border = fraction * 2**32
    if len(set(hashes)) > 1:
        border = max(border, min(hashes) + 1)
    validation = [d for d, found in zip(source.documents, hashes, strict=True) if found < border]
    training = [d for d, found in zip(source.documents, hashes, strict=True) if found >= border]
    if not training:
        raise UserError(f"{source.name}: nothing is left to train on; lower --valid-fraction.")
    return Source(source.name, source.weight, tuple(training)), tuple(validation)


def digest(documents: Iterable[str | bytes]) -> str:
    """Return a short fingerprint of texts."""
    found = hashlib.sha256()
    for document in documents:
        data = document.encode() if isinstance(document, str) else document
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()[:16]


def _split_weight(place: str) -> tuple[str, float | None]:
    name, equals, weight = place.rpartition("=")
    if not equals or Path(place).expanduser().exists():
        return place, None
    try:
        value = float(weight)
    except ValueError:
        return place, None
    if not 0 < value < float("inf"):
        raise UserError(f"{place}: the weight is {weight}, expected a number above 0.")
    return name, value


def _files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES) and f.is_file())
        if not files:
            raise UserError(f"{path}: holds no {' or '.join(SUFFIXES)} file.")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    return [path]


def _documents(file: Path, whole: bool) -> list[str]:
    limit = physical_memory() // 4
    with open_regular(file) as raw:
        # Decompress up to a limit: a small file may expand beyond memory.
        packed = file.suffix == ".xz"
        try:
            with lzma.LZMAFile(raw) if packed else nullcontext(raw) as stream:
                data = stream.read(limit + 1)
            if len(data) > limit:
                raise UserError(
                    f"{file}: holds more than a quarter of this machine's memory,"
                    f" {gigabytes(limit)}; split it, and train on a part."
                )
            text = data.decode()
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n")
            raise UserError(
                f"{file}: not UTF-8 text ({error.reason} in line {before + 1})."
            ) from error
        except (lzma.LZMAError, EOFError) as error:
            raise UserError(f"{file}: not an xz file, or damaged.") from error
    parts = [text] if whole else text.replace("\r\n", "\n").split("\n\n")
    return [part.strip() for part in parts if part.strip()]
