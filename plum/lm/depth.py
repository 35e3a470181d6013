"""A generator with one position per item, whose SID a small decoder writes level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from plum._seed import seeded
from plum.errors import InvalidArgument, InvalidData, check_int, check_number
from plum.files import atomic_folder, read_json, write_json
from plum.lm.examples import IGNORED
from plum.lm.timeline import NextItemModel, Timeline, TimelineShape
from plum.ops.trie_beam_step import trie_beam_step
from plum.ops.trie_mask import trie_mask
from plum.trie import SidTrie

ARCHITECTURE = "DepthGenerator"

# Shapes from scratch, by the name that follows "scratch:".
DEPTH_SHAPES: dict[str, dict[str, int]] = {
    "depth-tiny": {"width": 64, "layers": 2, "heads": 1},
    "depth-small": {"width": 128, "layers": 2, "heads": 2},
    "depth-base": {"width": 256, "layers": 3, "heads": 4},
}


def is_depth_generator(folder: str | Path) -> bool:
    """Tells whether :meth:`DepthGenerator.save_pretrained` wrote this folder."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and config.get("architecture") == ARCHITECTURE


class DepthGenerator(NextItemModel):
    """Reads items as their SIDs, one position each, and writes the SID of the next one.

    An item enters as the sum of the embeddings of its codes and a feed-forward network of it; no
    parameter belongs to an item. The probability of a SID is the product over its levels of
    P(code | history, codes before); each level is a softmax over the codes that continue the SIDs
    written so far to one of the catalog, so that probabilities of all SIDs add up to 1. Depth
    decoders over a timeline of items are from RQ-Transformer (Lee et al., 2022) and MARIUS
    (arXiv 2508.14910).

    Attributes:
        trie: The SIDs of the catalog.
        rows: int64 ``[N]``, the row of each item in the trie's table.
        sharing: int64 ``[S]``, the items on each row.
    """

    codes: Tensor
    masks: Tensor
    mask_of: Tensor
    octets: Tensor

    def __init__(
        self,
        codes: np.ndarray,
        codebook_sizes: Sequence[int],
        shape: TimelineShape,
        *,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Draws the weights.

        Args:
            codes: SID of each item, int ``[N, L]``.
            codebook_sizes: Codes of each level, ``K_l``.
            shape: Shape of the transformer.
            label_smoothing: Share of a code's probability spread over the legal codes.
            seed: Seed of the weights.

        Raises:
            InvalidArgument: codes and sizes do not fit, or the share is not one.
        """
        super().__init__()
        share = "a share in [0, 1)"
        check_number("label_smoothing", label_smoothing, share, lambda each: 0 <= each < 1)
        seed = check_int("seed", seed, 0)
        self.trie = SidTrie.from_codes(codes, codebook_sizes=codebook_sizes)
        self.sizes, self.label_smoothing = self.trie.codebook_sizes, label_smoothing
        codes = np.asarray(codes, dtype=np.int64)
        _, rows, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        self.rows, self.sharing = rows.reshape(-1), counts
        # They come with the catalog, not with the weights.
        self.register_buffer("codes", torch.from_numpy(codes), persistent=False)
        for name, table in zip(("masks", "mask_of"), _masks(codes, self.sizes), strict=True):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        # The eight flags of every octet, as one number.
        flags = np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little")
        self.register_buffer("octets", torch.from_numpy(flags).view(torch.int64), persistent=False)
        width, levels = shape.width, len(self.sizes)
        with seeded(seed):
            self.inputs = nn.ParameterList(_table(size, width) for size in self.sizes)
            self.mix = _Gated(width, 0.0)
            self.timeline = Timeline(shape)
            # What the decoder reads of the codes before, and what it writes.
            self.before = nn.ParameterList(_table(size, width) for size in self.sizes[:-1])
            self.steps = nn.ModuleList(_Gated(width, shape.dropout) for _ in range(levels))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(levels))
            self.heads = nn.ParameterList(_table(size, width) for size in self.sizes)

    @property
    def num_items(self) -> int:
        """Size of the catalog, N."""
        return len(self.codes)

    def vectors(self, items: Tensor) -> Tensor:
        """Returns the vectors of items, made of their codes alone."""
        if items.numel() > self.num_items:
            return functional.embedding(items, self._read(self.codes))
        return self._read(self.codes[items])

    def _read(self, codes: Tensor) -> Tensor:
        """Maps codes ``[..., L]`` to vectors ``[..., D]``."""
        parts = zip(codes.unbind(-1), self.inputs, strict=True)
        return self.mix(torch.stack([functional.embedding(*part) for part in parts]).sum(0))

    def logits(self, x: Tensor, level: int) -> Tensor:
        """Returns the logits ``[..., K_l]`` of a level.

        Args:
            x: ``[..., D]``, the state plus :attr:`before` of each code written so far.
            level: The level.
        """
        x = self.norms[level](self.steps[level](x))
        return functional.linear(x, self.heads[level].to(x.dtype)).float()

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean of -log P(SID of the target), smoothed as the model was told to."""
        total = states.new_zeros((), dtype=torch.float32)
        for logits, code in self._levels(states, targets):
            logp = logits.log_softmax(1)
            loss = functional.nll_loss(logp, code, ignore_index=IGNORED, reduction="sum")
            if self.label_smoothing:
                illegal = logp.isneginf()
                mean = logp.masked_fill(illegal, 0).sum(1) / (~illegal).sum(1)
                loss = loss.lerp(-mean.masked_fill(code == IGNORED, 0).sum(), self.label_smoothing)
            total = total + loss
        return total / (targets >= 0).sum().clamp(min=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors``; the SIDs stay with their table."""
        with atomic_folder(folder) as path:
            config = {"architecture": ARCHITECTURE, "codebook_sizes": list(self.sizes)}
            write_json(path / "config.json", {**config, "shape": asdict(self.timeline.shape)})
            save_file(self.state_dict(), path / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path, codes: np.ndarray) -> DepthGenerator:
        """Reads what :meth:`save_pretrained` wrote, for the catalog of these SIDs.

        No weight belongs to an item, so a catalog that has grown since needs no training.

        Args:
            folder: The folder.
            codes: SID of each item, int ``[N, L]``.

        Returns:
            The model in evaluation mode, on the CPU.

        Raises:
            InvalidData: there is no such model in the folder, or it is damaged.
            InvalidArgument: the SIDs do not fit its codebooks.
        """
        folder = Path(folder)
        if not is_depth_generator(folder):
            raise InvalidData(folder, "a saved DepthGenerator", "none")
        path, weights = folder / "config.json", folder / "model.safetensors"
        config = read_json(path)
        try:
            sizes, shape = config["codebook_sizes"], TimelineShape(**config["shape"])
        except (InvalidArgument, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise InvalidData(path, "sizes and shape of a DepthGenerator", got) from None
        model = cls(codes, sizes, shape)
        try:
            model.load_state_dict(load_file(weights))
        # Weights that are not those of the config are a RuntimeError.
        except (OSError, RuntimeError, SafetensorError) as error:
            expected = "a safetensors file of the weights of its config.json"
            raise InvalidData(weights, expected, error) from None
        return model.eval()

    def level_losses(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores each level given the true codes before it.

        Args:
            states: ``[M, D]``.
            targets: int64 ``[M]``, item indices; -100 where there is none.

        Returns:
            ``(losses, accuracy)``, fp32 ``[L]`` each: -log P(code) in nats and how often the most
            likely legal code is the right one, means over the targets.
        """
        losses, hits = [], []
        for logits, code in self._levels(states, targets):
            total = functional.cross_entropy(logits, code, ignore_index=IGNORED, reduction="sum")
            losses.append(total)
            hits.append((logits.argmax(1) == code).sum())
        count = (targets >= 0).sum().clamp(min=1)
        return torch.stack(losses) / count, torch.stack(hits) / count

    def _levels(self, states: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Goes through the levels, each given the true codes before it.

        Args:
            states: ``[M, D]``.
            targets: int64 ``[M]``, item indices; -100 where there is none.

        Yields:
            ``(logits, code)``: fp32 ``[M, K_l]`` with -inf at the illegal codes, and int64 ``[M]``,
            the code of the target or -100.
        """
        real = targets >= 0
        targets = targets.clamp(min=0)
        x = states
        for level, code in enumerate(self.codes[targets].unbind(1)):
            logits = self.logits(x, level).masked_fill(self._illegal(targets, level), -torch.inf)
            yield logits, code.where(real, IGNORED)
            if level + 1 < len(self.sizes):
                x = x + functional.embedding(code, self.before[level])

    def _illegal(self, items: Tensor, level: int) -> Tensor:
        """Tells which codes of a level no SID has behind the codes before it of items.

        Nothing here waits for the device, so that a training step can be a CUDA graph.

        Args:
            items: int64 ``[M]``.
            level: The level.

        Returns:
            bool ``[M, K_l]``.
        """
        width = -(-self.sizes[level] // 8)
        rows = self.mask_of[level].index_select(0, items)
        octets = self.masks[:, :width].index_select(0, rows).flatten()
        flags = self.octets.index_select(0, octets.int()).view(torch.bool)
        return flags.view(len(items), 8 * width)[:, : self.sizes[level]]

    @torch.no_grad()
    def score(
        self, histories: Sequence[np.ndarray], targets: np.ndarray, *, batch_size: int = 512
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores what comes after each history, each level given the true codes before it.

        Args:
            histories: Item indices in time order, one int array ``[n]``, ``n >= 1``, per request.
            targets: The item that comes next, int ``[B]``.
            batch_size: Requests per pass.

        Returns:
            ``(losses, accuracy)``, fp64 ``[L]`` each, as :meth:`level_losses` defines them.
        """
        self.eval()
        sums = np.zeros((2, len(self.sizes)))
        for low in range(0, len(targets), batch_size):
            wanted = torch.from_numpy(np.asarray(targets[low : low + batch_size], dtype=np.int64))
            states = self.last_states(histories[low : low + batch_size])
            found = self.level_losses(states, wanted.to(states.device))
            sums += len(wanted) * torch.stack(found).double().cpu().numpy()
        losses, accuracy = sums / len(targets)
        return losses, accuracy

    @torch.no_grad()
    def search(
        self,
        histories: Sequence[np.ndarray],
        num_beams: int,
        *,
        exclude_seen: bool = False,
        batch_size: int = 128,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the best SIDs after each history by constrained beam search.

        Args:
            histories: Item indices in time order, one int array ``[n]``, ``n >= 1``, per request.
            num_beams: W, the width of the beam.
            exclude_seen: Deny the SIDs all of whose items are in the history.
            batch_size: Requests per pass.

        Returns:
            ``(rows, scores)``, int64 and fp32 ``[B, W]``, best first: rows of the trie's table and
            sums of log-probabilities, of all SIDs also where some are denied; -1 and minus infinity
            where there are no more SIDs.

        Raises:
            InvalidArgument: ``num_beams`` is below 1.
            InvalidData: a history is empty, or an item index is outside the catalog.
        """
        num_beams = check_int("num_beams", num_beams)
        device = self.codes.device
        self.trie = self.trie.to(device)
        rows = np.full((len(histories), num_beams), -1, dtype=np.int64)
        scores = np.full((len(histories), num_beams), -np.inf, dtype=np.float32)
        # Beams that no prefix is left for would run through the model for nothing.
        widths = [min(num_beams, count) for count in self.trie.num_prefixes]
        for part, some in self.batches_of(histories, batch_size):
            x = self.last_states(some)[:, None]
            seen = self._seen_rows(some).to(device) if exclude_seen else None
            deny = None if seen is None else self.trie.deny(seen)
            states = self.trie.root_states(len(part))
            sums = torch.zeros(len(part), 1, device=device)
            for level in range(len(self.sizes)):
                logits, score = self.logits(x, level), "valid"
                if deny is not None:
                    # What is denied keeps its share, so that the others stay in their order.
                    logits, score = trie_mask(logits, states, self.trie, level), "full"
                step = trie_beam_step(
                    logits, sums, states, self.trie, level, k=widths[level], score=score, deny=deny
                )
                sums, states = step.scores, step.states
                if level + 1 < len(self.sizes):
                    x = x.take_along_dim(step.parents[..., None], 1)
                    x = x + functional.embedding(step.tokens.clamp(min=0), self.before[level])
            found = states[..., 0].masked_fill(sums.isneginf(), -1)
            rows[part, : widths[-1]] = found.cpu().numpy()
            scores[part, : widths[-1]] = sums.cpu().numpy()
        return rows, scores

    def _seen_rows(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Returns rows of the table of which each history has every item, int64 ``[B, D]``."""
        found = []
        for history in histories:
            rows, counts = np.unique(self.rows[np.unique(history)], return_counts=True)
            found.append(torch.from_numpy(rows[counts == self.sharing[rows]]))
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)


class _Gated(nn.Module):
    """A gated feed-forward network (Shazeer, 2020) added to its input."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.drop(self.down(functional.silu(gate) * value))


def _table(size: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, width) * 0.02)


def _masks(codes: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lays out which codes no SID has behind each prefix, a bit a code.

    A prefix with one child has the mask of that code, which all such prefixes share; most prefixes
    of a large catalog are of this kind.

    Args:
        codes: int64 ``[N, L]``.
        sizes: ``K_l``.

    Returns:
        ``(masks, mask_of)``: uint8 ``[R, ceil(max K / 8)]``, and int32 ``[L, N]``, the mask of the
        first l codes of each item.
    """
    masks, mask_of = [], np.empty(codes.T.shape, dtype=np.int32)
    prefix, first = np.zeros(len(codes), dtype=np.int64), 0
    for level, size in enumerate(sizes):
        edges, after = np.unique(prefix * size + codes[:, level], return_inverse=True)
        owner, code = np.divmod(edges, size)
        wide = np.bincount(owner) > 1
        mask = size - 1 + np.cumsum(wide)
        alone = ~wide[owner]
        mask[owner[alone]] = code[alone]
        legal = np.zeros((size + int(wide.sum()), -(-max(sizes) // 8)), dtype=np.uint8)
        np.bitwise_or.at(legal, (mask[owner], code // 8), (1 << code % 8).astype(np.uint8))
        mask_of[level] = first + mask[prefix]
        masks.append(~legal)
        prefix, first = after.ravel(), first + len(legal)
    return np.concatenate(masks), mask_of
