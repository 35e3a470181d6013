"""Download of the MovieLens archives from GroupLens, checked before they are used."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_path

BASE_URL = "https://files.grouplens.org/datasets/movielens"
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Archive:
    """An archive that GroupLens publishes: the folder inside it and its checksums."""

    folder: str
    md5: str
    sha256: str | None = None


ARCHIVES = {
    "ml-100k": Archive("ml-100k", "0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": Archive(
        "ml-1m",
        "c4d9eecfca2ab87c1945afe126590906",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    ),
    "ml-10m": Archive("ml-10M100K", "ce571fd55effeba0271552578f2648bd"),
    "ml-20m": Archive("ml-20m", "cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": Archive("ml-25m", "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": Archive("ml-32m", "d472be332d4daa821edc399621853b57"),
}


def download_movielens(
    name: str,
    cache_dir: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    base_url: str = BASE_URL,
) -> Path:
    """Returns the folder of a MovieLens release, after a download if it is not there yet.

    The archive comes to ``cache_dir`` whole or not at all, is checked against its published
    checksum and unpacked; a download that was cut off starts again. An archive put into
    ``cache_dir`` by hand is used as well.

    Args:
        name: ml-100k, ml-1m, ml-10m, ml-20m, ml-25m or ml-32m.
        cache_dir: Folder for the archive and the unpacked files.
        progress: Called as progress(bytes done, bytes in all), with 0 in all when unknown.
        base_url: Where the archives are.

    Raises:
        InvalidArgument: ``name`` is not a release.
        InvalidData: The download fails or is cut off, or the archive is not the published one.
    """
    if name not in ARCHIVES:
        raise InvalidArgument("name", f"one of {', '.join(ARCHIVES)}", repr(name))
    archive = ARCHIVES[name]
    folder = Path(cache_dir) / archive.folder
    if folder.is_dir():
        return folder
    path = Path(cache_dir) / f"{name}.zip"
    if path.is_file():
        _verify(path, path, archive, "delete it and run again")
    else:
        url = f"{base_url}/{name}.zip"
        with atomic_path(path) as temporary:
            _fetch(url, temporary, progress)
            hint = "run again, or pass a folder with the unpacked files as --data-dir"
            _verify(temporary, url, archive, hint)
    _unpack(path, archive.folder)
    return folder


def _fetch(url: str, path: Path, progress: Callable[[int, int], None] | None) -> None:
    hint = "check the connection and run again, or pass a folder as --data-dir"
    done = total = 0
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
            open(path, "wb") as file,
        ):
            total = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    except (HTTPException, OSError) as error:
        raise InvalidData(url, "a download", error, hint) from None
    if done < total:
        raise InvalidData(url, f"{total} bytes", f"only {done}", hint)


def _verify(path: Path, where: str | Path, archive: Archive, hint: str) -> None:
    expected = {"md5": archive.md5}
    if archive.sha256 is not None:
        expected["sha256"] = archive.sha256
    # MD5 is what GroupLens publishes; it guards against damage here, not against forgery.
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in expected}
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            for digest in digests.values():
                digest.update(chunk)
    for kind, digest in digests.items():
        if digest.hexdigest() != expected[kind]:
            raise InvalidData(where, f"{kind} {expected[kind]}", digest.hexdigest(), hint)


def _unpack(path: Path, folder: str) -> None:
    """Unpacks the archive's one folder beside it, whole or not at all."""
    try:
        with (
            zipfile.ZipFile(path) as archive,
            tempfile.TemporaryDirectory(prefix=f".{folder}.", dir=path.parent) as temporary,
        ):
            root = Path(temporary).resolve()
            for member in archive.namelist():
                target = (root / member).resolve()
                if not target.is_relative_to(root):
                    expected = "files inside the archive's folder"
                    raise InvalidData(path, expected, repr(member), "do not use this archive")
                if target.is_relative_to(root / folder):
                    archive.extract(member, root)
            if not (root / folder).is_dir():
                raise InvalidData(path, f"a folder {folder}", "none", "delete it and run again")
            try:
                os.replace(root / folder, path.parent / folder)
            except OSError:
                # Another process may have been faster.
                if not (path.parent / folder).is_dir():
                    raise
    except zipfile.BadZipFile as error:
        raise InvalidData(path, "a zip archive", error, "delete it and run again") from None
