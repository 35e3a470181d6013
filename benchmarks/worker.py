"""Jobs to time, here or in a process of their own.

What a library reads when it is loaded (the CPU that OpenBLAS is told to tune for), and libraries
that bring an OpenMP or BLAS of their own, need a process beside torch's. It prepares a job on
request and runs it when it is called; a call costs a message each way, some 50 µs.
"""

from __future__ import annotations

import importlib
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from benchmarks.peers import PeerAbsent

_BLAS = "OPENBLAS_CORETYPE"
_workers: list[Worker] = []


class Job:
    """A prepared call in this process."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self._result: Tensor | None = None

    def __call__(self) -> None:
        """Runs it once, to the end: what is timed."""
        self._result = self._run()
        if isinstance(self._result, Tensor) and self._result.is_cuda:
            torch.cuda.synchronize()

    def result(self) -> Tensor:
        """Returns what the latest run gave."""
        assert self._result is not None
        return self._result


class RemoteJob(Job):
    """A prepared call in a worker; preparing another one there ends it."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(lambda: worker.ask("run"))
        self._worker = worker

    def result(self) -> Tensor:
        return self._worker.ask("result")


def prepare_here(target: str, *arguments: Any) -> Job:
    """Prepares ``module:function`` of :mod:`benchmarks.peers` in this process.

    Raises:
        PeerAbsent: the peer is not on this machine.
    """
    return Job(_load(target)(*arguments))


class Worker:
    """A process that prepares and runs jobs, started with an environment variable set."""

    def __init__(self, blas: str | None = None) -> None:
        """Starts the process; ``blas`` is the kind of CPU that OpenBLAS shall tune for."""
        before = os.environ.pop(_BLAS, None)
        if blas is not None:
            os.environ[_BLAS] = blas
        try:
            context = torch.multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        finally:
            os.environ.pop(_BLAS, None)
            if before is not None:
                os.environ[_BLAS] = before
        theirs.close()
        _workers.append(self)

    def prepare(self, target: str, *arguments: Any) -> Job:
        """Prepares ``module:function`` of :mod:`benchmarks.peers` for as many threads as here.

        Raises:
            PeerAbsent: the peer is not on this machine.
        """
        self.ask("prepare", target, torch.get_num_threads(), arguments)
        return RemoteJob(self)

    def blas_kernels(self, target: str) -> set[str]:
        """The kinds of CPU that the OpenBLAS copies loaded with a peer are tuned for there."""
        return self.ask("blas", target)

    def ask(self, *message: Any) -> Any:
        """Sends a request and waits for the answer."""
        self._connection.send(message)
        try:
            status, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the worker ended with exit code {code} on {message[:2]}") from None
        if status == "absent":
            raise PeerAbsent(answer)
        if status == "failed":
            raise RuntimeError(f"in the worker: {answer}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        _workers.remove(self)
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def processor_time(self) -> float:
        """Processor seconds of the process so far, by Linux's clock of another process."""
        assert self._process.pid is not None
        # As clock_getcpuclockid(3) makes it.
        return time.clock_gettime(~self._process.pid << 3 | 2)


def processor_time() -> float:
    """Processor seconds of this process and its workers: a timer for a busy machine.

    With more than one thread it is seconds: what threads spend together, in wait for each other
    too, is not what a call takes.
    """
    if torch.get_num_threads() > 1:
        return time.perf_counter()
    return time.process_time() + sum(worker.processor_time() for worker in _workers)


def _load(target: str) -> Callable[..., Callable[[], Tensor]]:
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(f"benchmarks.peers.{module}"), function)
    except ImportError as error:
        raise PeerAbsent(str(error)) from error


def _serve(connection: Any) -> None:
    run: Callable[[], Tensor] | None = None
    result: Any = None
    while True:
        try:
            verb, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if verb == "prepare":
                target, threads, values = arguments
                make = _load(target)
                _limit_threads(threads)
                run = result = None
                run = make(*values)
                answer = None
            elif verb == "run":
                assert run is not None
                result = run()
                answer = None
            elif verb == "result":
                answer = result
            else:
                _load(arguments[0])
                answer = _blas_kernels()
            connection.send(("done", answer))
        except PeerAbsent as error:
            connection.send(("absent", str(error)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))


def _limit_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)


def _blas_kernels() -> set[str]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return set()
    return {
        str(library["architecture"])
        for library in threadpool_info()
        if library["internal_api"] == "openblas"
    }
