r"""Answers: the choices of a question, what a text answers, and the one judge for rewards and evaluation alike.

```python
>>> choices = ["red", "green", "blue"]
>>> extract_answer(r"The crop shows a blue card: \boxed{\text{(c)}}.", choices)
'C'
>>> extract_answer("The answer is C.", choices) is None, extract_answer("The answer is C.", choices, "flexible")
(True, 'C')
>>> extract_answer("A cat is shown, so after zooming in, it is C.", choices, "flexible") is None
True
```

`strict` reads the last closed `\boxed{}` and nothing else. `flexible` falls back, in this order, to the exact text of
a choice in that box, to the last clear statement about the answer, and to a text that consists of nothing but a letter
or a choice. A letter that merely starts or ends a sentence counts in neither.
"""

import ast
import numbers
import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import cache, reduce

LETTERS = string.ascii_uppercase
MODES = ("strict", "flexible")

_BOX = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|rm|bf)\s*\{([^{}]*)\}")
_LEADING_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:])\s*")
_ANNOUNCEMENT = re.compile(
    r"(?:(?:^|(?<=[.?!])\s)(?:options?|choices)|\b(?:the |multi-?)?choices? (?:are )?listed below|选项如下所示)"
    r"[:：.]?$",
    re.I,
)
_LINE_LETTER = re.compile(rf"^{_LEADING_LETTER.pattern}", re.MULTILINE)
_INLINE_LETTER = re.compile(r"(?<!\S)(?:\([A-Z]\)|[A-Z][).:])(?=\s)")
_STATEMENT = re.compile(r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?: is ?:?| ?[:=])[ \n]?", re.I)
_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s|$))*")
_MARKUP = re.compile(r"[*$`]|\\[()\[\]]")
_WHITE_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,3})?", re.ASCII)
_WRAPS = " \t\r\n\"'`*$()[]{}"
_EDGES = _WRAPS + ".,;:!?"
_LONGEST_SHORT_ANSWER, _MOST_STATEMENTS = 64, 100


def format_choices(choices: Sequence[str]) -> str:
    """Writes choices the way prompts show them, one lettered line each: `"(A) red\\n(B) blue"`."""
    return "\n".join(f"({letter}) {text}" for letter, text in zip(letters_of(choices), choices, strict=True))


def letters_of(choices: Sequence[str]) -> str:
    """The letters offered, as one string: `"ABC"` for three choices. Raises `ValueError` unless there are 2 to 26."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"`choices` must hold 2 to {len(LETTERS)} texts, got {len(choices)}. Fix the choices.")
    return LETTERS[: len(choices)]


def parse_choices(value: Sequence | Mapping | str) -> list[str]:
    """
    Reads the choices of a question in any of the layouts that datasets use.

    Args:
        value (`Sequence`, `Mapping` or `str`):
            A list of texts, plain or all lettered (`"(A) red"`, `"A. red"`, `"A) red"`, `"A: red"`); a dictionary
            `{"A": "red", ...}`, where None marks a letter not used; a string of lettered choices, a line each or all
            on one line; or a list of texts written as a string. Letters decide the order.

    Returns:
        `list[str]`: the texts without letters, in the order of the letters.

    Raises:
        `ValueError`: for fewer than 2 or more than 26 choices, one without text, or another layout.
    """
    items, must_be_lettered = _choice_items(value)
    letters_of(items)
    choices = _strip_letters(["" if item is None else str(item).strip() for item in items], must_be_lettered)
    if not all(choices):
        raise ValueError(f"Every choice needs a text, got {choices}. Fill in or drop the empty one.")
    return choices


def split_question(text: str) -> tuple[str, list[str] | None]:
    """
    Parts a question from the lettered choices that its text carries, one a line.

    ```python
    >>> split_question("What is red?\\n(A) a dog\\n(B) a cat\\nAnswer with the letter.")
    ('What is red?', ['a dog', 'a cat'])
    ```

    Args:
        text (`str`):
            The question, then the choices, each on a line that begins with its letter, `"(A) ..."`, `"A. ..."`,
            `"A) ..."` or `"A: ..."` from A without gaps; lines between two letters belong to the first. Words that
            only announce choices ("Options:", "The choices are listed below:") are left out, and every line after that
            of the last letter.

    Returns:
        `tuple`: the question, and the texts of the choices; `None` for the choices where there are none, and then the
        whole text is the question.
    """
    lines = text.strip().splitlines()
    found = [(number, match) for number, line in enumerate(lines) if (match := _LEADING_LETTER.match(line))]
    letters = "".join(match[match.lastindex] for _, match in found).upper()
    if not 2 <= len(found) <= len(LETTERS) or letters != LETTERS[: len(found)]:
        return text.strip(), None
    starts = [number for number, _ in found]
    ends = [*starts[1:], starts[-1] + 1]
    items = [" ".join(lines[start:end]) for start, end in zip(starts, ends, strict=True)]
    choices = [item[_LEADING_LETTER.match(item).end() :].strip() for item in items]
    question = "\n".join(_ANNOUNCEMENT.sub("", line.strip()) for line in lines[: starts[0]]).strip()
    return (question, choices) if question and all(choices) else (text.strip(), None)


def normalise_answer(answer: str | int | float, choices: Sequence[str] | None) -> str:
    """
    Brings the answer of a dataset row into the form that [`judge`] takes.

    Args:
        answer (`str`, `int` or `float`):
            With choices a letter (`"b"`, `"(B)"`, `"B."`), a letter with its text (`"(B) blue"`), the text of a
            choice, or an integer index from 0. A letter is read as a letter even where a choice has it as its text.
            Without choices any text or number.
        choices (`Sequence[str]` or `None`):
            Texts of the options, or None for a free-form question.

    Returns:
        `str`: a letter with choices, else the text.

    Raises:
        `ValueError`: if the answer is empty, of another type, or not among the choices.
    """
    is_value = isinstance(answer, str | numbers.Real) and not isinstance(answer, bool) and answer == answer
    if not is_value or not str(answer).strip():
        raise ValueError(f"`answer` must be a text or a number, got {answer!r}. Fill in the row's answer.")
    if choices is None:
        return str(answer).strip()
    letters = letters_of(choices)
    if isinstance(answer, numbers.Integral):
        letter = dict(enumerate(letters)).get(answer)
    else:
        letter = _as_letter(str(answer), letters) or _match_choice(str(answer), choices)
    if letter is None:
        offered = format_choices(choices).replace("\n", " ")
        raise ValueError(f"`answer` must be a letter, text or index of the choices {offered}, got {answer!r}. Fix it.")
    return letter


def extract_answer(text: str, choices: Sequence[str] | None, mode: str = "strict") -> str | None:
    r"""
    Reads what a text answers. Never raises on any text, and takes time linear in its length.

    Args:
        text (`str`):
            The answer turn.
        choices (`Sequence[str]` or `None`):
            Texts of the options, or None for a free-form question.
        mode (`str`, *optional*, defaults to `"strict"`):
            `"strict"` reads the last closed `\boxed{}` only: with choices it must hold one of the letters offered, up
            to case, brackets, `\text{}` and punctuation. `"flexible"` also takes the exact text of a choice, boxed or
            as the whole text, and clear statements such as "the answer is C", "Answer: B", "the best option is (D)".

    Returns:
        `str`: a letter with choices, else the text of the answer; None if there is none.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
    boxed = _last_boxed(text)
    if choices is None:
        return _extract_free(text, boxed, mode)
    letters = letters_of(choices)
    letter = _as_letter(boxed or "", letters)
    if letter or mode == "strict":
        return letter
    letter = _match_choice(boxed or "", choices)
    return letter or _stated_letter(text, choices) or _as_letter(text, letters) or _match_choice(text, choices)


def judge(text: str, answer: str, choices: Sequence[str] | None = None, mode: str = "strict") -> bool:
    """
    Whether a text gives the right answer. The only judge: rewards and evaluation both call it.

    Args:
        answer (`str`):
            With choices the letter, as [`normalise_answer`] returns it, else the text. Texts are compared up to case,
            white space, punctuation at the ends and a leading article; numbers as numbers (3 = 3.0, 1,000 = 1000).
        text (`str`), choices (`Sequence[str]`, *optional*), mode (`str`, *optional*, defaults to `"strict"`):
            As in [`extract_answer`].

    Raises:
        `ValueError`: if the answer is not one of the letters offered, or is empty (a bad dataset row).
    """
    if choices is not None and (not isinstance(answer, str) or len(answer) != 1 or answer not in letters_of(choices)):
        raise ValueError(
            f"`answer` must be one of the letters {list(letters_of(choices))} of the {len(choices)} choices, got "
            f"{answer!r}. Bring the row's answer into that form with `normalise_answer`."
        )
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` must be a text that is not empty, got {answer!r}. Fill in the row's answer.")
    given = extract_answer(text, choices, mode)
    if given is None or choices is not None:
        return given == answer
    return _canonical(given) == _canonical(answer)


def verdict(text: str, answer: str | None, choices: Sequence[str] | None = None) -> bool | None:
    """[`judge`] for showing: `None` where there is nothing to judge by, no answer or one that is not offered."""
    try:
        return judge(text, answer, choices)
    except ValueError:
        return None


def _extract_free(text: str, boxed: str | None, mode: str) -> str | None:
    """A free-form answer: boxed, else what the last statement says to the end of its sentence, else a short text."""
    said = _unwrap(boxed or "").strip()
    if said or mode == "strict":
        return said or None
    plain = _plain(text)
    statements = list(_STATEMENT.finditer(plain))
    said = _SENTENCE.match(plain, statements[-1].end())[0].strip() if statements else plain
    return said if said and (statements or (len(said) <= _LONGEST_SHORT_ANSWER and "\n" not in said)) else None


def _last_boxed(text: str) -> str | None:
    r"""What is inside the last `\boxed{` that is closed, found in one pass over the braces."""
    stack, boxes = [], [(-1, None)]
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}" and stack:
            start, is_box = stack.pop()
            boxes.extend([(start, match.start())] * is_box)
        elif token[-1] == "{" and token != r"\{":
            stack.append((match.end(), len(token) > 1))
    start, end = max(boxes)
    return None if end is None else text[start:end]


def _unwrap(text: str) -> str:
    r"""The text without `\text{}` and its like, up to four deep."""
    return reduce(lambda inner, _: _WRAPPER.sub(r"\1", inner), range(4), text)


def _as_letter(text: str, letters: str) -> str | None:
    """The letter that the whole text consists of, up to case, brackets and punctuation."""
    text = _unwrap(text).strip(_EDGES).upper()
    return text if len(text) == 1 and text in letters else None


def _match_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice whose exact text this is, with or without that letter in front."""
    for form in (_folded, _trimmed):
        wanted = form(text)
        found = [letter for letter, choice in zip(LETTERS, choices, strict=False) if form(choice) == wanted]
        if found:
            return found[0] if len(found) == 1 else None
    lettered = _LEADING_LETTER.match(text)
    letter = lettered[lettered.lastindex].upper() if lettered else ""
    choice = dict(zip(LETTERS, choices, strict=False)).get(letter)
    return letter if choice is not None and _trimmed(text[lettered.end() :]) == _trimmed(choice) else None


def _stated_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the last clear statement: a letter that ends its clause, or a choice that fills the line."""
    text, pattern, longest = _plain(text), _stated_letter_pattern(len(choices)), max(map(len, choices)) + 8
    for statement in reversed(list(_STATEMENT.finditer(text))[-_MOST_STATEMENTS:]):
        stated = pattern.match(text, statement.end())
        if stated:
            return stated[stated.lastindex].upper()
        line = text[statement.end() : statement.end() + longest + 1].split("\n")[0]
        letter = _as_letter(line, letters_of(choices)) or _match_choice(line, choices)
        if letter and len(line) <= longest and "?" not in line:
            return letter
    return None


@cache
def _stated_letter_pattern(num_choices: int) -> re.Pattern:
    """One offered letter, in brackets or a capital that ends its clause, and not the first of several ("B or C")."""
    low, up = f"[{LETTERS[:num_choices].lower()}]", f"[{LETTERS[:num_choices]}]"
    letter = rf"\(({low}|{up})\)|\[({low}|{up})\]|({up})"
    clause_end = r"(?=[.,;:!)\]\"']+(?:\s|$)|\s?$|\n| (?:because|since|as)\b| [-–—] )"
    another = rf"\)? ?(?:,|,? ?(?:/|&|\+|or\b|and\b)) ?[(\[]?{up}\b"
    return re.compile(rf"(?:(?:[Oo]ption|[Cc]hoice) )?(?:{letter}{clause_end})(?!{another})")


def _plain(text: str) -> str:
    """The text without emphasis, mathematics signs and runs of white space, so that patterns need no repetition."""
    text = _unwrap(_MARKUP.sub("", text)).strip()
    return _WHITE_SPACE.sub(lambda run: "\n" if "\n" in run[0] else " ", text)


def _folded(text: str) -> str:
    """Without wrappers, case and runs of white space."""
    return " ".join(_unwrap(text).casefold().split())


def _trimmed(text: str) -> str:
    """Folded, without punctuation at the ends; a text of punctuation only stays."""
    return _folded(text).strip(_EDGES) or _folded(text)


def _canonical(text: str) -> str | Decimal:
    """What free-form answers are compared by: a number where it is one, else the text without a leading article."""
    number = _folded(text).replace("\u2212", "-").lstrip(_WRAPS).rstrip(_EDGES)
    if len(number) <= 64 and _NUMBER.fullmatch(number):
        return Decimal(number.replace(",", ""))
    return re.sub(r"^(?:a|an|the) (?=.)", "", _trimmed(text))


def _choice_items(value: Sequence | Mapping | str) -> tuple[list, bool]:
    """The items that the value holds, and whether each must carry a letter."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value.strip())
    if isinstance(value, str):
        return _split_choices(value.strip()), True
    if isinstance(value, Mapping):
        return [f"({str(key).strip(_EDGES)}) {text}" for key, text in value.items() if text is not None], True
    if isinstance(value, Sequence):
        return list(value), False
    raise ValueError(f"`choices` must be a list, a dictionary or a string, got {type(value).__name__}.")


def _split_choices(text: str) -> list[str]:
    """The items of lettered choices in one string: from line to line (an item may take several), or inline."""
    starts = [match.start() for match in _LINE_LETTER.finditer(text)]
    if len(starts) < 2:
        starts = [match.start() for match in _INLINE_LETTER.finditer(text)]
    return [" ".join(text[start:end].split()) for start, end in zip(starts, [*starts, None][1:], strict=True)]


def _strip_letters(items: list[str], must_be_lettered: bool) -> list[str]:
    """The texts in the order of their letters where the items are lettered from A without gaps, else as they are."""
    found = [match for match in map(_LEADING_LETTER.match, items) if match]
    texts = {match[match.lastindex].upper(): match.string[match.end() :] for match in found}
    if len(texts) == len(items) and "".join(sorted(texts)) == letters_of(items):
        return [texts[letter] for letter in sorted(texts)]
    if must_be_lettered or (len(found) == len(items) and all(item.startswith(("(", "[")) for item in items)):
        raise ValueError(f"`choices` must be lettered A, B, C and so on without gaps, got {items}. Fix the letters.")
    return items
