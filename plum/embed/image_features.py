"""The built-in image encoder: colors, where they are, and the directions and grain of edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "colors-and-textures"
# Part of the cache's name: raised when the same image would get another vector.
VERSION = 2

# Width and height, divisible by the grids below.
_SIZE = (64, 96)
_COLOR_BINS = 4
_LAYOUT_CELLS = (12, 8)
_EDGE_CELLS = (6, 4)
_ORIENTATIONS = 8


def colors_and_textures(image: Image) -> np.ndarray:
    """Describes an image by four blocks, each scaled to length 1 before the whole is.

    1. colors, 64: square roots of the histogram over 4 x 4 x 4 cells of RGB, so that a dot product
       is the Bhattacharyya coefficient of two histograms.
    2. layout, 288: mean RGB of 12 x 8 cells, less the mean gray.
    3. edges, 192: square roots of the mean gradient of the luma in 6 x 4 cells and 8 directions,
       each pixel shared by the two nearest directions: histograms of oriented gradients (Dalal &
       Triggs, CVPR 2005) without overlapping blocks.
    4. texture, 10: square roots of the histogram of rotation-invariant uniform local binary
       patterns of the 8 neighbors of a pixel (Ojala et al., TPAMI 2002) in the luma.

    Nothing is trained or random: the same pixels give the same vector, up to the last bits of
    float32, as long as Pillow resizes alike. A block of an image that has nothing of the kind, as
    the edges of a plain surface, is zero.

    Args:
        image: Any size; it is resized to 64 x 96 pixels (Pillow's box filter).

    Returns:
        float32 ``[554]``, of length 1.
    """
    from PIL.Image import Resampling

    pixels = np.asarray(image.convert("RGB").resize(_SIZE, Resampling.BOX), dtype=np.int64)
    # Integers, so that equal pixels are equal here too.
    luma = pixels @ np.array([299, 587, 114])
    layout = _cell_means(pixels, _LAYOUT_CELLS)
    blocks = (_colors(pixels), layout - layout.mean(), _edges(luma), _texture(luma))
    units = [block.ravel() / (np.linalg.norm(block) or 1.0) for block in blocks]
    vector = np.concatenate(units)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def _cell_means(values: np.ndarray, cells: tuple[int, int]) -> np.ndarray:
    rows, columns = cells
    height, width = values.shape[0] // rows, values.shape[1] // columns
    return values.reshape(rows, height, columns, width, -1).mean(axis=(1, 3))


def _colors(pixels: np.ndarray) -> np.ndarray:
    bins = pixels * _COLOR_BINS // 256
    flat = (bins[..., 0] * _COLOR_BINS + bins[..., 1]) * _COLOR_BINS + bins[..., 2]
    return np.sqrt(np.bincount(flat.ravel(), minlength=_COLOR_BINS**3))


def _edges(luma: np.ndarray) -> np.ndarray:
    down, across = np.gradient(luma.astype(np.float64))
    strength = np.hypot(down, across)
    # Directions of 0 and 180 degrees are the same edge.
    angle = np.arctan2(down, across) % np.pi * (_ORIENTATIONS / np.pi)
    lower = np.floor(angle).astype(np.int64)
    weight = angle - lower
    planes = np.zeros((*luma.shape, _ORIENTATIONS))
    rows, columns = np.indices(luma.shape)
    planes[rows, columns, lower % _ORIENTATIONS] += strength * (1 - weight)
    planes[rows, columns, (lower + 1) % _ORIENTATIONS] += strength * weight
    return np.sqrt(_cell_means(planes, _EDGE_CELLS))


def _texture(luma: np.ndarray) -> np.ndarray:
    center = luma[1:-1, 1:-1]
    ring = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    height, width = center.shape
    brighter = np.stack([luma[r : r + height, c : c + width] >= center for r, c in ring])
    changes = (brighter != np.roll(brighter, 1, axis=0)).sum(axis=0)
    # 0 to 8 brighter neighbors in one arc; all patterns with more arcs are one bin.
    patterns = np.where(changes <= 2, brighter.sum(axis=0), 9)
    return np.sqrt(np.bincount(patterns.ravel(), minlength=10))
