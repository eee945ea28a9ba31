r"""Rewards in TRL's signature: 1 for a right answer in the answer turn, else 0; for counting, points that agree.
Nothing here looks at boxes.

TRL calls a reward function with lists, one entry a completion: `prompts`, `completions`, `completion_ids`, and every
column of the dataset. A completion of two rounds reads

```python
[
    {"role": "assistant", "content": '[{"bbox_2d": [250, 500, 500, 750], "label": "card"}]'},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
    {"role": "assistant", "content": "The card is blue. \\boxed{C}"},
]
```

and only its last turn is scored. TRL's own reward functions read `completion[0]`, which is the box.
"""

import math
from collections.abc import Callable, Sequence

from .answers import extract_answer, judge
from .points import Points, PointStatus, match_points, parse_points

POINT_RADIUS = 0.05
"""Largest distance of a point from what it counts, as a share of the image's diagonal."""


def answer_text(completion: str | list[dict]) -> str:
    """
    Text of the answer turn of a completion.

    Args:
        completion (`str` or `list[dict]`):
            A text, or the messages after the prompt; `content` is a text or a list of blocks.

    Returns:
        `str`: the text of the last message; empty if that is not the assistant's, because then nothing was answered.
    """
    if isinstance(completion, str):
        return completion
    if not completion or completion[-1]["role"] != "assistant":
        return ""
    content = completion[-1]["content"] or ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content if block.get("type") == "text")


def accuracy_reward(
    completions: list[str | list[dict]],
    answer: list[str] | None = None,
    choices: list[Sequence[str] | None] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    1.0 where the last `\boxed{}` of the answer turn is right, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as TRL passes them.
        answer (`list[str]`):
            Column `answer`: the letter where there are choices, else the text.
        choices (`list[Sequence[str]]`, *optional*):
            Column `choices`: texts of the options, or None for a free-form row.
        **kwargs:
            The other columns and arguments of TRL; not used.

    Returns:
        `list[float]`: one reward a completion.

    Raises:
        `ValueError`: if the column `answer` is missing, or an answer is not among its row's choices.
    """
    return _score(completions, answer, choices, "strict")


def flexible_accuracy_reward(
    completions: list[str | list[dict]],
    answer: list[str] | None = None,
    choices: list[Sequence[str] | None] | None = None,
    **kwargs,
) -> list[float]:
    r"""[`accuracy_reward`] in the judge's flexible mode: clear statements without `\boxed{}` count as well."""
    return _score(completions, answer, choices, "flexible")


def format_reward(
    completions: list[str | list[dict]], choices: list[Sequence[str] | None] | None = None, **kwargs
) -> list[float]:
    r"""
    1.0 where the answer turn gives an answer in `\boxed{}`, right or wrong, else 0.0. Optional; MGPO does not use it.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as TRL passes them.
        choices (`list[Sequence[str]]`, *optional*):
            Column `choices`. Where given, the box must hold one of the letters offered.
        **kwargs:
            The other columns and arguments of TRL; not used.

    Returns:
        `list[float]`: one reward a completion.
    """
    choices = choices if choices is not None else [None] * len(completions)
    pairs = zip(completions, choices, strict=True)
    return [float(extract_answer(answer_text(completion), options) is not None) for completion, options in pairs]


def point_reward(
    completions: list[str | list[dict]],
    rollouts: list | None = None,
    points: list[Sequence[Sequence[float]] | None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    radius_share: float = POINT_RADIUS,
    **kwargs,
) -> list[float | None]:
    r"""
    How well the points that the model names agree with those of the image: F1 of pairs within a radius. For counting,
    beside [`accuracy_reward`]. The first turn that names points counts; a turn that was shown a crop does not, because
    its points may be meant in either image.

    Worked example: three points named, two known, two pairs within the radius: precision 2/3, recall 1, F1 0.8.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as TRL passes them; not used, the turns are read from the rollouts.
        rollouts (`list`):
            [`~mgpo_trl.rollout.Rollout`] of each completion, which [`~mgpo_trl.MGPOTrainer`] passes.
        points (`list[Sequence[Sequence[float]]]`):
            Column `points`: (x, y) of each thing in pixels of the original image. `None` for a row without: no reward.
        log_metric (`Callable`, *optional*):
            TRL's, for `points/status/<name>`: the share of rollouts with each [`~mgpo_trl.points.PointStatus`].
        radius_share (`float`, *optional*, defaults to `0.05`):
            Largest distance of a pair, as a share of the image's diagonal.
        **kwargs:
            The other columns and arguments of TRL; not used.

    Returns:
        `list[float]`: one reward a completion between 0 and 1, `None` where no points are known.

    Raises:
        `ValueError`: if the column `points` or the rollouts are missing.
    """
    if points is None or rollouts is None:
        missing = "dataset column `points`" if points is None else "argument `rollouts`"
        raise ValueError(
            f"The point reward needs the {missing}, which is missing. Train with MGPOTrainer on rows with `points` "
            "(`--extra_columns points`, or a published counting set)."
        )
    named = [_named_points(rollout) for rollout in rollouts]
    for status in PointStatus if log_metric and named else ():
        log_metric(f"points/status/{status.value}", sum(one.status is status for one in named) / len(named))
    rows = zip(rollouts, named, points, strict=True)
    return [None if known is None else _point_f1(row, one, known, radius_share) for row, one, known in rows]


def _named_points(rollout) -> Points:
    """The points of the first turn that names any, among those that saw nothing but the view."""
    crops = [turn.shown_px is not None for turn in rollout.turns]
    turns = rollout.turns[: crops.index(True) + 1] if any(crops) else rollout.turns
    found = [parse_points(turn.text, rollout.view.size, rollout.coordinates) for turn in turns]
    return next((points for points in found if points.written), found[0])


def _point_f1(rollout, named: Points, targets: Sequence[Sequence[float]], radius_share: float) -> float:
    width, height = rollout.image.size
    if not targets or not named.written:
        return float(not targets and not named.written)
    scale = (width / rollout.view.width, height / rollout.view.height)
    placed = [(x * scale[0], y * scale[1]) for x, y in named.points_view]
    pairs = match_points(placed, [tuple(point) for point in targets], radius_share * math.hypot(width, height))
    return 2 * pairs / (named.written + len(targets))


def _score(
    completions: list[str | list[dict]],
    answer: list[str] | None,
    choices: list[Sequence[str] | None] | None,
    mode: str,
) -> list[float]:
    if answer is None:
        raise ValueError(
            "The accuracy reward needs the dataset column `answer`, which is missing. Add it (a letter where the row "
            "has `choices`, else the text), or pass other `reward_funcs`."
        )
    choices = choices if choices is not None else [None] * len(completions)
    rows = zip(completions, answer, choices, strict=True)
    return [float(judge(answer_text(completion), right, options, mode)) for completion, right, options in rows]
