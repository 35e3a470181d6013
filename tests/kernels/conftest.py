"""Prints what the ahead-of-time compiler reports of each kernel, below the test results."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Lists the properties called "kernel" of the tests that passed."""
    lines = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "kernel"
    ]
    if lines:
        terminalreporter.section("compiled kernels")
        for line in sorted(lines):
            terminalreporter.write_line(line)
