"""The state of a training that can be stopped at any time: one folder, replaced as a whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plum.errors import InvalidData
from plum.files import atomic_folder, read_json, settle_folder, write_json
from plum.quantize.storage import plain

_STATE, _TENSORS = "state.json", "state.safetensors"
_REACHED = ("epoch", "best_rank", "history")


@dataclasses.dataclass
class TrainingState:
    """What a training has reached.

    Attributes:
        epoch: Epochs done.
        history: One record an epoch.
        best_rank: The rank of the best state; None before the first evaluation.
        best: Its tensors.
    """

    epoch: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_rank: tuple[float, float] | None = None
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what a resumed training must have in common with the one that was stopped.

    Args:
        settings: Anything that JSON can hold.
        tensors: The inputs, which are hashed.
    """
    hashes = {}
    for name, tensor in sorted(tensors.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for part in tensor.detach().split(65536):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
        hashes[name] = digest.hexdigest()
    return plain({"settings": settings, "inputs": hashes})


def save_checkpoint(
    folder: Path,
    stamp: Mapping[str, Any],
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes the state; until it is whole, ``folder`` keeps the one before."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in slots.items()}
    with atomic_folder(folder) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        reached = {name: getattr(state, name) for name in _REACHED}
        write_json(temporary / _STATE, {"stamp": stamp, **reached})


def load_checkpoint(
    folder: Path,
    stamp: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> TrainingState:
    """Puts a saved state into model and optimizer; without one, returns the start.

    Raises:
        InvalidData: the checkpoint is damaged or of another training.
    """
    settle_folder(folder)
    if not folder.exists():
        return TrainingState()
    if not folder.is_dir():
        raise InvalidData(folder, "the folder of a checkpoint", "a file")
    state = read_json(folder / _STATE)
    different = _difference(state.get("stamp") if isinstance(state, dict) else None, stamp)
    if different:
        raise InvalidData(
            folder,
            "a checkpoint of this training",
            different,
            "continue with the same arguments and inputs, or name another folder",
        )
    lost = [name for name in _REACHED if name not in state]
    if lost:
        raise InvalidData(folder / _STATE, "what a training has reached", f"no {', '.join(lost)}")
    device = next(model.parameters()).device
    try:
        tensors = load_file(folder / _TENSORS, device=str(device))
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = value
        model.load_state_dict(groups["model"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in groups["optimizer"].items():
            index, _, slot = name.partition("/")
            slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    except FileNotFoundError:
        raise InvalidData(folder / _TENSORS, "a safetensors file", "no such file") from None
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise InvalidData(folder / _TENSORS, "the tensors of this training", error) from None
    best_rank = None if state["best_rank"] is None else tuple(state["best_rank"])
    return TrainingState(state["epoch"], state["history"], best_rank, groups["best"])


def _difference(found: Any, stamp: Mapping[str, Any]) -> str:
    """Names what is not the same in two stamps, in content or in order; "" where all is."""
    if not isinstance(found, dict):
        return "no stamp"
    names = []
    for part in ("settings", "inputs"):
        theirs, ours = found.get(part) or {}, stamp[part]
        for name in sorted({*theirs, *ours}):
            # As text: dicts are equal in any order, but weights are laid out by that of input_dims.
            if json.dumps(theirs.get(name)) != json.dumps(ours.get(name)):
                names.append(name)
    return f"one with another {', '.join(names)}" if names else ""
