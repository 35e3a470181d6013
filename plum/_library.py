"""The ``torch.library`` handle and the registry of op backends.

An op is defined once, with a plain-torch reference that runs on every device; native backends are
optimizations of it. PyTorch's dispatcher makes the automatic choice. To a Python function it takes
as long as a mask of 32 rows does, so plain tensors on a CPU go past it where nothing looks on that
it would tell; ``backend="..."`` on a public function always does, for tests and benchmarks.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import profiler
from torch.compiler import is_compiling

from plum.errors import BackendUnavailable, InvalidArgument

_CPU = torch.device("cpu")
# Types of arguments that are what they seem, unlike subclasses of Tensor. Lists hold the arrays of
# a trie or a filter, which plum made.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, int, bool, float, str, list, tuple, type(None)))
BACKENDS = ("reference", "cpu", "cuda", "wgmma", "triton")
# Major compute capabilities on which the GPU backends have passed their tests and, where timed,
# beaten plain torch: benchmarks/results/h200-*.json.
PROVEN = (9,)
GPU_KERNELS = "PLUM_GPU_KERNELS"
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
        fits: Says whether it takes these arguments; the automatic choice passes it by where it
            does not.
        proven: Major compute capabilities on which the automatic choice takes it.
    """

    name: str
    device: str
    run: Callable[..., Any]
    missing: Callable[[], str | None]
    fits: Callable[..., bool] = lambda *arguments: True
    proven: Sequence[int] = PROVEN

    def missing_on(self, device: torch.device | None) -> str | None:
        """Returns what :attr:`missing` says with a GPU as the current device."""
        if self.device == "cpu" or device is None or device.type != "cuda":
            return self.missing()
        with torch.cuda.device(device):
            return self.missing()

    def takes(self, device: torch.device) -> bool:
        """Says whether it takes tensors on a device; Triton's interpreter takes any with values."""
        # A device gives the name of its type slowly.
        if self.device == ("cpu" if device == _CPU else device.type):
            return True
        interpreted = self.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return interpreted and device.type != "meta"

    def why_not(self, device: torch.device | None = None) -> str | None:
        """Returns why the automatic choice leaves it out on a device of its type, or None."""
        reason = self.missing_on(device)
        if reason is not None or self.device == "cpu":
            return reason
        setting = os.environ.get(GPU_KERNELS, "auto")
        if setting not in ("auto", "on", "off"):
            raise InvalidArgument(GPU_KERNELS, "auto, on or off", repr(setting))
        if setting == "off":
            return f"{GPU_KERNELS}=off"
        if not torch.cuda.is_available():
            return "no CUDA device"
        if setting == "on":
            return None
        if torch.version.hip is not None:
            return f"it has not run on ROCm yet; {GPU_KERNELS}=on takes it"
        major, minor = torch.cuda.get_device_capability(device)
        if major in self.proven:
            return None
        return (
            f"it has not run on compute capability {major}.{minor} yet; {GPU_KERNELS}=on takes it"
        )


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
        self._on_cpu = reference
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            there = [backend for backend in backends if backend.device == device]
            if there:
                automatic = _on_a_cpu if device == "cpu" else _on_a_gpu
                run = automatic(self.name, there, reference)
                _lib.impl(self.name, run, key)
                if device == "cpu":
                    self._on_cpu = run
        self._overload = getattr(torch.ops.plum, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Runs the op; ``backend`` forces one and raises when it cannot run here."""
        if backend is None:
            if _nothing_looks_on() and _PLAIN.issuperset(map(type, args)) and args[0].is_cpu:
                return self._on_cpu(*args)
            return self._overload(*args)
        if backend == "reference":
            return self.reference(*args)
        forced = self.backends.get(backend)
        if forced is None:
            if backend not in BACKENDS:
                raise InvalidArgument("backend", f"one of {', '.join(BACKENDS)}", repr(backend))
            have = ", ".join(["reference", *self.backends])
            raise BackendUnavailable(f"{self.name} has no backend {backend!r}; it has: {have}")
        device = args[0].device
        reason = forced.missing_on(device)
        if reason is None and not forced.takes(device):
            reason = f"it takes {forced.device} tensors, not such on {device}"
        if reason is not None:
            raise BackendUnavailable(f"{self.name}: backend {backend!r} cannot run here: {reason}")
        return _on_its_device(forced)(*args)

    def default_backend(self, device: str) -> str:
        """Returns the name of the backend that the automatic choice takes on ``device``."""
        for backend in self.backends.values():
            if backend.device == device and backend.why_not() is None:
                return backend.name
        return "reference"


def _nothing_looks_on() -> bool:
    """Says whether nothing that traces, transforms, watches or profiles ops is at work here."""
    return not (
        is_compiling()
        or _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()  # also of make_fx before dispatch
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    )


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


def _on_a_cpu(
    name: str, backends: Sequence[Backend], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the first backend that can run here, else the reference after one warning."""
    reasons = {backend.name: backend.why_not() for backend in backends}
    for backend in backends:
        if reasons[backend.name] is None:
            return backend.run
    return _warned(name, reasons, reference)


def _on_a_gpu(
    name: str, backends: Sequence[Backend], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns what takes, on each device, the first backend that can run and fits there.

    Devices are looked at when they first come: at import that would begin with CUDA.
    """

    @functools.cache
    def ways(device: torch.device) -> list[tuple[Callable[..., bool], Callable[..., Any]]]:
        reasons = {backend.name: backend.why_not(device) for backend in backends}
        can = [backend for backend in backends if reasons[backend.name] is None]
        found = [(backend.fits, _on_its_device(backend)) for backend in can]
        unfit = "it does not take these arguments"
        why = {backend: reason or unfit for backend, reason in reasons.items()}
        off = os.environ.get(GPU_KERNELS) == "off"
        return [*found, (lambda *args: True, reference if off else _warned(name, why, reference))]

    def run(*args: Any) -> Any:
        return next(way for fits, way in ways(args[0].device) if fits(*args))(*args)

    return run


def _warned(
    name: str, reasons: Mapping[str, str | None], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns the reference, which says once why it is taken."""
    warned = False

    def fall_back(*args: Any) -> Any:
        nonlocal warned
        if not warned:
            warned = True
            why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
            warnings.warn(
                f"plum: {name} uses the slow plain-torch reference ({why})",
                RuntimeWarning,
                stacklevel=2,
            )
        return reference(*args)

    return fall_back
