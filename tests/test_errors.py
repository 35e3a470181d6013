"""Errors are one line, whatever they pass on."""

from __future__ import annotations

import pytest

from plum.errors import InvalidArgument, InvalidData


@pytest.mark.parametrize("kind", [InvalidArgument, InvalidData])
def test_errors_are_one_line(kind):
    error = kind("x", "a number", "two\n  lines", "try\r\nagain")
    assert str(error) == "x: expected a number, got two lines; try again"
    # Names are shown as they are.
    assert str(kind("a  b", "c", "d")) == "a  b: expected c, got d"
