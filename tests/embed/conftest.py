"""The encoder that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..tiny_encoder import build_encoder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_encoder(tmp_path_factory.mktemp("encoders") / "tiny")
