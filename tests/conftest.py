"""Fixtures and settings every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Read when a kernel is decorated, so it is set before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread a process, here and in what tests start: workers share the cores, and OpenMP threads
# that wait for a busy core cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def outside_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides from what a test starts that it runs in a worker, where no benchmark is measured."""
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; without it a test is skipped, except in CI, where it fails."""
    folder = Path(os.environ.get("PLUM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail("PLUM_TEST_DATA does not name the folder of real data sets")
        pytest.skip("real data sets are not here: set PLUM_TEST_DATA to their folder")
    return folder
