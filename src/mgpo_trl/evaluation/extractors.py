r"""
The field's own answer extractors, so that old numbers can be matched. They are loose: read them beside `strict`.

- `mme-realworld`, MME-RealWorld's evaluation script: after removing some phrases, the first capital A to E anywhere.
- `vstar`, lmms-eval's task for V*: the first of several patterns, beginning with a letter at the start of the text.
- `hrbench`, VLMEvalKit's exact matching, which HR-Bench is scored with: the one option letter among the words, else
  the one option text that occurs.

Each has known traps, which the tests hold: `"Based on the crop, \boxed{D}"` is B for the first and the second.
Written from their behaviour; no code is taken over.
"""

import re
from collections.abc import Callable, Sequence

_REMOVED_BY_MME = (
    "The best answer is", "The correct answer is", "The answer is", "The answer",
    "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip
_VSTAR_PATTERNS = (
    r"^([A-D])",
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]|]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)
_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Failed to obtain answer via API", "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip


def mme_realworld(text: str, choices: Sequence[str]) -> str | None:
    """First capital A to E, whatever it stands in; a short text without one is looked for in the options."""
    text = text.strip()
    for phrase in _REMOVED_BY_MME:
        text = text.replace(phrase, "")
    if found := re.search("[ABCDE]", text):
        return found[0]
    if len(text.split()) > 10:
        return None
    options = [f"({letter}) {choice}".lower() for letter, choice in zip("ABCDE", choices, strict=False)]
    return next((letter for letter, option in zip("ABCDE", options, strict=False) if text.lower() in option), None)


def vstar(text: str, choices: Sequence[str]) -> str | None:
    """The first pattern that matches the text in capitals; a lone letter in it otherwise."""
    text = text.strip().upper()
    for pattern in _VSTAR_PATTERNS:
        if found := re.search(pattern, text):
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def hrbench(text: str, choices: Sequence[str]) -> str | None:
    """The only option letter among the words, else the only option whose text occurs."""
    if any(refusal in text for refusal in _REFUSALS):
        return None
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    words = text.translate(_PUNCTUATION).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1:
        return found[0]
    held = [letter for letter, choice in zip(letters, choices, strict=True) if str(choice).lower() in text.lower()]
    return held[0] if len(held) == 1 else None


EXTRACTORS: dict[str, tuple[Callable[[str, Sequence[str]], str | None], str]] = {
    "mme-realworld": (mme_realworld, "MME-RealWorld's script: the first capital A to E in the text"),
    "vstar": (vstar, "lmms-eval's V* task: the first pattern, a leading letter before all others"),
    "hrbench": (hrbench, "VLMEvalKit's exact matching: the one option letter, or option text, that occurs"),
}
"""By name: the function, and one line on how it differs from `strict`."""


def resolve_scoring(scoring: str | None, dataset: str | None) -> str | None:
    """
    The extractor that `--scoring` names: `official` picks that of the dataset, `official:NAME` any.

    Raises:
        ValueError: There is none of that name, or none for the dataset.
    """
    from ..data.benchmarks import find_benchmark

    if scoring in (None, "strict"):
        return None
    kind, _, name = scoring.partition(":")
    if kind != "official" or (name and name not in EXTRACTORS):
        known = [f"official:{name}" for name in EXTRACTORS]
        raise ValueError(f"`--scoring` must be one of {['strict', 'official', *known]}, got {scoring!r}.")
    found = find_benchmark(dataset or "")
    name = name or (found[0].official if found else None)
    if name is None:
        raise ValueError(
            f"No official scoring is known for {dataset!r}. Name one: {[f'official:{name}' for name in EXTRACTORS]}."
        )
    return name
