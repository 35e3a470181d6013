"""A tiny catalog and log with a pattern that a model can learn."""

from __future__ import annotations

import numpy as np
import pytest

from plum.lm import Generator, load_generator
from plum.sid import SidVocabulary

SIZES = (4, 5, 3)


@pytest.fixture
def codes() -> np.ndarray:
    """SIDs of 30 items, int32 [30, 3], all distinct."""
    grid = np.stack(np.unravel_index(np.arange(60), SIZES), axis=1)
    return np.random.default_rng(5).permutation(grid)[:30].astype(np.int32)


@pytest.fixture
def histories() -> list[np.ndarray]:
    """Users who walk through the catalog in steps of one: the next item is certain."""
    rng = np.random.default_rng(6)
    starts, lengths = rng.integers(0, 30, 24), rng.integers(3, 22, 24)
    return [
        ((start + np.arange(length)) % 30).astype(np.int32)
        for start, length in zip(starts, lengths, strict=True)
    ]


@pytest.fixture
def generator() -> Generator:
    return load_generator("scratch:tiny", SidVocabulary(SIZES), seed=1, max_length=64)
