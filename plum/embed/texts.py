"""Texts turned into embeddings that survive a kill."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plum.embed.cache import encode_cached
from plum.embed.models import find_encoder, first_line, identity, quiet
from plum.errors import InvalidArgument, InvalidData, MissingDependency, check_int
from plum.files import check_model_json


def encode_texts(
    texts: Sequence[str],
    *,
    encoder: str,
    layer: int | None = None,
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

    ``layer=k`` takes the hidden state after the first ``k`` transformer layers, mean pooled, in
    place of the sentence embedding; 0 is the token embeddings. The layers above are not even
    loaded, so it is cheaper. Inner layers are not trained to tell texts apart: their embeddings
    lie in a narrow cone, with a high cosine for all pairs. Where a model normalizes the output of
    its last layer (most decoders), layer ``k`` gets that normalization too.

    Args:
        texts: ``N`` texts, none blank.
        encoder: What :func:`find_encoder` takes.
        layer: Inner layer to take, from 0 to the number of layers; None for the encoder's own
            sentence embedding.
        cache_dir: Folder of the cache, shared by all encoders; None keeps nothing.
        batch_size: Texts per forward pass.
        device: torch device; None takes the best one there is.
        normalize: Scale each embedding to length 1.
        progress: Called with (distinct texts done, distinct texts).

    Returns:
        float32 ``[N, D]``.

    Raises:
        InvalidArgument: no texts, a bad ``batch_size`` or ``layer``, or an encoder that is not
            found or fails to load.
        InvalidData: a text is blank, or its embedding is not finite or is zero.
        MissingDependency: sentence-transformers is not installed.
    """
    keys = _keys(texts)
    check_int("batch_size", batch_size)
    folder = Path(find_encoder(encoder))
    if layer is not None:
        _check_layer(layer, folder)
    ordered = sorted(
        dict(zip(texts, keys, strict=True)).items(), key=lambda pair: (-len(pair[0]), pair[0])
    )
    distinct = [text for text, _ in ordered]
    model: Any = None
    num_encoded = num_cut = 0

    def encode(rows: list[int]) -> tuple[list[int], np.ndarray]:
        nonlocal model, num_encoded, num_cut
        model = model or _load(folder, layer, device)
        shard = [distinct[row] for row in rows]
        with quiet():
            num_cut += _num_cut(model, shard)
            vectors = model.encode(
                shard, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
            ).astype(np.float32)
        num_encoded += len(shard)
        _check_finite(vectors, shard, texts, encoder)
        return rows, vectors

    cache = None if cache_dir is None else Path(cache_dir) / _cache_name(folder, layer)
    known = encode_cached([key for _, key in ordered], encode, cache, progress)
    if num_cut:
        warnings.warn(
            f"{encoder}: {num_cut} of {num_encoded} texts are longer than its"
            f" {model.max_seq_length} tokens; what is beyond is not encoded",
            RuntimeWarning,
            stacklevel=2,
        )
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


def _check_layer(layer: int, folder: Path) -> None:
    from transformers import AutoConfig

    # The first module of a sentence-transformers model is the transformer, often the folder itself.
    modules = folder / "modules.json"
    try:
        where = folder / json.loads(modules.read_text())[0]["path"] if modules.is_file() else folder
        count = AutoConfig.from_pretrained(where, local_files_only=True).num_hidden_layers
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        expected = "an encoder that says how many layers it has, as layer= needs"
        raise InvalidArgument("encoder", expected, f"{str(folder)!r} ({first_line(error)})") from (
            error
        )
    if not 0 <= layer <= count:
        raise InvalidArgument("layer", f"0 to {count}, the layers of the encoder", layer)


def _cache_name(folder: Path, layer: int | None) -> str:
    return identity(folder)[:32] + ("" if layer is None else f"-layer-{layer}")


def _load(folder: Path, layer: int | None, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingDependency("sentence-transformers", "pipeline", "encoding texts") from None
    try:
        with quiet():
            model = SentenceTransformer(
                str(folder),
                device=device,
                local_files_only=True,
                model_kwargs={"use_safetensors": True},
                config_kwargs=None if layer is None else {"num_hidden_layers": layer},
            )
            return model if layer is None else _mean_pooled(model)
    except Exception as error:
        check_model_json(folder)
        raise InvalidArgument(
            "encoder",
            "a model that sentence-transformers loads",
            f"{str(folder)!r} ({type(error).__name__}: {first_line(error)})",
        ) from error


def _mean_pooled(model: Any) -> Any:
    """Keeps the transformer of a model; what it has behind that was trained for its last layer."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError:  # where older versions have it
        from sentence_transformers.models import Pooling  # type: ignore[no-redef]
    transformer = model[0]
    width = transformer.auto_model.config.hidden_size
    return SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device=model.device)


def _num_cut(model: Any, shard: Sequence[str]) -> int:
    """Returns how many texts the model cuts off; no text has more tokens than bytes + 2."""
    limit = model.max_seq_length
    suspects = [text for text in shard if limit is not None and len(text.encode()) + 2 > limit]
    if not suspects or not callable(model.tokenizer):
        return 0
    return sum(len(ids) > limit for ids in model.tokenizer(suspects)["input_ids"])
