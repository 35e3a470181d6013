"""The ``torch.library`` handle and the registry of op backends.

An op is defined once, with a plain-torch reference that runs on every device; native backends are
optimizations of it. PyTorch's dispatcher makes the automatic choice; ``backend="..."`` on a public
function goes past it, for tests and benchmarks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plum.errors import BackendUnavailable, InvalidArgument

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPS: dict[str, Op] = {}

_lib = torch.library.Library("plum", "DEF")


@dataclass(frozen=True)
class Backend:
    """One native implementation of an op.

    Attributes:
        name: One of :data:`BACKENDS`.
        device: Device type of the tensors it takes.
        run: The implementation, with the arguments of the op's schema.
        missing: Returns why it cannot run on this machine, or None when it can.
        default: Chosen automatically for its device. A GPU backend earns this by a committed
            result file from a GPU.
    """

    name: str
    device: str
    run: Callable[..., Any]
    missing: Callable[[], str | None]
    default: bool


class Op:
    """A registered op: call it like its schema, with an optional forced backend."""

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: Sequence[Backend] = (),
    ) -> None:
        """Defines ``plum::<schema>`` and registers its reference, fake and native backends."""
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        self.backends = {backend.name: backend for backend in backends}
        _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _lib.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"plum::{self.name}", fake, lib=_lib)
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            chosen = [b for b in backends if b.device == device and b.default]
            if chosen:
                _lib.impl(self.name, _automatic(self.name, chosen, reference), key)
        self._overload = getattr(torch.ops.plum, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Runs the op; ``backend`` forces one and raises when it cannot run here."""
        if backend is None:
            return self._overload(*args)
        if backend not in BACKENDS:
            raise InvalidArgument("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
        if backend == "reference":
            return self.reference(*args)
        if backend not in self.backends:
            have = ", ".join(["reference", *self.backends])
            raise BackendUnavailable(f"{self.name} has no backend {backend!r}; it has: {have}")
        reason = self.backends[backend].missing()
        if reason is not None:
            raise BackendUnavailable(f"{self.name}: backend {backend!r} cannot run here: {reason}")
        return _on_its_device(self.backends[backend])(*args)

    def default_backend(self, device: str) -> str:
        """Returns the name of the backend that the automatic choice takes on ``device``."""
        for backend in self.backends.values():
            if backend.device == device and backend.default and backend.missing() is None:
                return backend.name
        return "reference"


def _on_its_device(backend: Backend) -> Callable[..., Any]:
    """Returns the implementation, made to launch on the GPU of its first tensor.

    Triton and CUDA launch on the current device, which need not be where the tensors are.
    """
    if backend.device == "cpu":
        return backend.run

    def run(*args: Any) -> Any:
        if not args[0].is_cuda:  # Triton's interpreter
            return backend.run(*args)
        with torch.cuda.device(args[0].device):
            return backend.run(*args)

    return run


def _automatic(
    name: str, chosen: Sequence[Backend], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the first backend that can run here, else the reference after one warning."""
    reasons = []
    for backend in chosen:
        reason = backend.missing()
        if reason is None:
            return _on_its_device(backend)
        reasons.append(f"{backend.name}: {reason}")
    warned = False

    def fall_back(*args: Any) -> Any:
        nonlocal warned
        if not warned:
            warned = True
            warnings.warn(
                f"plum: {name} uses the slow plain-torch reference ({'; '.join(reasons)})",
                RuntimeWarning,
                stacklevel=2,
            )
        return reference(*args)

    return fall_back
