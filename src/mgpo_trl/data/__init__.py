"""Data sets of images with questions: one row format, one adapter a source."""

from .loading import LoadedRows, load_rows
from .schema import COLUMNS, DataError, RowError, check_rows, normalise_row

__all__ = ["COLUMNS", "DataError", "LoadedRows", "RowError", "check_rows", "load_rows", "normalise_row"]
