"""Prints what the ahead-of-time compiler reports of each kernel, below the test results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def interpreter_patches_once() -> Iterator[None]:
    """Halves the interpreter's time: it patches triton.language anew in each nested call."""
    from triton.runtime import interpreter

    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None or torch.cuda.is_available():
        yield
        return
    running = []

    class Scope:
        """The patches of the outermost call, or none."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:
            if self.inner is not None:
                running.clear()
                self.inner.restore()

    def patch_once(function: Any) -> Scope:
        if running:
            return Scope(None)
        running.append(True)
        return Scope(patch(function))

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch


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
