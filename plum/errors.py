"""Every error a user can cause: one line that names the thing, what was expected and what came."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor


class PlumError(Exception):
    """Base of all errors that plum raises on purpose; the command line prints it as one line."""


class InvalidArgument(PlumError, ValueError):
    """An argument of a public function is not acceptable."""

    def __init__(self, name: str, expected: str, got: object, hint: str = "") -> None:
        """Builds the message ``name: expected X, got Y; hint``."""
        super().__init__(_sentence(name, expected, got, hint))
        self.name = name


class InvalidData(PlumError, ValueError):
    """A file, row, column or identifier in the user's data is not acceptable."""

    def __init__(self, where: object, expected: str, got: object, hint: str = "") -> None:
        """Builds the message ``where: expected X, got Y; hint`` (where: file, row, key)."""
        super().__init__(_sentence(str(where), expected, got, hint))


class InvalidConfig(PlumError, ValueError):
    """A configuration key is unknown or its value is out of range."""


class BackendUnavailable(PlumError, RuntimeError):
    """A backend was asked for by name and is not there."""


class MissingDependency(PlumError, ImportError):
    """An optional package is needed; the message says which extra installs it."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        """Builds the message that names the missing package and the extra that brings it."""
        how = f"pip install -e '.[{extra}]' in the checkout of plum"
        super().__init__(f"{what} needs the package {package!r}: {how}")


def check_int(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Returns an argument that must be a whole number as an int.

    Raises:
        InvalidArgument: it is no integer of Python, NumPy or torch, or below ``least`` or above
            ``most``.
    """
    number: int | None = None
    if type(value) is int:
        number = value
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number is None or number < least or (most is not None and number > most):
        expected = f"an int >= {least}" if most is None else f"an int from {least} to {most}"
        raise InvalidArgument(name, expected, repr(value))
    return number


def check_tensor(name: str, value: object) -> None:
    """Raises InvalidArgument unless ``value`` is a tensor: lists and arrays have no device."""
    if not isinstance(value, Tensor):
        raise InvalidArgument(name, "a tensor", f"a {type(value).__name__}")


def check_number(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    """Checks an argument that must be a number, by a condition that no NaN meets.

    Raises:
        InvalidArgument: it does not meet the condition, or is nothing to ask it of, such as a str.
    """
    try:
        good = not isinstance(value, bool) and bool(fits(value))
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InvalidArgument(name, expected, repr(value))


def _sentence(name: str, expected: str, got: object, hint: str) -> str:
    text = f"{name}: expected {expected}, got {got}"
    text = f"{text}; {hint}" if hint else text
    # What came may be the message of another library, of several lines.
    return " ".join(text.split()) if len(text.splitlines()) > 1 else text
