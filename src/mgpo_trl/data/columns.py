"""Which column of a source is which of ours."""

import difflib
import logging
from collections.abc import Mapping, Sequence

from .schema import COLUMNS, REQUIRED, DataError

logger = logging.getLogger(__name__)

# Names that other data sets use for what we would otherwise drop without a word.
_ALIASES = {
    "options": "choices", "multi-choice options": "choices", "bbox": "target_boxes", "bboxes": "target_boxes",
    "bbox_2d": "target_boxes", "boxes": "target_boxes", "box": "target_boxes", "target_bbox": "target_boxes",
}  # fmt: skip


def resolve_columns(
    found: Sequence[str], columns: Mapping[str, str] | None, extra_columns: Sequence[str], source: str
) -> dict[str, str]:
    """
    Maps our column names to those of the source. Columns that are neither ours nor asked for are left out, and logged.

    Args:
        found (`Sequence[str]`): Columns of the source.
        columns (`Mapping` or `None`): Our name to theirs, where they differ.
        extra_columns (`Sequence[str]`): Further columns to keep.
        source (`str`): What to call the source in messages.

    Raises:
        `DataError`: a named column does not exist, a required one is missing, or a left-out one looks like ours.
    """
    columns = dict(columns or {})
    listed = f"Columns found in {source}: {', '.join(map(str, found)) or 'none'}."
    _check_named(columns, extra_columns, found, listed)
    mapping = {ours: columns.get(ours, ours) for ours in COLUMNS if columns.get(ours, ours) in found}
    if missing := [name for name in REQUIRED if name not in mapping]:
        raise DataError(
            f"The column `{missing[0]}` is missing. {listed} If it has another name there, pass "
            f"columns={{'{missing[0]}': 'its name'}}."
        )
    ignored = [name for name in found if name not in mapping.values() and name not in extra_columns]
    _refuse_lookalikes(ignored, mapping, listed)
    if ignored:
        logger.info("Leaving out the columns %s of %s.", ignored, source)
    return mapping


def _check_named(columns: Mapping, extra_columns: Sequence[str], found: Sequence[str], listed: str) -> None:
    if unknown := [ours for ours in columns if ours not in COLUMNS]:
        raise DataError(f"`columns` maps `{unknown[0]}`, which is none of our columns. Ours are {', '.join(COLUMNS)}.")
    if unknown := [theirs for theirs in (*columns.values(), *extra_columns) if theirs not in found]:
        raise DataError(f"There is no column `{unknown[0]}`. {listed} Name one of these.")
    if clash := [name for name in extra_columns if name in COLUMNS]:
        raise DataError(f"`extra_columns` names `{clash[0]}`, which is one of ours. Take it out of `extra_columns`.")
    if twice := [theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1]:
        raise DataError(f"`columns` uses the column `{twice[0]}` twice. Map each column once.")


def _refuse_lookalikes(ignored: Sequence[str], mapping: Mapping[str, str], listed: str) -> None:
    absent = [name for name in COLUMNS if name not in mapping]
    for name in ignored:
        plain = str(name).strip().lower()
        close = difflib.get_close_matches(plain, [ours for ours in absent if len(ours) > 2], n=1, cutoff=0.8)
        ours = _ALIASES.get(plain, close[0] if close else None)
        if ours in absent:
            raise DataError(
                f"Unknown column `{name}`: it looks like our `{ours}`. Pass columns={{'{ours}': '{name}'}} to use it "
                f"as such, or name it in `extra_columns`. {listed}"
            )
