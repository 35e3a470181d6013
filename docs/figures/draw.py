"""Draws the figures of the concept pages from what plum computes: python docs/figures/draw.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from plum.ops import residual_quantize, trie_beam_step, trie_walk
from plum.quantize import KMeans
from plum.trie import SidTrie

FOLDER = Path(__file__).parent
# Distinguishable for the color-blind, light enough for dark text upon them.
COLORS = ("#88ccee", "#ddcc77", "#cc8899", "#77bb99")
INK, FAINT = "#222222", "#bbbbbb"
SIDS = [(0, 1, 2), (0, 3, 0), (1, 0, 3), (2, 1, 0), (2, 1, 1), (2, 1, 3), (2, 2, 0), (3, 0, 1)]


def residual_quantization(folder: Path) -> None:
    """Three levels of four codewords on points of the plane, and one point's way through them."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.tensor([[-2.0, 1.2], [1.8, 1.6], [-1.2, -1.8], [2.0, -1.2]])
    points = centers.repeat(30, 1) + 0.8 * torch.randn(120, 2, generator=generator)
    codebooks, residual, panels = [], points, []
    for level in range(3):
        codebooks.append(KMeans(4, seed=level).fit(residual).centroids.float())
        codes = residual_quantize(residual, codebooks[-1:]).codes[:, 0]
        panels.append((residual, codes))
        residual = residual - codebooks[-1][codes.long()]
    sids = residual_quantize(points, codebooks).codes
    # A point that each level moves by a good deal, and that ends up close.
    lengths = [rows.norm(dim=1) for rows, _ in panels[1:]]
    chosen = int((lengths[0] + lengths[1] - 5 * residual.norm(dim=1)).argmax())
    sid = sids[chosen].tolist()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.5))
    for level, (axis, (rows, codes)) in enumerate(zip(axes, panels, strict=True)):
        axis.scatter(*rows.T, c=[COLORS[code] for code in codes.tolist()], s=9)
        for code, (x, y) in enumerate(codebooks[level].tolist()):
            axis.text(x, y, str(code), ha="center", va="center", weight="bold", color=INK,
                      bbox={"boxstyle": "circle", "fc": COLORS[code], "ec": INK})  # fmt: skip
        x, y = rows[chosen].tolist()
        to = codebooks[level][sid[level]].tolist()
        axis.annotate("", to, (x, y), arrowprops={"arrowstyle": "->", "color": INK})
        axis.plot(x, y, "o", color=INK, ms=5)
        name = "the embedding" if level == 0 else f"what level {level - 1} left"
        axis.set_title(f"level {level}: {name}, code {sid[level]}", fontsize=10, color=INK)
        axis.set_aspect("equal", adjustable="datalim")
        axis.tick_params(labelsize=7, colors="#777777")
    figure.suptitle(f"the black point has the SID {_spelled(sid)}", fontsize=10, color=INK)
    _save(figure, folder / "residual_quantization.svg")


def trie_ranges(folder: Path) -> None:
    """The sorted table, and the ranges of rows that are the states of a prefix."""
    trie = SidTrie.from_codes(torch.tensor(SIDS), codebook_sizes=(4, 4, 4))
    figure, axis = plt.subplots(figsize=(8, 4))
    for row, sid in enumerate(SIDS):
        axis.text(-0.7, row + 0.5, str(row), ha="center", va="center", color="#777777", size=9)
        for level, code in enumerate(sid):
            _cell(axis, level, row, str(code), COLORS[code])
        axis.text(3.2, row + 0.5, f"item {'ABCDEFGH'[row]}", va="center", color=INK, size=10)
    heads = ("row", "level 0", "level 1", "level 2")
    for place, text in zip((-0.7, 0.5, 1.5, 2.5), heads, strict=True):
        axis.text(place, -0.3, text, ha="center", color=INK, size=9)
    for place, prefix in enumerate(((), (2,), (2, 1), (2, 1, 3))):
        states = trie_walk(torch.tensor([prefix], dtype=torch.int64).view(1, -1), trie)
        low, high = states[0].tolist()
        x = 5.0 + 1.5 * place
        axis.plot([x + 0.2, x, x, x + 0.2], [low + 0.08] * 2 + [high - 0.08] * 2, color=INK)
        label = f"after {_spelled(prefix)}" if prefix else "root"
        axis.text(x + 0.1, -0.3, label, ha="center", color=INK, size=9)
        axis.text(x + 0.1, (low + high) / 2, f"[{low}, {high})", va="center", color=INK, size=10)
    axis.set(xlim=(-1.2, 10.7), ylim=(8.2, -0.8))
    axis.axis("off")
    _save(figure, folder / "trie_ranges.svg")


def constrained_beam(folder: Path) -> None:
    """One step with two beams: logits of all codes, the children's scores, and the best two."""
    trie = SidTrie.from_codes(torch.tensor(SIDS), codebook_sizes=(4, 4, 4))
    prefixes, scores = torch.tensor([[2], [0]]), torch.tensor([[-0.4, -1.3]])
    logits = torch.tensor([[[2.1, 1.0, 0.2, 1.8], [0.1, 1.2, 1.9, 0.6]]])
    states = trie_walk(prefixes, trie).view(1, 2, 2)
    step = trie_beam_step(logits, scores, states, trie, 1, k=2)
    every = scores.unsqueeze(2) + logits.log_softmax(dim=2)
    kept = list(zip(step.parents[0].tolist(), step.tokens[0].tolist(), strict=True))
    figure, axis = plt.subplots(figsize=(8, 2.9))
    for beam, prefix in enumerate(prefixes.tolist()):
        y = 1.6 * beam
        low, high = states[0, beam].tolist()
        text = f"beam {_spelled(prefix)}\nrows [{low}, {high})\nscore {scores[0, beam]:.2f}"
        axis.text(-0.3, y + 0.5, text, ha="right", va="center", size=9, color=INK)
        legal = {sid[1] for sid in SIDS[low:high]}
        for code in range(4):
            there = code in legal
            score = f"{every[0, beam, code]:.2f}" if there else "-inf"
            text = f"code {code}\n{score}"
            _cell(axis, code, y, text, COLORS[code] if there else "white", there)
            if (beam, code) in kept:
                edge = Rectangle((code + 0.02, y), 0.96, 1, fc="none", ec=INK, lw=2.5)
                axis.add_patch(edge)
    for rank, (beam, code) in enumerate(kept):
        sid = (*prefixes[beam].tolist(), code)
        low, high = step.states[0, rank].tolist()
        text = (
            f"{rank + 1}.  {_spelled(sid)}  rows [{low}, {high})  score {step.scores[0, rank]:.2f}"
        )
        axis.text(4.5, 1.0 + 0.5 * rank, text, va="center", size=10, color=INK)
    axis.text(4.5, 0.4, "the best two of all children:", va="center", size=9, color="#777777")
    axis.set(xlim=(-1.9, 8.6), ylim=(2.9, -0.2))
    axis.axis("off")
    _save(figure, folder / "constrained_beam.svg")


def _spelled(codes: Sequence[int]) -> str:
    return f"({', '.join(map(str, codes))})"


def _cell(axis: Axes, x: float, y: float, text: str, color: str, there: bool = True) -> None:
    box = Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fc=color, ec=INK if there else FAINT, lw=0.8)
    axis.add_patch(box)
    ink = INK if there else "#999999"
    axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", size=9, color=ink)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def draw(folder: Path) -> None:
    """Writes all figures as SVG into ``folder``."""
    with matplotlib.rc_context({"svg.hashsalt": "plum", "svg.fonttype": "path"}):
        for figure in (residual_quantization, trie_ranges, constrained_beam):
            figure(folder)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
