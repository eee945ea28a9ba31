r"""The judge: what counts as an answer in each mode, what never does, and that no text upsets it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpo_trl.answers import extract_answer, judge, verdict

CHOICES = ["red", "green", "blue", "a big cat"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{ C. }", "C"),
        (r"\boxed{[C]:}", "C"),
        (r"\boxed{**C**}", "C"),
        (r"\boxed{$C$}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\text{(c).}}", "C"),
        (r"\boxed{\mathrm{\textbf{C}}}", "C"),
        (r"\boxed{{C}}", "C"),
        (r"\boxed {C}", "C"),
        (r"$\boxed{C}$.", "C"),
        (r"Based on the crop, \boxed{D}", "D"),
        (r"\boxed{A} no, \boxed{C}", "C"),
        (r"\boxed{\boxed{C}}", "C"),
        (r"\boxed{C} and then \boxed{B", "C"),
        (r"a stray { and \{ before \boxed{C}", "C"),
        (r"\boxed{C} } }", "C"),
        (r"\boxed{", None),
        (r"\boxed{C", None),
        (r"\boxed{}", None),
        (r"\boxed{E}", None),
        (r"\boxed{CD}", None),
        (r"\boxed{C or D}", None),
        (r"\boxed{C} \boxed{none}", None),
        (r"\boxed{blue}", None),
        (r"\boxed{(C) blue}", None),
        (r"boxed{C}", None),
        ("The answer is C.", None),
        ("C", None),
        ("", None),
    ],
)
def test_strict_is_the_last_closed_box(text, letter):
    assert extract_answer(text, CHOICES) == letter
    assert judge(text, "C", CHOICES) == (letter == "C")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is C", "C"),
        ("The answer is C.", "C"),
        ("the ANSWER is (c)", "C"),
        ("Answer: C", "C"),
        ("answer: c", "C"),
        ("Final answer: (C)", "C"),
        ("**Answer:** C", "C"),
        ("**Answer: C**", "C"),
        ("Answer:\n\n**C**", "C"),
        ("So the answer is: C, the third one", "C"),
        (r"The answer is $\text{C}$.", "C"),
        (r"The answer is \(C\).", "C"),
        ("The answer is option C.", "C"),
        ("The correct option is C because it is blue", "C"),
        ("Best choice: [C]", "C"),
        ("Answer: C) blue", "C"),
        ("The answer is (C) blue", "C"),
        ("The answer is C - blue", "C"),
        ("The answer is C, a fine colour", "C"),
        ("The answer is A. Wait: the answer is C.", "C"),
        ("The answer is C. The answer is hard to see", "C"),
        (r"\boxed{none} so the answer is C.", "C"),
        (r"\boxed{C}, though the answer is B.", "C"),
        ("The answer is blue.", "C"),
        ("blue", "C"),
        ("Blue.", "C"),
        ("(C) blue", "C"),
        ("(C)", "C"),
        (r"\boxed{blue}", "C"),
        (r"\boxed{\text{Blue}.}", "C"),
        (r"\boxed{(C) blue}", "C"),
        ("Answer: A big cat", "D"),
    ],
)
def test_flexible_adds_clear_statements_and_exact_choices(text, letter):
    assert extract_answer(text, CHOICES, "flexible") == letter
    assert judge(text, letter, CHOICES, "flexible")


@pytest.mark.parametrize(
    "text",
    [
        "A cat is in the picture.",
        "A",
        "Based on the crop, it is red.",
        "After zooming in, it is D.",
        "D is what I see",
        "I think it is C.",
        "The answer is a cat.",
        "The answer is A cat",
        "The answer is B or C.",
        "The answer is (B) or (C).",
        "Answer: A, B",
        "Answer: B/C",
        "The answer is not C.",
        "The answer is B?",
        "The answer is E.",
        "The answer is Blueish.",
        "The answer is C3PO",
        "Answers: C",
        "The card is blue.",
        r"\boxed{(A) blue}",
        r"\boxed{C",
        "",
    ],
)
def test_what_never_counts(text):
    wanted = "A" if text == "A" else None  # a text that is nothing but a letter does count, flexibly
    assert extract_answer(text, CHOICES, "flexible") == wanted
    assert extract_answer(text, CHOICES) is None


def test_the_same_choice_twice_is_nobodys_text():
    assert extract_answer("red", ["red", "Red"], "flexible") is None
    assert extract_answer("(B) red", ["red", "red"], "flexible") == "B"


def test_letters_reach_as_far_as_the_choices():
    choices = [f"thing {i}" for i in range(9)]
    assert extract_answer(r"\boxed{I}", choices) == "I"
    assert extract_answer("The answer is I.", choices, "flexible") == "I"
    assert extract_answer(r"\boxed{J}", choices) is None


@pytest.mark.parametrize(
    ("given_", "answer", "right"),
    [
        ("3", "3.0", True),
        ("1,000", "1000", True),
        ("$1,000$.", "1000", True),
        (".5", "0.5", True),
        (".5", "5", False),
        ("-3", "3", False),
        ("\u22123", "-3", True),
        ("1,00", "100", False),
        ("1e3", "1000", True),
        ("3", "4", False),
        ("12345678901234567890123", "12345678901234567890124", False),
        ("The Cat!", "a  cat", True),
        (r"\text{a cat}", "cat", True),
        (r"3\text{ cars}", "3 cars", True),
        ("cats", "cat", False),
        ("a", "a", True),
        ("(B)", "B", True),
        ("+", "+", True),
        ("+", "-", False),
        ("?", "?", True),
        ("?", "!", False),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
    ],
)
def test_free_form_answers(given_, answer, right):
    assert judge(rf"It is \boxed{{{given_}}}", answer) is right


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (r"\boxed{3} so the answer is 4", "3", "3"),
        (r"The answer is 3.5 metres. I think.", None, "3.5 metres"),
        ("Answer: **a red car**\nbye", None, "a red car"),
        ("a red car", None, "a red car"),
        (r"\boxed{} Answer: 4", None, "4"),
        ("word " * 30, None, None),
        ("two\nlines", None, None),
        ("", None, None),
    ],
)
def test_free_form_extraction(text, strict, flexible):
    assert extract_answer(text, None) == strict
    assert extract_answer(text, None, "flexible") == flexible


# --- mistakes of the row and of the caller -----------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["E", "blue", "(C)", "c", "", "AB", 2, None])
def test_judge_refuses_an_answer_that_is_not_offered(answer):
    with pytest.raises(ValueError, match=r"one of the letters \['A', 'B', 'C', 'D'\].*got .*`normalise_answer`"):
        judge(r"\boxed{C}", answer, CHOICES)


@pytest.mark.parametrize("answer", ["", "  ", None, 3])
def test_judge_refuses_an_empty_free_form_answer(answer):
    with pytest.raises(ValueError, match="`answer` must be a text that is not empty"):
        judge(r"\boxed{C}", answer)


def test_modes_and_numbers_of_choices_are_checked():
    with pytest.raises(ValueError, match=r"`mode` must be one of \['strict', 'flexible'\], got 'loose'"):
        judge(r"\boxed{C}", "C", CHOICES, "loose")
    for choices in ([], ["one"], ["x"] * 27):
        with pytest.raises(ValueError, match=f"2 to 26 texts, got {len(choices)}"):
            extract_answer("", choices)


# --- never raises, linear ----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [r"\boxed{", r"\text{", "{", "}", r"\{", "\\", "A", "c", "(", ")", " ", "\n", ".", ",", "**", "$", "or", "red"]
    + [
        "The answer is ",
        "Answer: ",
        "best option: ",
        "because",
        "[B]",
        "9" * 5000,
        "\ud800",
        "\u0130",
        "ß",
        "a big cat",
    ]
)
TEXTS = st.text() | st.lists(PIECES, max_size=25).map("".join)


@given(TEXTS, st.sampled_from(["strict", "flexible"]))
def test_never_raises_and_answers_only_what_is_offered(text, mode):
    assert extract_answer(text, CHOICES, mode) in ("A", "B", "C", "D", None)
    free = extract_answer(text, None, mode)
    assert free is None or free.strip()
    assert judge(text, "red", None, mode) in (True, False)


@given(TEXTS)
def test_flexible_never_contradicts_strict(text):
    strict = extract_answer(text, CHOICES)
    assert strict is None or extract_answer(text, CHOICES, "flexible") == strict


@given(TEXTS, st.sampled_from("ABCD"))
def test_a_last_box_always_decides(text, letter):
    assert extract_answer(rf"{text} \boxed{{{letter}}}", CHOICES, "flexible") == letter or text.endswith("\\")


UNITS = [r"\boxed{", r"\text{", "{", "}", "\\", " ", "\n", "(A) ", ",", "answer is ", "answer:", "answer is A,"]
UNITS += ["answer is A).", "best option: A, ", "answer is red ", "**", r"\boxed{A} "]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("tail", ["", "}" * 100_000, "x"], ids=["", "closed", "x"])
def test_long_texts_are_read_in_a_moment(unit, tail):
    text = (unit * 300_000)[:300_000] + tail  # takes an hour where a pattern is quadratic
    for choices in (CHOICES, None):
        extract_answer(text, choices, "flexible")
    judge(text, "7", None, "flexible")


def test_worked_example():
    choices = ["red", "green", "blue"]
    assert extract_answer(r"The crop shows a blue card: \boxed{\text{(c)}}.", choices) == "C"
    assert extract_answer("The answer is C.", choices) is None
    assert extract_answer("The answer is C.", choices, "flexible") == "C"
    assert extract_answer("A cat is shown, so after zooming in, it is C.", choices, "flexible") is None


@pytest.mark.parametrize(
    "answer, choices, expected",
    [("B", CHOICES, True), ("A", CHOICES, False), ("b", None, True), (None, CHOICES, None), (None, None, None),
     ("", None, None), ("Z", CHOICES, None)],
)  # fmt: skip
def test_a_verdict_is_none_where_there_is_nothing_to_judge_by(answer, choices, expected):
    assert verdict(r"\boxed{B}", answer, choices) is expected
