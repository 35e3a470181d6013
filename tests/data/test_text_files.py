from __future__ import annotations

import bz2
import gzip
import lzma

import pytest

from plum.data.text_files import find_file, find_optional, read_bytes, read_text
from plum.errors import InvalidData

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
TEXT = "".join(f"{number}::Amélie {number}\n" for number in range(2000))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_suffix_is_found_and_read(tmp_path, suffix: str) -> None:
    (tmp_path / f"movies.dat{suffix}").write_bytes(COMPRESS[suffix](TEXT.encode()))
    path = find_file(tmp_path, "movies.dat")
    assert path.name == f"movies.dat{suffix}"
    assert read_text(path) == TEXT


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"\n" + b])
def test_damaged_file_is_named(tmp_path, suffix: str, damage) -> None:
    path = tmp_path / f"movies.dat{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](TEXT.encode())))
    with pytest.raises(
        InvalidData, match=rf"movies\.dat\{suffix}: expected a whole \{suffix} file"
    ):
        read_bytes(path)


def test_missing_file_lists_what_was_looked_for(tmp_path) -> None:
    with pytest.raises(InvalidData) as caught:
        find_file(tmp_path, "u.data")
    for name in ("u.data", "u.data.gz", "u.data.xz", "u.data.bz2"):
        assert name in str(caught.value)
    assert find_optional(tmp_path, "u.data") is None


def test_missing_folder_and_unreadable_path_are_named(tmp_path) -> None:
    with pytest.raises(InvalidData, match="nowhere: expected a folder"):
        find_file(tmp_path / "nowhere", "u.data")
    with pytest.raises(InvalidData, match="expected a readable file, got Is a directory"):
        read_bytes(tmp_path)


def test_wrong_encoding_gives_line_and_byte(tmp_path) -> None:
    path = tmp_path / "items.csv"
    path.write_bytes(b"item_id,title\n1,ok\n2,Am\xe9lie\n")
    with pytest.raises(
        InvalidData, match=r"items\.csv, line 3: expected UTF-8 text, got byte 0xe9 at offset 23"
    ):
        read_text(path)
    assert read_text(path, "iso-8859-1").endswith("Amélie\n")


def test_byte_order_mark_is_dropped(tmp_path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfitem_id\n")
    assert read_text(tmp_path / "a.csv") == "item_id\n"
