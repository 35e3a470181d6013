"""Building one index in a process of its own, whose memory is then that index's.

Each peer's file has ``build(table, size)``, ``children(index, prefixes)`` and, where the index is
arrays, ``nbytes(index)``; without it the growth of resident memory is taken. The latest index and
the table it is built from stay here.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import PeerAbsent
from benchmarks.trie_catalogs import (
    CODES,
    children_of,
    keep_freed_memory,
    make_table,
    sample_prefixes,
)

_source: tuple[str, int, int] | None = None
_table: np.ndarray | None = None
_index: Any = None
_resident = 0


def build(peer: str, law: str, levels: int, items: int) -> Callable[[], None]:
    """Draws a table of unsorted SIDs, unless it is the latest, and forgets the latest index."""
    global _source, _table, _index, _resident
    try:
        module = importlib.import_module(f"benchmarks.peers.{peer}")
    except ImportError as error:
        raise PeerAbsent(str(error)) from error
    keep_freed_memory()
    _index = None
    if _source != (law, levels, items):
        _source, _table = (law, levels, items), make_table(law, levels, items)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
    _resident = _memory("VmRSS")

    def run() -> None:
        global _index
        _index = module.build(_table, CODES)

    return run


def facts(peer: str) -> Callable[[], Tensor]:
    """Gives bytes of the index, of the peak while it was built, and of the table: int64 ``[3]``."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    assert _table is not None and _index is not None
    peak = _memory("VmHWM") - _resident
    _give_back()
    exact = getattr(module, "nbytes", None)
    size = _memory("VmRSS") - _resident if exact is None else exact(_index)
    found = torch.tensor([size, peak, _table.nbytes])
    return lambda: found


def wrong(peer: str) -> Callable[[], list[tuple[int, ...]]]:
    """Gives the sampled prefixes after which the index has other codes than the table."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    assert _table is not None and _index is not None
    prefixes = sample_prefixes(_table, each=4)
    given = [sorted(codes) for codes in module.children(_index, prefixes)]
    pairs = zip(prefixes, given, children_of(_table, prefixes), strict=True)
    found = [prefix for prefix, ours, theirs in pairs if ours != theirs]
    return lambda: found


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
