"""Functions of tensors as CUDA graphs, captured once a shape and replayed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plum.errors import InvalidArgument


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it reads, and what it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Any, ...]


# One capture at a time in a process: another one would be told of what it waits for.
_capturing = threading.Lock()


class Graphs:
    """The graphs of the latest shapes of one function."""

    def __init__(self, most: int) -> None:
        """Takes how many graphs to keep, with the memory that each holds."""
        self._most = most
        self._captured: dict[Hashable, _Captured] = {}
        # A graph has one place for its inputs and one for its outputs.
        self._lock = threading.Lock()
        # The end of the latest replay.
        self._done: torch.cuda.Event | None = None

    def run(
        self,
        key: tuple[Hashable, ...],
        function: Callable[..., tuple[Any, ...]],
        inputs: tuple[Tensor, ...],
    ) -> tuple[Any, ...]:
        """Replays the graph of a call, which is captured where there is none yet.

        Args:
            key: What the function depends on beside its inputs.
            function: Takes the inputs; all that it does on the device does not depend on their
                values, and it waits for nothing there.
            inputs: Tensors on a GPU.

        Returns:
            What the function returns, tensors as copies.

        Raises:
            InvalidArgument: the function cannot be captured.
        """
        key += tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        with self._lock, torch.cuda.device_of(inputs[0]):
            done = self._done = self._done or _event()
            if key not in self._captured:
                if len(self._captured) == self._most:
                    # Together: one that goes takes what its stream holds from others of that
                    # stream, of which torch has few.
                    done.synchronize()
                    self._captured.clear()
                self._captured[key] = _capture(function, inputs)
            captured = self._captured[key]
            # The lock orders threads, this the streams that they may have of their own.
            done.wait()
            for kept, tensor in zip(captured.inputs, inputs, strict=True):
                kept.copy_(tensor)
            captured.graph.replay()
            copies = (
                each.clone() if isinstance(each, Tensor) else each for each in captured.outputs
            )
            found = tuple(copies)
            done.record()
            return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns what a graph reads; calls outside inference mode write there too."""
    with torch.inference_mode(False):
        return tuple(tensor.clone() for tensor in inputs)


def _capture(function: Callable[..., tuple[Any, ...]], inputs: tuple[Tensor, ...]) -> _Captured:
    with _capturing, _without_cached_casts():
        inputs = _copies(inputs)
        # A stream of the graph's own, so that libraries have memory of their own for it.
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        # Kernels are compiled, and libraries set up, before the capture.
        with torch.cuda.stream(aside):
            for _ in range(2):
                function(*inputs)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local")
        try:
            # A capture that fails may leave the thread on its stream.
            with torch.cuda.stream(here), capture:
                outputs = function(*inputs)
        except RuntimeError as error:
            expected = "a model whose forward waits for nothing on the device"
            hint = "use SidBeamSearch(..., cuda_graphs=False)"
            raise InvalidArgument("model", expected, str(error).split("\n")[0], hint) from error
        return _Captured(graph, inputs, outputs)


@contextlib.contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Lets autocast keep no copies of weights, which are gone when a graph is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
