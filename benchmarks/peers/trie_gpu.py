"""plum's trie ops on a GPU, and what repeats a call so that it is the device that is timed.

Repetitions go through several copies of the logits, together larger than any cache, as a model
that has just written them would leave them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.peers import trie_ours
from benchmarks.peers.ours import require
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask_
from plum.trie import SidTrie

REPEATS = 48
Run = Callable[[Tensor], Tensor]


def step(
    trie: SidTrie,
    level: int,
    states: Tensor,
    logits: Sequence[Tensor],
    scores: Tensor,
    score: str,
    backend: str,
    graph: bool,
) -> Callable[[], Tensor]:
    """REPEATS steps to as many beams as there are; gives the scores ``[B, W]`` of the last."""
    require("trie_beam_step", backend)
    options = {"k": scores.shape[1], "score": score, "backend": backend}
    return repeated(
        lambda rows: trie_beam_step(rows, scores, states, trie, level, **options).scores,
        logits,
        graph,
    )


def decode(
    trie: SidTrie, logits: list[Tensor], score: str, backend: str, graph: bool
) -> Callable[[], Tensor]:
    """A whole search with prepared logits ``[B, W, V]`` a level; gives the SIDs ``[B, W, L]``."""
    run = trie_ours.decode(trie, logits, score, backend)
    return captured(run) if graph else run


def mask(
    trie: SidTrie, level: int, states: Tensor, logits: Sequence[Tensor], backend: str
) -> Callable[[], Tensor]:
    """REPEATS masks in place of copies of ``logits`` ``[M, V]``."""
    require("trie_mask_", backend)
    copies = [rows.clone() for rows in logits]
    return repeated(
        lambda rows: trie_mask_(rows, states, trie, level, backend=backend), copies, graph=False
    )


def repeated(run: Run, logits: Sequence[Tensor], graph: bool) -> Callable[[], Tensor]:
    """Calls ``run`` REPEATS times with one of ``logits`` after the other; gives the last answer."""

    def loop() -> Tensor:
        for i in range(REPEATS):
            answer = run(logits[i % len(logits)])
        return answer

    return captured(loop) if graph else loop


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures a call in a CUDA graph, after two calls that compile what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()

    def replay() -> Tensor:
        graph.replay()
        return answer

    return replay
