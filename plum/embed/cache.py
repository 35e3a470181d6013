"""The embedding cache: immutable shards, each written whole and checked by its hash when read."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from plum.files import atomic_path

SHARD_SIZE = 512
_KEY_BYTES = 32

Encode = Callable[[list[int]], tuple[list[int], np.ndarray]]


def encode_cached(
    keys: Sequence[bytes],
    encode: Encode,
    folder: Path | None,
    progress: Callable[[int, int], None] | None,
) -> dict[bytes, np.ndarray]:
    """Encodes what the cache does not hold, shard by shard, and returns everything.

    Keys that are not there keep their order and are cut into shards of :data:`SHARD_SIZE`; a
    shard is encoded as a whole and written as a whole, so a run that was killed, or whose cache
    lost a shard, makes the same calls as one that was not.

    Args:
        keys: SHA-256 of each distinct input, in the order to encode them in.
        encode: Takes positions in ``keys``; returns those that it could encode, and their
            embeddings, float32 ``[len(...), D]``.
        folder: The cache of this very encoder; None keeps nothing.
        progress: Called with (distinct inputs done, distinct inputs).

    Returns:
        Key to embedding, float32 ``[D]``; what could not be encoded is not in it.
    """
    cache = None if folder is None else ShardCache(folder)
    known = {} if cache is None else cache.load(set(keys))
    missing = [row for row, key in enumerate(keys) if key not in known]
    done = len(keys) - len(missing)
    if progress is not None:
        progress(done, len(keys))
    for start in range(0, len(missing), SHARD_SIZE):
        shard = missing[start : start + SHARD_SIZE]
        rows, embeddings = encode(shard)
        shard_keys = [keys[row] for row in rows]
        if cache is not None and rows:
            cache.save(shard_keys, embeddings)
        known.update(zip(shard_keys, embeddings, strict=True))
        done += len(shard)
        if progress is not None:
            progress(done, len(keys))
    if cache is not None:
        cache.drop_corrupt()
    return known


class ShardCache:
    """A folder of ``<hash of its keys>.safetensors`` files: ``keys`` and ``embeddings``."""

    def __init__(self, folder: Path) -> None:
        """Opens the folder of one encoder; it is made with the first shard."""
        self.folder = folder
        self._corrupt: set[Path] = set()

    def load(self, wanted: set[bytes]) -> dict[bytes, np.ndarray]:
        """Returns the embeddings (float32 ``[D]``) of the wanted keys that are there.

        A shard that cannot be read is reported as a warning and counts as not there.
        """
        found: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith("."):  # what a killed write left behind
                continue
            try:
                keys, embeddings = _read(path)
            except _Corrupt as error:
                self._corrupt.add(path)
                warnings.warn(
                    f"{path}: corrupt embedding cache ({error}); what was in it is encoded again",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            for key, embedding in zip(keys, embeddings, strict=True):
                if key in wanted:
                    found.setdefault(key, embedding)
        return found

    def save(self, keys: Sequence[bytes], embeddings: np.ndarray) -> None:
        """Writes one shard: ``keys`` (32 bytes each) and float32 ``[len(keys), D]``."""
        from safetensors.numpy import save_file

        joined = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, _KEY_BYTES)
        path = self.folder / f"{hashlib.sha256(joined.tobytes()).hexdigest()[:32]}.safetensors"
        with atomic_path(path) as temporary:
            save_file(
                {"keys": joined, "embeddings": np.ascontiguousarray(embeddings)},
                temporary,
                metadata={"sha256": _digest(joined, embeddings)},
            )
        self._corrupt.discard(path)

    def drop_corrupt(self) -> None:
        """Removes the corrupt shards that :meth:`load` met and :meth:`save` did not replace."""
        for path in self._corrupt:
            path.unlink(missing_ok=True)
        self._corrupt.clear()


class _Corrupt(Exception):
    pass


def _read(path: Path) -> tuple[list[bytes], np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            keys, embeddings = file.get_tensor("keys"), file.get_tensor("embeddings")
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise _Corrupt(str(error)) from None
    if expected != _digest(keys, embeddings):
        raise _Corrupt("its content does not match its hash")
    return [key.tobytes() for key in keys], embeddings


def _digest(keys: np.ndarray, embeddings: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(keys).tobytes())
    digest.update(np.ascontiguousarray(embeddings).tobytes())
    return digest.hexdigest()
