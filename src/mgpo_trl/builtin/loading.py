"""The built-in task as a dataset by name: `builtin:needle` and `builtin:refer`."""

from ..data import LoadedRows
from .needle import LEVELS

BUILTIN_PREFIX = "builtin:"
ROWS = {"train": 1500, "heldout": 512}
"""Number of scenes in each split."""


def builtin_level(spec: str) -> str:
    """
    The level that `builtin:LEVEL` names.

    Raises:
        ValueError: There is no such level.
    """
    level = spec.removeprefix(BUILTIN_PREFIX)
    if level not in LEVELS:
        raise ValueError(f"There is no built-in dataset {spec!r}. Use {[BUILTIN_PREFIX + name for name in LEVELS]}.")
    return level


def load_builtin(spec: str, split: str | None = None, seed: int = 0, limit: int | None = None) -> LoadedRows:
    """
    Draw the scenes of a split.

    Args:
        spec (`str`): `"builtin:needle"` or `"builtin:refer"`.
        split (`str`, *optional*): `"train"` (1500 scenes) or `"heldout"` (512 scenes, the default).
        seed (`int`, *optional*, defaults to `0`): Seed of the scenes.
        limit (`int`, *optional*): Draw the first scenes only.
    """
    from .needle import make_dataset

    level, split = builtin_level(spec), split or "heldout"
    if split not in ROWS:
        raise ValueError(f"The built-in dataset has no split {split!r}. Use one of {list(ROWS)}.")
    n = min(ROWS[split], limit or ROWS[split])
    return LoadedRows(make_dataset(level, split, n, seed), [], f"{spec}/{split}")
