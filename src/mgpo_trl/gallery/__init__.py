"""A gallery of rollouts: one self-contained HTML page, no network, everything that a model wrote shown as text."""

from .page import Card, Section, card_of, write_page
from .pictures import PICTURES_FILE, PictureReader, PictureWriter, picture_of

__all__ = ["PICTURES_FILE", "Card", "PictureReader", "PictureWriter", "Section", "card_of", "picture_of", "write_page"]
