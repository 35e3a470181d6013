"""Checks on the embeddings that a tokenizer is given, and their scaling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from plum.errors import InvalidArgument, check_int

# Rows that are copied to fp64 at once.
_CHUNK = 16384


def check_seed(seed: int) -> None:
    """Checks a seed of torch's and numpy's generators.

    Raises:
        InvalidArgument: it is no int in [0, 2^63).
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InvalidArgument("seed", "an int in [0, 2^63)", repr(seed))


def searchable(x: Tensor) -> Tensor:
    """Returns rows as the ops take them: fp64 as fp32, anything else as it is."""
    return x.float() if x.dtype == torch.float64 else x


def check_sizes(name: str, sizes: Sequence[int], *, fewest: int = 1) -> None:
    """Checks the argument ``name``: sizes of codebooks, or widths of layers.

    Raises:
        InvalidArgument: there are fewer than ``fewest``, or one is no int of at least 1.
    """
    if not isinstance(sizes, Sequence) or len(sizes) < fewest:
        raise InvalidArgument(name, "sizes of at least 1", repr(sizes))
    for size in sizes:
        check_int(name, size)


def check_modality_names(names: Iterable[str]) -> None:
    """Checks that modules can be kept under the names of modalities.

    Raises:
        InvalidArgument: a name is no string, is empty, holds a dot or is an attribute of
            :class:`torch.nn.ModuleDict`, as ``type``, ``keys`` and ``values`` are.
    """
    taken = nn.ModuleDict()
    for name in names:
        if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
            raise InvalidArgument(
                "input_dims",
                "names of modalities that are not empty, hold no dot and are no attribute of"
                " torch.nn.ModuleDict",
                repr(name),
                "rename the modality",
            )


def check_widths(input_dims: Mapping[str, int]) -> None:
    """Checks the widths of modalities.

    Raises:
        InvalidArgument: there is no modality, or a width is no int of at least 1.
    """
    if not isinstance(input_dims, Mapping) or not input_dims:
        raise InvalidArgument("input_dims", "modalities with widths >= 1", repr(input_dims))
    for name, width in input_dims.items():
        check_int(f"input_dims[{name!r}]", width)


def check_embeddings(
    embeddings: Mapping[str, Tensor], widths: Mapping[str, int] | None = None
) -> int:
    """Checks the embeddings of N items and returns N.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite.
        widths: The modalities that must be there and their ``D_m``; None accepts any.

    Raises:
        InvalidArgument: a modality, shape, dtype or value is not as above; rows that hold NaN or
            infinity are named.
    """
    count = check_shapes("embeddings", embeddings, widths)
    for name, x in embeddings.items():
        where = f"embeddings[{name!r}]"
        if not x.numel():
            raise InvalidArgument(where, "at least one value", list(x.shape))
        # The sum is finite only if every value is; it is read many times as fast.
        if not x.sum(dtype=torch.float32).isfinite():
            bad = torch.nonzero(~searchable(x).isfinite().all(dim=1)).flatten().tolist()
        else:
            bad = []
        if bad:
            rows = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" * (len(bad) > 5))
            raise InvalidArgument(
                where,
                "values that are finite in fp32",
                f"NaN or infinity in rows {rows}",
                "embed these items again or leave them out",
            )
    return count


def check_shapes(
    argument: str, embeddings: Mapping[str, Tensor], widths: Mapping[str, int] | None
) -> int:
    """Checks all but the values of embeddings, which may be of no item, and returns N.

    Args:
        argument: What the message calls the embeddings.
        embeddings: Modality to floating-point ``[N, D_m]``.
        widths: The modalities that must be there and their ``D_m``; None accepts any.

    Raises:
        InvalidArgument: a modality, shape or dtype is not as above.
    """
    if not isinstance(embeddings, Mapping):
        raise InvalidArgument(argument, "a mapping of modalities", type(embeddings).__name__)
    if not embeddings or (widths is not None and set(embeddings) != set(widths)):
        wanted = "at least one modality" if widths is None else f"the modalities {sorted(widths)}"
        raise InvalidArgument(argument, wanted, list(embeddings))
    count: int | str = "N"
    for name, x in embeddings.items():
        where = f"{argument}[{name!r}]"
        if not isinstance(x, Tensor):
            raise InvalidArgument(where, "a tensor", type(x).__name__)
        width = "D" if widths is None else widths[name]
        fits = x.ndim == 2 and x.is_floating_point() and count in ("N", len(x))
        if not fits or (widths is not None and x.shape[1] != width):
            got = f"{x.dtype} {list(x.shape)}"
            raise InvalidArgument(where, f"floating point [{count}, {width}]", got)
        count = len(x)
    return int(count)


def check_present(
    present: Mapping[str, Tensor] | None, embeddings: Mapping[str, Tensor], count: int
) -> None:
    """Checks the masks of items that have a modality.

    Args:
        present: Modality to bool ``[N]``; None, or a modality left out, for all.
        embeddings: The modalities there are.
        count: N.

    Raises:
        InvalidArgument: a modality is none of the embeddings', or a mask is not as above.
    """
    for name, mask in (present or {}).items():
        if name not in embeddings:
            raise InvalidArgument("present", f"modalities among {sorted(embeddings)}", repr(name))
        if mask.dtype != torch.bool or mask.shape != (count,):
            got = f"{mask.dtype} {list(mask.shape)}"
            raise InvalidArgument(f"present[{name!r}]", f"bool [{count}]", got)


class InputScaling(nn.Module):
    """Centers one modality and scales it to a mean variance of 1 a feature, or whitens it.

    Whitening rotates on the principal axes and scales each to variance 1, so that every direction
    counts alike in the reconstruction loss. Axes of little variance are damped: an axis of
    variance v is divided by ``sqrt(v + 0.1 mean(v))``.

    Attributes:
        center: ``[D]``.
        scale: Scalar, or ``[D]`` of the axes where it whitens.
        axes: ``[D, D]``, the principal axes as columns; None without whitening.
    """

    center: Tensor
    scale: Tensor
    axes: Tensor | None

    _DAMPING = 0.1

    def __init__(self, width: int, *, whiten: bool = False) -> None:
        """Creates the identity on ``[N, width]``, until :meth:`fit`."""
        super().__init__()
        self.center = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(width if whiten else ()), requires_grad=False)
        self.axes = nn.Parameter(torch.eye(width), requires_grad=False) if whiten else None

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Measures ``x`` ``[N, D]``, N >= 1."""
        count, width = x.shape
        # fp64, a chunk at a time: a copy of everything would be twice the embeddings.
        chunks = x.split(_CHUNK)
        center = torch.stack([part.double().sum(dim=0) for part in chunks]).sum(dim=0) / count
        self.center.copy_(center)
        covariance = center.new_zeros(width, width)
        variances = torch.zeros_like(center)
        for part in chunks:
            centered = part.double() - center
            if self.axes is None:
                variances += centered.square().sum(dim=0) / count
            else:
                covariance.addmm_(centered.T, centered, alpha=1 / count)
        variance = variances.mean() if self.axes is None else covariance.diagonal().mean()
        if not variance > 0:
            # A constant modality carries nothing; any scale will do for it.
            return
        if self.axes is None:
            self.scale.copy_(variance.rsqrt())
            return
        spread, axes = torch.linalg.eigh(covariance)
        self.scale.copy_((spread.clamp_min(0) + self._DAMPING * variance).rsqrt())
        # An eigenvector has no sign of its own; its largest entry is made positive.
        largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
        self.axes.copy_(axes * torch.sign(largest))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[N, D]`` scaled."""
        x = x.to(self.center) - self.center
        return (x if self.axes is None else x @ self.axes) * self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Returns scaled ``x`` ``[N, D]`` in the units of the inputs."""
        x = x / self.scale
        return (x if self.axes is None else x @ self.axes.T) + self.center
