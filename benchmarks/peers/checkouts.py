"""Peers that are repositories, not packages: checkouts under the folder named by PLUM_PEERS."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from benchmarks.peers import PeerAbsent

# The modules of each checkout that were loaded before, by name.
_modules: dict[Path, dict[str, ModuleType]] = {}


def load(repository: str, folder: str, module: str) -> ModuleType:
    """Imports one module of a checkout.

    Args:
        repository: ``owner/name`` on GitHub; the checkout is ``$PLUM_PEERS/name``.
        folder: Folder of the checkout that its own scripts run in.
        module: Name of the module, as seen from there.

    Raises:
        PeerAbsent: there is no such checkout, or a package that it imports is missing.
    """
    with importing(repository, folder) as load_module:
        return load_module(module)


@contextmanager
def importing(repository: str, folder: str) -> Iterator[Callable[[str], ModuleType]]:
    """Lets the body import from a checkout; gives the function that imports a module by name.

    Raises:
        PeerAbsent: as :func:`load` says.
    """
    peers = os.environ.get("PLUM_PEERS")
    if not peers:
        raise PeerAbsent(f"PLUM_PEERS names no folder with a checkout of {repository}")
    root = Path(peers).resolve() / repository.split("/")[1] / folder
    if not root.is_dir():
        raise PeerAbsent(f"the folder PLUM_PEERS has no checkout of {repository}")
    before = set(sys.modules)
    # A module that registers itself somewhere cannot be loaded twice.
    kept = _modules.setdefault(root, {})
    sys.modules.update(kept)
    sys.path.insert(0, str(root))
    try:
        yield importlib.import_module
    except ImportError as error:
        raise PeerAbsent(f"{repository}: {error}") from error
    finally:
        sys.path.remove(str(root))
        # Names such as `src` and `modules` belong to every checkout. The place of a namespace
        # package is looked up in its parent, so all are found before any is removed.
        for name in [n for n in set(sys.modules) - before if _lies_in(sys.modules[n], root)]:
            kept[name] = sys.modules.pop(name)


def _lies_in(module: ModuleType, root: Path) -> bool:
    spec = getattr(module, "__spec__", None)
    if spec is None:
        return False
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    return any(root in Path(place).parents for place in places if place)
