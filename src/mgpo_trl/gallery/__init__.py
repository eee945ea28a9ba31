"""A gallery of rollouts: one self-contained HTML page, no network, everything that a model wrote shown as text."""

from .page import Card, Section, card_of, write_page
from .pictures import PICTURES_FILE, PictureReader, PictureWriter, decode, picture_of, pictures_of

__all__ = [
    "PICTURES_FILE", "Card", "PictureReader", "PictureWriter", "Section", "card_of", "decode", "picture_of",
    "pictures_of", "write_page",
]  # fmt: skip
