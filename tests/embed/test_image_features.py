"""The built-in image encoder, on pictures whose description can be said by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from plum.embed import colors_and_textures

COLORS, LAYOUT, EDGES, TEXTURE = np.split(np.arange(554), [64, 352, 544])


def blocks(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the four blocks of a picture, each of length 1 or 0."""
    vector = colors_and_textures(Image.fromarray(pixels.astype(np.uint8)))
    assert vector.dtype == np.float32 and np.linalg.norm(vector) == pytest.approx(1)
    parts = [vector[part] for part in (COLORS, LAYOUT, EDGES, TEXTURE)]
    return tuple(part / (np.linalg.norm(part) or 1) for part in parts)


def plain(color: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(color), (96, 64, 3)).copy()


def test_a_plain_surface() -> None:
    colors, layout, edges, texture = blocks(plain((255, 130, 0)))
    # Cells 3, 2 and 0 of red, green and blue.
    assert np.flatnonzero(colors).tolist() == [3 * 16 + 2 * 4]
    expected = np.array([255, 130, 0]) - 385 / 3
    np.testing.assert_allclose(
        layout.reshape(96, 3), np.tile(expected / np.linalg.norm(np.tile(expected, 96)), (96, 1)),
        atol=1e-6,
    )  # fmt: skip
    assert not edges.any()
    # Every neighbor is as bright: one arc of eight.
    assert np.flatnonzero(texture).tolist() == [8]


def test_a_gray_surface_has_no_layout() -> None:
    assert not blocks(plain((90, 90, 90)))[1].any()


def test_colors_are_the_roots_of_shares() -> None:
    picture = plain((10, 10, 10))
    picture[:24] = (250, 10, 10)
    colors = blocks(picture)[0]
    assert colors[0] == pytest.approx(np.sqrt(3 / 4)) and colors[48] == pytest.approx(
        np.sqrt(1 / 4)
    )


def test_the_layout_says_where() -> None:
    picture = plain((0, 0, 0))
    picture[8:16, 16:24] = 255
    layout = blocks(picture)[1].reshape(12, 8, 3)
    assert np.argwhere(layout[..., 0] > 0).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("slope", "direction"),
    [((1, 0), 0), ((1, 1), 2), ((0, 1), 4), ((-1, 1), 6)],
)
def test_edges_have_a_direction(slope: tuple[int, int], direction: int) -> None:
    across, down = np.meshgrid(np.arange(64), np.arange(96))
    ramp = 90 + slope[0] * across + slope[1] * down
    edges = blocks(np.repeat(ramp[..., None], 3, axis=2))[2].reshape(24, 8)
    np.testing.assert_allclose(edges[:, direction], np.sqrt(1 / 24), atol=1e-6)
    # A direction and its opposite are one edge.
    falling = blocks(np.repeat(255 - ramp[..., None], 3, axis=2))[2].reshape(24, 8)
    assert falling.sum(axis=0).argmax() == direction


def test_texture_tells_stripes_from_noise() -> None:
    stripes = plain((0, 0, 0))
    stripes[:, ::2] = 255
    # On a dark stripe all neighbors are as bright or brighter, on a bright one those above and
    # below are: two arcs, which fall into the bin of the rest.
    np.testing.assert_allclose(blocks(stripes)[3][[8, 9]], np.sqrt([1 / 2, 1 / 2]), atol=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3))
    texture = blocks(noise)[3]
    assert (texture[1:8] > 0).all() and texture[9] > texture[8]


def test_size_and_mode_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (96, 64, 3), dtype=np.uint8))
    large = small.resize((128, 192), Image.Resampling.NEAREST)
    np.testing.assert_allclose(colors_and_textures(large), colors_and_textures(small), atol=1e-6)
    gray = small.convert("L")
    np.testing.assert_array_equal(
        colors_and_textures(gray), colors_and_textures(gray.convert("RGB"))
    )
