"""Random partners of items, from the pairs that are taken together."""

from __future__ import annotations

import torch
from torch import Tensor

from plum.errors import InvalidArgument


class Partners:
    """The partners of each item, from which one is drawn uniformly."""

    def __init__(self, pairs: Tensor, count: int) -> None:
        """Indexes pairs, each of which makes either item a partner of the other.

        Args:
            pairs: int64 ``[P, 2]``, P >= 1, item rows, two different ones a pair.
            count: Number of items ``N``.

        Raises:
            InvalidArgument: ``pairs`` is not as above.
        """
        if pairs.dtype != torch.int64 or pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise InvalidArgument(
                "pairs", "int64 [P, 2], not empty", f"{pairs.dtype} {list(pairs.shape)}"
            )
        wrong = ((pairs < 0) | (pairs >= count)).any(dim=1) | (pairs[:, 0] == pairs[:, 1])
        if bool(wrong.any()):
            row = int(torch.nonzero(wrong)[0])
            expected = f"two different items in [0, {count})"
            raise InvalidArgument(f"pairs[{row}]", expected, pairs[row].tolist())
        both = torch.cat([pairs, pairs.flip(1)]).cpu()
        order = both[:, 0].argsort(stable=True)
        self._partners = both[order, 1]
        self._degrees = both[:, 0].bincount(minlength=count)
        self._starts = self._degrees.cumsum(0) - self._degrees

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Returns a partner of each of ``rows``, int64 ``[n]`` on the CPU; -1 where it has none."""
        draws = torch.rand(len(rows), dtype=torch.float64, generator=generator, device="cpu")
        degrees = self._degrees[rows]
        places = self._starts[rows] + (draws * degrees).long()
        found = self._partners[places.clamp_max(len(self._partners) - 1)]
        return torch.where(degrees > 0, found, -1)

    def batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Adds a partner for each of ``rows`` that has one.

        Returns:
            int64 ``[n]``, the rows and after them their partners; and for each its partner's place
            in that list, -1 for none.
        """
        found = self.draw(rows, generator)
        anchors = torch.nonzero(found >= 0).flatten()
        places = torch.full((len(rows),), -1, device=rows.device)
        places[anchors] = torch.arange(len(anchors), device=rows.device) + len(rows)
        return torch.cat([rows, found[anchors]]), torch.cat([places, anchors])
