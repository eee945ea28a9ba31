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

`strict` reads the last closed `\boxed{}` and nothing else. `flexible` falls back, in this order, to the exact text of a
choice in that box, to the last clear statement about the answer, and to a text that consists of nothing but a letter or
a choice. A letter that merely starts or ends a sentence counts in neither.
"""

import ast
import numbers
import re
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache

LETTERS = string.ascii_uppercase
MODES = ("strict", "flexible")

_BOX = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|rm|bf)\s*\{([^{}]*)\}")
_LEADING_LETTER = re.compile(r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[).:])\s*(?=\S)")
_INLINE_LETTER = re.compile(r"(?<!\S)(?:\([A-Z]\)|[A-Z][).:])(?=\s)")
_STATEMENT = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))(?: is ?:?| ?[:=])[ \n]?", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?:[^\n.!?]|[.!?](?!\s|$))*")
_MARKUP = re.compile(r"[*$`]|\\[()\[\]]")
_WHITE_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?", re.ASCII)
_EDGES = " \t\r\n.,;:!?\"'`*$()[]{}"
_LONGEST_SHORT_ANSWER = 64


def format_choices(choices: Sequence[str]) -> str:
    """
    Writes choices the way prompts show them.

    Args:
        choices (`Sequence[str]`):
            Texts of the options, in order.

    Returns:
        `str`: one lettered line each, such as `"(A) red\\n(B) blue"`.
    """
    return "\n".join(f"({letter}) {text}" for letter, text in zip(letters_of(choices), choices, strict=True))


def letters_of(choices: Sequence[str]) -> str:
    """The letters offered, as one string: `"ABC"` for three choices. Raises `ValueError` unless there are 2 to 26."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"`choices` must hold 2 to {len(LETTERS)} texts, got {len(choices)}. Fix the row's choices.")
    return LETTERS[: len(choices)]


def parse_choices(value: Sequence | Mapping | str) -> list[str]:
    """
    Reads the choices of a question in any of the layouts that datasets use.

    Args:
        value (`Sequence`, `Mapping` or `str`):
            A list of texts; a list of lettered texts (`"(A) red"`, `"A. red"`, `"A) red"`, `"A: red"`); a dictionary
            `{"A": "red", ...}`; a string with one lettered choice a line or all of them on one line; or a list of texts
            written as a string. Letters decide the order.

    Returns:
        `list[str]`: the texts without letters, in the order of the letters.

    Raises:
        `ValueError`: if there are fewer than 2 or more than 26, one is empty, or the layout is not one of these.
    """
    if isinstance(value, str):
        items = _split_choices(value)
    elif isinstance(value, Mapping):
        items = [f"({str(key).strip().strip('().')}) {text}" for key, text in value.items()]
    elif isinstance(value, Sequence):
        items = [str(item).strip() for item in value]
    else:
        raise ValueError(f"`choices` must be a list, a dictionary or a string, got {type(value).__name__}.")
    letters_of(items)
    choices = _strip_letters(items)
    if not all(choices):
        raise ValueError(f"Every choice needs a text, got {choices}. Fill in or drop the empty one.")
    return choices


def normalise_answer(answer: str | int | float, choices: Sequence[str] | None) -> str:
    """
    Brings the answer of a dataset row into the form that [`judge`] takes.

    Args:
        answer (`str`, `int` or `float`):
            With choices a letter (`"b"`, `"(B)"`, `"B."`), a letter with its text (`"(B) blue"`), the text of a choice,
            or an integer index from 0. A letter is read as a letter even where a choice has that letter as its text.
            Without choices any text or number.
        choices (`Sequence[str]`, *optional*):
            Texts of the options.

    Returns:
        `str`: a letter with choices, else the text.

    Raises:
        `ValueError`: if the answer is empty, of another type, or not among the choices.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | numbers.Real) or not str(answer).strip():
        raise ValueError(f"`answer` must be a text or a number, got {answer!r}. Fill in the row's answer.")
    if choices is None:
        return str(answer).strip()
    letters = letters_of(choices)
    if isinstance(answer, numbers.Integral):
        letter = letters[int(answer)] if 0 <= answer < len(letters) else None
    else:
        letter = _as_letter(str(answer), letters) or _match_choice(str(answer), choices)
    if letter is None:
        raise ValueError(
            f"`answer` must be one of the choices {format_choices(choices)!r}, got {answer!r}. Give the letter, the "
            "text of a choice, or its index from 0 as an integer."
        )
    return letter


def extract_answer(text: str, choices: Sequence[str] | None, mode: str = "strict") -> str | None:
    r"""
    Reads what a text answers. Never raises on any text, and takes time linear in its length.

    Args:
        text (`str`):
            The answer turn.
        choices (`Sequence[str]`, *optional*):
            Texts of the options, or None for a free-form question.
        mode (`str`, *optional*, defaults to `"strict"`):
            `"strict"` reads the last closed `\boxed{}` only: with choices it must hold one of the letters offered, up to
            case, brackets, `\text{}` and punctuation. `"flexible"` also takes the exact text of a choice, boxed or as
            the whole text, and clear statements such as "the answer is C", "Answer: B", "the best option is (D)".

    Returns:
        `str`: a letter with choices, else the text of the answer; None if there is none.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
    boxed = _last_boxed(text)
    if choices is None:
        return _extract_free(text, boxed, mode)
    letters = letters_of(choices)
    letter = None if boxed is None else _as_letter(boxed, letters)
    if letter or mode == "strict":
        return letter
    letter = None if boxed is None else _match_choice(boxed, choices)
    return letter or _stated_letter(text, choices) or _as_letter(text, letters) or _match_choice(text, choices)


def judge(text: str, answer: str, choices: Sequence[str] | None = None, mode: str = "strict") -> bool:
    """
    Whether a text gives the right answer. The only judge: rewards and evaluation both call it.

    Args:
        text (`str`):
            The answer turn.
        answer (`str`):
            With choices the letter, as [`normalise_answer`] returns it, else the text. Texts are compared up to case,
            white space, punctuation at the ends and a leading article; numbers as numbers (3 = 3.0, 1,000 = 1000).
        choices (`Sequence[str]`, *optional*):
            Texts of the options.
        mode (`str`, *optional*, defaults to `"strict"`):
            As in [`extract_answer`].

    Returns:
        `bool`

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


def _extract_free(text: str, boxed: str | None, mode: str) -> str | None:
    if boxed is not None or mode == "strict":
        return _unwrap(boxed).strip() or None if boxed is not None else None
    statement = _last_statement(_plain(text))
    if statement is not None:
        return statement
    text = text.strip()
    return text if text and len(text) <= _LONGEST_SHORT_ANSWER and "\n" not in text else None


def _last_boxed(text: str) -> str | None:
    r"""What is inside the last `\boxed{` that is closed, found in one pass over the braces."""
    stack, last = [], (-1, -1)
    for match in _BOX.finditer(text):
        token = match.group()
        if token == "}" and stack:
            start, is_box = stack.pop()
            if is_box and start > last[0]:
                last = (start, match.start())
        elif token[-1] == "{" and token != r"\{":
            stack.append((match.end(), len(token) > 1))
    return text[last[0] : last[1]] if last[0] >= 0 else None


def _unwrap(text: str) -> str:
    r"""The text without `\text{}` and its like, up to four deep."""
    for _ in range(4):
        text = _WRAPPER.sub(r"\1", text)
    return text


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
    if lettered is None:
        return None
    letter = lettered[lettered.lastindex].upper()
    choice = dict(zip(LETTERS, choices, strict=False)).get(letter)
    return letter if choice is not None and _trimmed(text[lettered.end() :]) == _trimmed(choice) else None


def _stated_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the last clear statement: a letter that ends its clause, or the rest of the line is a choice."""
    text, stated_letter = _plain(text), _stated_letter_pattern(len(choices))
    longest = max(map(len, choices)) + 8
    for statement in reversed(list(_STATEMENT.finditer(text))):
        letter = stated_letter.match(text, statement.end())
        if letter:
            return letter[letter.lastindex].upper()
        line = text[statement.end() : statement.end() + longest + 1].split("\n")[0]
        letter = _match_choice(line, choices) if len(line) <= longest else None
        if letter:
            return letter
    return None


@cache
def _stated_letter_pattern(num_choices: int) -> re.Pattern:
    """One offered letter, in brackets or at the end of its clause, that is not the first of several ("B or C")."""
    offered = f"[A-{LETTERS[num_choices - 1]}]"
    clause_end = r"""(?=[.,;:!)\]"']+(?:\s|$)|\s?$|\n| (?:because|since|as)\b| [-–—] )"""
    return re.compile(
        rf"(?:(?:option|choice) )?(?:\(({offered})\)|\[({offered})\]|({offered}){clause_end})"
        rf"(?!\)?,? ?(?:/|&|\+|or\b|and\b|(?<=, )|(?<=,)) ?[(\[]?{offered}\b)",
        re.IGNORECASE,
    )


def _last_statement(text: str) -> str | None:
    """What the last statement about the answer says, up to the end of its sentence or line."""
    statements = list(_STATEMENT.finditer(text))
    said = _SENTENCE.match(text, statements[-1].end())[0].strip() if statements else ""
    return said or None


def _plain(text: str) -> str:
    """The text without emphasis, mathematics signs and runs of white space, so that patterns need no repetition."""
    text = _WHITE_SPACE.sub(lambda run: "\n" if "\n" in run[0] else " ", _unwrap(_MARKUP.sub("", text)))
    return text.strip()


def _folded(text: str) -> str:
    return " ".join(_unwrap(text).casefold().split())


def _trimmed(text: str) -> str:
    """Folded, without punctuation at the ends; a text of punctuation only stays."""
    return _folded(text).strip(_EDGES) or _folded(text)


def _canonical(text: str) -> str | Decimal:
    """What free-form answers are compared by: a number where it is one, else the text without a leading article."""
    text = _trimmed(text)
    if len(text) <= 64 and _NUMBER.fullmatch(text):
        return Decimal(text.replace(",", ""))
    return re.sub(r"^(?:a|an|the) (?=.)", "", text)


def _split_choices(text: str) -> list[str]:
    """The items of choices written as one string."""
    text = text.strip()
    if text.startswith("["):
        return _literal_choices(text)
    items = []
    for line in text.splitlines():
        if _LEADING_LETTER.match(line):
            items.append(line.strip())
        elif items and line.strip():
            items[-1] += " " + line.strip()
    if len(items) > 1:
        return items
    starts = [match.start() for match in _INLINE_LETTER.finditer(text)]
    if len(starts) < 2 or starts[0] > 0:
        raise ValueError(
            f"`choices` given as one string must hold lettered choices such as '(A) red\\n(B) blue', got {text[:200]!r}."
            " Give a list of texts instead."
        )
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _literal_choices(text: str) -> list[str]:
    try:
        return [str(item).strip() for item in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"`choices` looks like a list but cannot be read as one: {text[:200]!r}.") from error


def _strip_letters(items: Sequence[str]) -> list[str]:
    """The texts in the order of their letters where every item carries one, else as they are."""
    found = [_LEADING_LETTER.match(item) for item in items]
    if not all(found):
        return list(items)
    letters = [match[match.lastindex].upper() for match in found]
    texts = {letter: item[match.end() :].strip() for letter, item, match in zip(letters, items, found, strict=True)}
    if "".join(sorted(letters)) == LETTERS[: len(items)]:
        return [texts[letter] for letter in sorted(letters)]
    if all(item.startswith(("(", "[")) for item in items):
        raise ValueError(f"`choices` must be lettered from A without gaps, got the letters {letters}. Fix the row.")
    return list(items)
