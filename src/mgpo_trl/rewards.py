r"""Rewards in TRL's signature: 1 for a right answer in the answer turn, else 0. Nothing here looks at boxes.

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

from collections.abc import Sequence

from .answers import extract_answer, judge


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
