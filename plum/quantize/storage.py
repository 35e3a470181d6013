"""A module as a folder: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from plum.errors import InvalidArgument, InvalidData
from plum.files import atomic_path, read_json, write_json

Module = TypeVar("Module", bound=nn.Module)


def save_module(module: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Writes the tensors first and ``config.json`` last.

    The weights hold the configuration too: a kill between the two files over an older save leaves
    weights that say so, and that load once the older ``config.json`` is deleted.
    """
    folder = Path(folder)
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    config = plain({"architecture": type(module).__name__, **config})
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"config": json.dumps(config, allow_nan=False)})
    write_json(folder / "config.json", config)


def plain(value: Any) -> Any:
    """Returns what JSON makes of a value, with numbers of NumPy as those of Python."""
    return json.loads(json.dumps(value, allow_nan=False, default=lambda number: number.item()))


def load_module(
    build: Callable[[dict[str, Any]], Module], architecture: str, folder: str | Path
) -> Module:
    """Builds a module from ``config.json`` and loads its tensors; returns it in evaluation mode.

    Raises:
        InvalidData: a file is absent, damaged, of another model or of another save.
    """
    folder = Path(folder)
    config = read_config(folder, architecture)
    if config.pop("architecture", None) != architecture:
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
    except RuntimeError as error:
        raise InvalidData(weights, "tensors that fit config.json", error) from None
    return module.eval()


def read_config(folder: str | Path, what: str) -> dict[str, Any]:
    """Returns the configuration of a saved module, with its ``architecture``.

    Raises:
        InvalidData: there is no ``what`` in the folder, or its files are of two saves.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidData(folder, f"the folder of a saved {what}", "no such folder")
    path, weights = folder / "config.json", folder / "model.safetensors"
    try:
        with safe_open(weights, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("config", "null"))
    except FileNotFoundError:
        raise InvalidData(weights, "a safetensors file", "no such file") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InvalidData(weights, "a safetensors file", error) from None
    config = saved if saved and not path.exists() else read_json(path)
    if not isinstance(config, dict):
        raise InvalidData(path, f"the configuration of a {what}", type(config).__name__)
    if saved not in (None, config):
        raise InvalidData(
            path,
            f"the configuration that {weights.name} was saved with",
            "another one",
            "save the module again, or delete config.json to load the weights with theirs",
        )
    return config
