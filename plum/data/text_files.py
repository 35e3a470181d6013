"""Reading text files that may be compressed, with errors that name the file and the line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from plum.errors import InvalidData

_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}
SUFFIXES = ("", *_DECOMPRESS)


def find_file(folder: str | Path, stem: str) -> Path:
    """Returns ``folder/stem``, plain or with one of the suffixes .gz, .xz and .bz2.

    Raises:
        InvalidData: The folder or the file is not there.
    """
    path = find_optional(folder, stem)
    if path is None:
        names = ", ".join(f"{stem}{suffix}" for suffix in SUFFIXES)
        raise InvalidData(folder, f"one of the files {names}", "none of them")
    return path


def find_optional(folder: str | Path, stem: str) -> Path | None:
    """Returns what :func:`find_file` returns, or None when there is no such file.

    Raises:
        InvalidData: The folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidData(folder, "a folder", "no such folder")
    candidates = (folder / f"{stem}{suffix}" for suffix in SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def read_bytes(path: str | Path) -> bytes:
    """Returns what a file holds, decompressed as its suffix (.gz, .xz, .bz2) says.

    Raises:
        InvalidData: The file is absent, unreadable, cut off or not what its suffix says.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidData(path, "a readable file", error.strerror or error) from None
    decompress = _DECOMPRESS.get(path.suffix)
    if decompress is None:
        return data
    try:
        return decompress(data)
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        expected = f"a whole {path.suffix} file"
        raise InvalidData(path, expected, f"damaged data: {error}", "copy it again") from None


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """Returns the text of a file that may be compressed; a byte order mark is dropped.

    Raises:
        InvalidData: As :func:`read_bytes`, or the bytes are not ``encoding``; the message gives
            the line and the byte.
    """
    return decode(path, read_bytes(path), encoding)


def decode(path: str | Path, data: bytes, encoding: str = "utf-8") -> str:
    """Returns ``data``, read from ``path``, as text.

    Raises:
        InvalidData: The bytes are not ``encoding``; the message gives the line and the byte.
    """
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidData(
            f"{path}, line {line}",
            f"{encoding.upper()} text",
            f"byte 0x{data[error.start]:02x} at offset {error.start}",
            f"convert the file to {encoding.upper()}",
        ) from None
