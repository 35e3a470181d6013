"""Functions of tensors as CUDA graphs, captured once a shape and replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plum.errors import InvalidArgument


@dataclass(frozen=True)
class _Captured:
    """A graph, the tensors that it reads, what it writes, and the end of its latest replay."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Any, ...]
    done: torch.cuda.Event


class Graphs:
    """The graphs of the latest shapes of one function."""

    def __init__(self, most: int) -> None:
        """Takes how many graphs to keep, with the memory that each holds."""
        self._most = most
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        # A graph has one place for its inputs and one for its outputs.
        self._lock = threading.Lock()

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
        key += tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        with self._lock:
            captured = self._captured.pop(key, None) or _capture(function, inputs)
            self._captured[key] = captured
            if len(self._captured) > self._most:
                self._captured.popitem(last=False)
            # The lock orders threads, this the streams that they may have of their own.
            captured.done.wait()
            for kept, tensor in zip(captured.inputs, inputs, strict=True):
                kept.copy_(tensor)
            captured.graph.replay()
            copies = (
                each.clone() if isinstance(each, Tensor) else each for each in captured.outputs
            )
            found = tuple(copies)
            captured.done.record()
            return found


def _capture(function: Callable[..., tuple[Any, ...]], inputs: tuple[Tensor, ...]) -> _Captured:
    inputs = tuple(tensor.clone() for tensor in inputs)
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    # Kernels are compiled, and libraries set up, before the capture.
    with torch.cuda.stream(aside):
        for _ in range(2):
            function(*inputs)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = function(*inputs)
    except RuntimeError as error:
        expected = "a model whose forward waits for nothing on the device"
        hint = "use SidBeamSearch(..., cuda_graphs=False)"
        raise InvalidArgument("model", expected, str(error).split("\n")[0], hint) from error
    return _Captured(graph, inputs, outputs, torch.cuda.Event())
