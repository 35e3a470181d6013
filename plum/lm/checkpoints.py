"""Checkpoints of a training run: whole or absent, safetensors and JSON, the newest two kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from plum.errors import InvalidData
from plum.files import atomic_folder, atomic_path, read_json, write_json

_MARKER = "complete.json"


def hash_seed(*numbers: int) -> int:
    """Returns a seed for torch that depends on all of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def fingerprint(
    model: torch.nn.Module, settings: Mapping[str, Any], parts: Sequence[Sequence[np.ndarray]]
) -> str:
    """Returns a SHA-256 of all that trained weights depend on.

    Args:
        model: The model before training.
        settings: Anything JSON can hold.
        parts: What is trained and validated on, each a list of one-dimensional integer arrays.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for rows in parts:
        digest.update(np.array([len(row) for row in rows], dtype=np.int64).tobytes())
        for row in rows:
            digest.update(np.ascontiguousarray(row, dtype=np.int64).tobytes())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, in ``step-<n>`` folders, and its best weights so far.

    A folder counts only with its ``complete.json``, which is written last and lists the size of
    every other file; what lacks it was cut off while being written and is removed.
    """

    def __init__(self, folder: str | Path, fingerprint: str, *, keep: int = 2) -> None:
        """Opens a folder of checkpoints.

        Args:
            folder: Where the checkpoints are; made when the first one is saved.
            fingerprint: What identifies the run; checkpoints of another one are never resumed.
            keep: How many to keep.
        """
        self.folder, self.fingerprint, self.keep = Path(folder), fingerprint, keep

    def newest(self) -> Path | None:
        """Returns the newest complete checkpoint of this run, after removing torn ones."""
        if not self.folder.is_dir():
            return None
        mine, others = [], 0
        for path in sorted(self.folder.iterdir()):
            if not path.is_dir():
                continue
            if path.name.startswith(".") or not _is_complete(path):
                shutil.rmtree(path)
            elif read_json(path / _MARKER)["fingerprint"] == self.fingerprint:
                mine.append(path)
            else:
                others += 1
        if others and not mine:
            warnings.warn(
                f"{self.folder}: the checkpoints belong to another configuration, data or base "
                "model; training starts at step 0 and replaces them",
                RuntimeWarning,
                stacklevel=3,
            )
        return max(mine, key=_step_of, default=None)

    def save(
        self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: Any
    ) -> None:
        """Saves weights, optimizer and a JSON state, then removes what is older than the newest.

        Args:
            step: Optimizer steps done.
            model: Its weights are saved, tied ones once.
            optimizer: Its per-parameter tensors are saved; hyperparameters come from the config.
            state: Anything JSON can hold.
        """
        target = self.folder / f"step-{step:08d}"
        with atomic_folder(target) as folder:
            save_model(model, str(folder / "model.safetensors"))
            tensors = {
                f"{index}.{name}": value.contiguous()
                for index, values in optimizer.state_dict()["state"].items()
                for name, value in values.items()
            }
            save_file(tensors, folder / "optimizer.safetensors")
            write_json(folder / "state.json", state)
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_json(folder / _MARKER, {"fingerprint": self.fingerprint, "files": sizes})
        mine = [p for p in self._folders() if _fingerprint_of(p) == self.fingerprint]
        kept = set(sorted(mine, key=_step_of)[-self.keep :])
        for path in self._folders():
            if path not in kept:
                shutil.rmtree(path)

    def load(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Puts a checkpoint's weights and optimizer tensors in place and returns its JSON state."""
        load_model(model, str(path / "model.safetensors"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(path / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return read_json(path / "state.json")

    def save_best(self, model: torch.nn.Module) -> None:
        """Keeps these weights as the best so far."""
        with atomic_path(self.folder / "best.safetensors") as path:
            save_model(model, str(path))

    def load_best(self, model: torch.nn.Module) -> None:
        """Puts the best weights in place.

        Raises:
            InvalidData: the file is gone.
        """
        path = self.folder / "best.safetensors"
        if not path.is_file():
            hint = "remove the folder of checkpoints to train again"
            raise InvalidData(path, "the best weights of the run", "no such file", hint)
        load_model(model, str(path))

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.is_dir()]


def _is_complete(path: Path) -> bool:
    if not (path / _MARKER).is_file():
        return False
    sizes = read_json(path / _MARKER)["files"]
    return all((path / n).is_file() and (path / n).stat().st_size == s for n, s in sizes.items())


def _fingerprint_of(path: Path) -> str | None:
    return read_json(path / _MARKER)["fingerprint"] if _is_complete(path) else None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
