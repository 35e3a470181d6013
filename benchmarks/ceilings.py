"""What this machine can do at best: the rates that shares of the floor refer to.

The arithmetic rates are those of the fastest matrix product that torch offers here, not of an
instruction in a loop; a kernel can therefore come out above one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Ceiling:
    """Best matrix products, in operations/s, and memory bandwidth, in bytes/s (read + written)."""

    fp32: float
    bf16: float
    bandwidth: float

    def seconds(self, operations: float, nbytes: float) -> float:
        """The floor: no less time than its slower part, arithmetic or memory, needs.

        Arithmetic is at the better rate: bf16 is slower than fp32 where a CPU has no such units.
        """
        return max(operations / max(self.fp32, self.bf16), nbytes / self.bandwidth)


_measured: dict[str, Ceiling] = {}


def measured() -> dict[str, dict[str, float]]:
    """What was measured so far, by device and threads: the fields of :class:`Ceiling`."""
    return {name: asdict(ceiling) for name, ceiling in _measured.items()}


def ceiling(device: str) -> Ceiling:
    """Measures ``"cpu"`` with torch's current threads, or the current GPU; once, in a second."""
    name = "GPU" if device == "cuda" else f"{torch.get_num_threads()} thread(s)"
    if name not in _measured:
        fp32 = bf16 = _best_product(8192 if device == "cuda" else 1024, torch.float32, device)
        # A CPU without bf16 arithmetic would take minutes to emulate it, and users would not.
        if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            bf16 = _best_product(8192 if device == "cuda" else 2048, torch.bfloat16, device)
        bandwidth = _copy(1 << (32 if device == "cuda" else 27), device)
        _measured[name] = Ceiling(fp32, bf16, bandwidth)
    return _measured[name]


def _best_product(size: int, dtype: torch.dtype, device: str) -> float:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    forms: list[Callable[[], object]] = [lambda: a @ b, lambda: a @ b.T]
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if device == "cpu" and linear is not None:
        forms.append(lambda: linear(a, b, None, "none", [], ""))
    return 2 * size**3 / min(_seconds(form, device) for form in forms)


def _copy(nbytes: int, device: str) -> float:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: str) -> float:
    """The best of at least three runs, for a tenth of a second or more."""
    # One thread's processor time is its time on an idle machine, whatever else runs on this one.
    alone = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[float] = []
    while len(times) < 4 or sum(times) < 0.15:
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:])
