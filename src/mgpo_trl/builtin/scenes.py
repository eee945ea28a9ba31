"""Scenes of the built-in task: noisy pictures in which small hatched cards hide. NumPy and Pillow only.

One scene is 336x336 pixels in a 3x3 lattice of cells. A card fills a cell up to a margin; its colour is plain even in
the 84x84 view that the model sees, its hatch (period 3 or 4 pixels) is not: it is legible only after a crop of the
original. The red-blue gradient of the background is what lets a small model tell where in the view it looks, because
rotary positions act on attention scores and leave no absolute position in the visual tokens.

    >>> scene = draw_scene(seed=1, num_cards=1)
    >>> scene.image.size, len(scene.cards), scene.cards[0].box_original_px
    ((336, 336), 1, (8, 120, 104, 216))
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

GRID = 3
"""Cells a side."""
CELL = 112
"""Side of a cell in original pixels: one 28-pixel visual token of the 84x84 view."""
MARGIN = 8
"""Distance from a card to the border of its cell."""
SIDE = GRID * CELL
"""Side of a scene in original pixels."""
MAX_PIXELS, MIN_PIXELS = 84 * 84, 56 * 56
"""Pixel budget of the task: a scene is seen as 3x3 visual tokens, and so is the crop of a cell."""
_HATCH_INSET = 12
_BLOTCH = 4

COLOURS = {
    "red": (215, 55, 55),
    "orange": (240, 150, 40),
    "yellow": (235, 225, 70),
    "green": (60, 170, 70),
    "cyan": (70, 205, 215),
    "blue": (60, 85, 215),
    "purple": (140, 65, 190),
    "white": (240, 240, 240),
}
"""Card colours by name."""

HATCHES = ("vertical lines", "horizontal lines", "rising lines", "falling lines")
"""What can be on a card, in the order of the answer letters."""


@dataclass(frozen=True)
class Card:
    """One hatched card."""

    cell: int
    """Cell number in reading order, 0-8."""
    colour: str
    """Name of the colour, a key of `COLOURS`."""
    hatch: int
    """Index into `HATCHES`."""

    @property
    def box_original_px(self) -> tuple[int, int, int, int]:
        """Corners of the card in original pixels."""
        x1, y1, _, _ = cell_box(self.cell)
        return x1 + MARGIN, y1 + MARGIN, x1 + CELL - MARGIN, y1 + CELL - MARGIN


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it."""

    image: Image.Image
    """RGB picture of `SIDE` x `SIDE` pixels."""
    cards: tuple[Card, ...]
    """Cards in reading order."""


def cell_box(cell: int, cell_px: int = CELL) -> tuple[int, int, int, int]:
    """Corners of cell number `cell` where a cell is `cell_px` wide: 112 in the original, 28 in the 84x84 view."""
    row, column = divmod(cell, GRID)
    return column * cell_px, row * cell_px, (column + 1) * cell_px, (row + 1) * cell_px


def draw_scene(seed: int | tuple[int, ...], num_cards: int, asked: int = 0, hatch: int | None = None) -> Scene:
    """
    Draw the scene of a seed: cards of distinct colours in distinct cells, each with a hatch of its own.

    The hatches are drawn independently of each other, so a wrong card pays as often as chance: where wrong crops never
    pay, training collapses to unusable boxes.

    Args:
        seed (`int` or `tuple[int, ...]`): Seed of everything in the scene; equal seeds give equal pixels.
        num_cards (`int`): Number of cards, 1 to 8.
        asked (`int`, *optional*, defaults to `0`): The card, counted in reading order, to which `hatch` applies.
        hatch (`int`, *optional*): Index into `HATCHES` for that card. By default it is drawn like the others.
    """
    rng = np.random.default_rng(seed)
    cells = np.sort(rng.choice(GRID * GRID, num_cards, replace=False))
    colours = rng.choice(list(COLOURS), num_cards, replace=False)
    hatches = rng.integers(len(HATCHES), size=num_cards)
    hatches[asked] = hatches[asked] if hatch is None else hatch
    cards = tuple(
        Card(int(cell), str(colour), int(hatch)) for cell, colour, hatch in zip(cells, colours, hatches, strict=True)
    )
    canvas = _background(rng)
    for card in cards:
        x1, y1, x2, y2 = card.box_original_px
        canvas[y1:y2, x1:x2] = _card_pixels(card, rng)
    return Scene(Image.fromarray(canvas), cards)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Grey with a fixed red gradient along x, a blue one along y, and blotches of 4 pixels; (SIDE, SIDE, 3) bytes."""
    side = SIDE // _BLOTCH
    ramp = np.linspace(-60, 60, side)
    small = np.full((side, side, 3), 128.0)
    small[:, :, 0] += ramp[None, :]
    small[:, :, 2] += ramp[:, None]
    return _enlarge(_to_bytes(small + rng.normal(0, 10.0, (side, side, 1))))


def _card_pixels(card: Card, rng: np.random.Generator) -> np.ndarray:
    """A frame in the card's colour around a paler plate with the hatch; (96, 96, 3) bytes."""
    side = CELL - 2 * MARGIN
    colour = np.array(COLOURS[card.colour], dtype=float)
    pixels = np.tile(colour, (side, side, 1))
    inner = slice(_HATCH_INSET, side - _HATCH_INSET)
    lines = _hatch(HATCHES[card.hatch], side - 2 * _HATCH_INSET, int(rng.integers(4)))
    pixels[inner, inner] = 0.5 * colour + 64 + 85 * lines[:, :, None]
    blotches = _enlarge(rng.normal(0, 12.0, (side // _BLOTCH, side // _BLOTCH, 1)))
    return _to_bytes(pixels + blotches + rng.normal(0, 8.0, (side, side, 1)))


def _hatch(kind: str, side: int, phase: int) -> np.ndarray:
    """
    Lines two pixels wide, -1 and 1 in turn, of shape (side, side). Their period of 4 is what one pixel of the view
    covers, so that resampling leaves their mean alone, and that is the same for every kind.
    """
    y, x = np.mgrid[:side, :side]
    along = {"vertical lines": x, "horizontal lines": y, "rising lines": x + y, "falling lines": x - y}[kind]
    edge = np.minimum(np.arange(side) + 0.5, side - 0.5 - np.arange(side))
    fade = np.sin(np.pi / 2 * np.minimum(edge / 5, 1)) ** 2
    return np.where((along + phase) % 4 < 2, -1.0, 1.0) * fade * fade[:, None]


def _enlarge(small: np.ndarray) -> np.ndarray:
    """Every pixel as a square of `_BLOTCH` x `_BLOTCH` pixels."""
    return small.repeat(_BLOTCH, axis=0).repeat(_BLOTCH, axis=1)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.clip(pixels, 0, 255).astype(np.uint8)
