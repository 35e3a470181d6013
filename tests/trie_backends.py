"""The implementations of the trie ops that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plum import _native

# Those with bf16 run the same trie kernels as AVX-512.
ISAS = [isa for isa in _native.build_info().get("isas", []) if "bf16" not in isa]
RUNNERS = ["reference", *(f"cpu {isa}" for isa in ISAS)]


@contextmanager
def running(runner: str, threads: int = 1) -> Iterator[str]:
    """Makes a runner's instruction set the active one, and gives the name of its backend."""
    backend, _, isa = runner.partition(" ")
    active, before = _native.build_info().get("isa"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if isa:
            _native.set_cpu_isa(isa)
        yield backend
    finally:
        torch.set_num_threads(before)
        if active:
            _native.set_cpu_isa(active)
