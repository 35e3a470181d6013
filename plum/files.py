"""Files that are whole or absent: written to a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plum.errors import InvalidData

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is synced and renamed over it.

    If the body raises, ``path`` keeps what it held before and the temporary file is removed. Others
    may read the file as far as the umask says, whatever the writer thinks of that.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because some writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; on success it is synced and takes the place of it.

    Whatever was at ``path`` stays until the new folder is whole. A kill between the two renames
    leaves it set aside; :func:`settle_folder` puts it back. Without ``replace`` a folder that
    holds files is never replaced: OSError.
    """
    path = Path(path)
    settle_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        # Locked, so that another writer can tell it from what a kill has left.
        with locked(temporary):
            yield temporary
            # As `atomic_path`: safetensors, for one, writes files that only their owner may read.
            mode = temporary.stat().st_mode & 0o666
            for file in [*temporary.rglob("*"), temporary]:
                if file.is_file():
                    os.chmod(file, mode)
                _sync(file)
            _take_place(temporary, path, replace)
            _sync(path.parent)
        for leftover in _leftovers(path, "tmp"):
            with contextlib.suppress(InvalidData, FileNotFoundError), locked(leftover):
                shutil.rmtree(leftover)
        _remove_old(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path, replace: bool) -> None:
    """Renames a folder to ``path``; what is there, and must not have files, steps aside first."""
    while True:
        if replace and path.exists():
            # What an earlier kill has left must not be put back in its place.
            _remove_old(path)
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, temporary.with_suffix(".old"))
        try:
            os.replace(temporary, path)
            return
        except OSError:
            # A reader may have put the old one back between the two: once more.
            if not (replace and path.exists()):
                raise


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _remove_old(path: Path) -> None:
    """Removes what was set aside, renamed first: nobody must put back what is half removed."""
    for aside in _leftovers(path, "old"):
        doomed = _temporary(path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(aside, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def settle_folder(path: str | Path) -> None:
    """Puts back the folder that a killed :func:`atomic_folder` had set aside, if there is one."""
    path = Path(path)
    if not path.exists():
        for aside in _leftovers(path, "old"):
            try:
                os.replace(aside, path)
            except OSError:
                # The writer was not dead, and has put the new folder there.
                if not path.exists():
                    raise
            return


def _leftovers(path: Path, suffix: str) -> list[Path]:
    """Returns what a killed :func:`atomic_folder` left, and nothing that only looks like it."""
    name = f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.{suffix}"
    return sorted(path.parent.glob(name))


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from locking a folder meanwhile, where the system has such locks.

    Raises:
        InvalidData: another process works on the folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidData(
            folder,
            "a folder that nothing else writes to",
            "one that another process works on",
            "wait until it has ended",
        ) from None
    except OSError as error:
        # Some network file systems have no locks, or none of folders.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EBADF):
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        InvalidData: the file is absent, is not UTF-8 or is not JSON, or no reader's: nested by the
            thousand, or with a number of thousands of digits.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidData(path, "a JSON file", "no such file") from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(path, "a JSON file", f"{type(error).__name__}: {error}") from None


def check_model_json(folder: str | Path) -> None:
    """Looks for the JSON file because of which the model in a folder does not load.

    Libraries that load models take what such a file holds for granted, and fail in many ways.

    Raises:
        InvalidData: one is not JSON, or not of the form that its name stands for.
    """
    for path in sorted(itertools.chain(*map(Path(folder).glob, ("*.json", "*/*.json")))):
        forms = {"modules.json": list, "tokenizer.json": dict}
        form = dict if path.name.endswith("config.json") else forms.get(path.name)
        if form is None:
            continue
        value = read_json(path)
        if not isinstance(value, form) or (path.name == "tokenizer.json" and "model" not in value):
            hint = "get the folder anew: download it, or delete the run's finetune/ and run again"
            got = json.dumps(value)[:40]
            raise InvalidData(path, f"what a model has as its {path.name}", got, hint)


def sha256(path: str | Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
