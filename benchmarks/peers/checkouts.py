"""Peers that are repositories, not packages: checkouts under the folder named by PLUM_PEERS."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from benchmarks.peers import PeerAbsent


def load(repository: str, folder: str, module: str) -> ModuleType:
    """Imports one module of a checkout.

    Args:
        repository: ``owner/name`` on GitHub; the checkout is ``$PLUM_PEERS/name``.
        folder: Folder of the checkout that its own scripts run in.
        module: Name of the module, as seen from there.

    Raises:
        PeerAbsent: there is no such checkout, or a package that it imports is missing.
    """
    peers = os.environ.get("PLUM_PEERS")
    if not peers:
        raise PeerAbsent(f"PLUM_PEERS names no folder with a checkout of {repository}")
    root = Path(peers).resolve() / repository.split("/")[1] / folder
    if not root.is_dir():
        raise PeerAbsent(f"the folder PLUM_PEERS has no checkout of {repository}")
    before = set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerAbsent(f"{repository}: {error}") from error
    finally:
        sys.path.remove(str(root))
        # Names such as `src` and `modules` belong to every checkout.
        for name in set(sys.modules) - before:
            if _lies_in(sys.modules[name], root):
                del sys.modules[name]


def _lies_in(module: ModuleType, root: Path) -> bool:
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    return any(root in Path(place).parents for place in places if place)
