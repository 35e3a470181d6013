"""A module as a folder: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_path, read_json, write_json

Module = TypeVar("Module", bound=nn.Module)


def save_module(module: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the tensors first and ``config.json`` last, so a half-written folder never loads."""
    folder = Path(folder)
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    write_json(folder / "config.json", {"architecture": type(module).__name__, **config})


def load_module(
    build: Callable[[dict[str, Any]], Module], architecture: str, folder: str | Path
) -> Module:
    """Builds a module from ``config.json`` and loads its tensors; returns it in evaluation mode.

    Raises:
        InvalidData: a file is absent, damaged or of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidData(folder, f"the folder of a saved {architecture}", "no such folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.pop("architecture", None) != architecture:
        raise InvalidData(
            folder / "config.json", f"the configuration of a {architecture}", "another one"
        )
    try:
        module = build(config)
    except (TypeError, InvalidArgument) as error:
        raise InvalidData(
            folder / "config.json", f"the arguments of {architecture}", f"{error}"
        ) from None
    weights = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(weights))
    except FileNotFoundError:
        raise InvalidData(weights, "a safetensors file", "no such file") from None
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidData(weights, "tensors that fit config.json", reason) from None
    return module.eval()
