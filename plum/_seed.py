"""Draws that repeat and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from a seed, and gives every generator of torch its state back.

    ``torch.manual_seed`` alone also seeds GPUs, at once or when CUDA begins.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield
