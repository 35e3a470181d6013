"""plum's SidBeamSearch, called as its users call it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from plum.decode import SidBeamSearch
from plum.decode.model_step import Runner
from plum.trie import SidTrie


class Search:
    """A search to time; called, it gives tokens and scores, fp64 ``[B, W, L + 1]``."""

    def __init__(
        self,
        model: Any,
        trie: SidTrie,
        prompts: Tensor,
        width: int,
        score: str,
        skip: bool,
        graphs: bool = False,
    ) -> None:
        options = {"score": score, "forced_tails": skip, "cuda_graphs": graphs}
        self._search = SidBeamSearch(model, trie, **options)
        self._prompts, self._width = prompts, width
        self._offsets = torch.tensor(trie.token_offsets, device=trie.device)
        self.model_steps = 0

    def __call__(self) -> Tensor:
        found = self._search.search(self._prompts, num_beams=self._width)
        self.model_steps = found.model_steps
        tokens = (found.sids + self._offsets).double()
        return torch.cat((tokens, found.scores.unsqueeze(2).double()), dim=2)

    def share_outside_the_model(self) -> float:
        """Runs it once more; gives the share of the time outside layers and head.

        On a CPU that is processor time; on a GPU, which is waited for around each part, time.
        """
        inside = 0.0
        on_gpu = self._prompts.is_cuda

        def clock() -> float:
            if not on_gpu:
                return time.process_time()
            torch.cuda.synchronize()
            return time.perf_counter()

        def timed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def run(*args: Any, **options: Any) -> Tensor:
                nonlocal inside
                start = clock()
                found = function(*args, **options)
                inside += clock() - start
                return found

            return run

        with (
            mock.patch.object(Runner, "__call__", timed(Runner.__call__)),
            mock.patch.object(Runner, "logits", timed(Runner.logits)),
        ):
            start = clock()
            self()
            whole = clock() - start
        return 1 - inside / whole
