"""The choice of a backend, and where GPU backends launch."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

import plum.ops  # noqa: F401  registers the ops
from plum import _library
from plum._library import OPS, Backend


@pytest.mark.parametrize("name", sorted(OPS))
def test_gpu_backends_launch_on_the_device_of_their_first_tensor(monkeypatch, name):
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []
    for backend in OPS[name].backends.values():
        if backend.device != "cuda":
            continue
        spy = Backend(
            backend.name, "cuda", lambda *args: seen.append(list(current)), lambda: None, False
        )
        monkeypatch.setitem(OPS[name].backends, backend.name, spy)
        there = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
        OPS[name](there, backend=backend.name)
        assert seen.pop() == [torch.device("cuda:1")]
        _library._automatic(name, [spy], OPS[name].reference)(there)
        assert seen.pop() == [torch.device("cuda:1")]
        OPS[name](torch.zeros(1), backend=backend.name)
        assert seen.pop() == [], "tensors of the interpreter are on the CPU"
