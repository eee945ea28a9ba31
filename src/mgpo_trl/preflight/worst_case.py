"""The largest image, view and rollout of a dataset, found without decoding a pixel."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from ..boxes import Box, BoxStatus
from ..data.image_check import check_image, image_struct
from ..rollout import Rollout, RoundTemplate, Turn


class Fitted(NamedTuple):
    """Stands for a fitted image where only its size is asked for."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return (self.width, self.height)


@dataclass(frozen=True)
class RowLoad:
    """What one row asks of model and memory at most."""

    index: int
    """Place in the dataset."""
    id: str
    """Id of the row."""
    original: tuple[int, int]
    """Width and height of the image file, upright."""
    view: tuple[int, int]
    """Width and height that the model sees."""
    prompt_tokens: int
    """Tokens before the first sampled one, image placeholders included."""
    reply_tokens: int
    """Tokens of all replies, each with a crop as large as the view."""
    sampled_tokens: int
    """Most tokens that the model samples, in all rounds."""

    @property
    def tokens(self) -> int:
        """Length of the longest rollout."""
        return self.prompt_tokens + self.reply_tokens + self.sampled_tokens

    def __str__(self) -> str:
        megapixels = self.original[0] * self.original[1] / 1e6
        return (
            f"{self.id!r}: {self.original[0]}x{self.original[1]} ({megapixels:.1f} MP), seen at "
            f"{self.view[0]}x{self.view[1]}, prompt {self.prompt_tokens} tokens, rollout up to {self.tokens}"
        )


@dataclass(frozen=True)
class WorstCase:
    """Extremes of a dataset."""

    rows: int
    """Rows looked at."""
    longest: RowLoad
    """The row with the longest rollout."""
    largest: RowLoad
    """The row with the most original pixels: decoding it takes the most main memory."""


def find_worst_case(
    rows: Iterable[dict], template: RoundTemplate, token_budgets: list[int], quiet: bool = False
) -> WorstCase:
    """
    Read the header of every image and tokenize every prompt; a bar shows progress and the time left.

    Args:
        rows (`Iterable[dict]`): Canonical rows.
        template ([`~mgpo_trl.rollout.RoundTemplate`]): The conversation, with the pixel budget.
        token_budgets (`list[int]`): Most sampled tokens of each round.
        quiet (`bool`, *optional*, defaults to `False`): Without the bar.

    Raises:
        ValueError: An image can not be read or shown, or there is no row; the message names it.
    """
    longest = largest = None
    number = 0
    for number, row in enumerate(tqdm(rows, desc="looking at rows", unit="row", disable=quiet), start=1):
        load = row_load(number - 1, row, template, token_budgets)
        longest = load if longest is None or load.tokens > longest.tokens else longest
        largest = load if largest is None or _pixels(load) > _pixels(largest) else largest
    if longest is None:
        raise ValueError("The dataset has no rows. Give at least one.")
    return WorstCase(number, longest, largest)


def row_load(index: int, row: dict, template: RoundTemplate, token_budgets: list[int]) -> RowLoad:
    """What one row asks at most; see [`RowLoad`]."""
    try:
        original = check_image(image_struct(row["image"]))
        view = Fitted(*template.chat.fitted_size(original))
    except ValueError as error:
        raise ValueError(f"Row {row['id']!r}: the image {error}") from error
    rounds = len(token_budgets)
    messages = template.prompts.first_messages(row["question"], row.get("choices"), rounds)
    prompt_ids = template.chat.prompt_ids(messages, [view])
    return RowLoad(
        index=index,
        id=str(row["id"]),
        original=original,
        view=view.size,
        prompt_tokens=len(prompt_ids),
        reply_tokens=sum(_reply_tokens(row, view, template, number == rounds - 1) for number in range(1, rounds)),
        sampled_tokens=sum(token_budgets),
    )


def _reply_tokens(row: dict, view: Fitted, template: RoundTemplate, is_last: bool) -> int:
    """A crop of the whole image is as large as the view; the end of a cut turn is one token more."""
    rollout = Rollout(row["id"], row["question"], None, None, [], choices=row.get("choices"))
    turn = Turn([], "", False, box=Box(BoxStatus.OK), shown_px=(0, 0, *view.size))
    return len(template.chat.reply_ids(template.reply(rollout, turn, is_last), view)) + 1


def _pixels(load: RowLoad) -> int:
    return load.original[0] * load.original[1]
