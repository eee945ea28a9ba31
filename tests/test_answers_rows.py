"""Choices and answers of dataset rows: every layout that is read, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpo_trl.answers import LETTERS, format_choices, normalise_answer, parse_choices, split_question

CHOICES = ["red", "green", "blue", "a big cat"]


@pytest.mark.parametrize(
    "value",
    [
        ["red", "green", "blue"],
        ("red", "green ", " blue"),
        ["(A) red", "(B) green", "(C) blue"],
        ["A. red", "B. green", "C. blue"],
        ["a) red", "b) green", "c) blue"],
        ["A: red", "B: green", "C: blue"],
        ["(C) blue", "(A) red", "(B) green"],
        {"A": "red", "B": "green", "C": "blue"},
        {"(C)": "blue", "A": "red", "b.": "green", "D": None},
        "(A) red\n(B) green\n(C) blue",
        "  A. red\n\n  B. green\n  C. blue\n",
        "[A] red\n[B] green\n[C] blue",
        "(A) red (B) green (C) blue",
        "A. red B. green C. blue",
        '["red", "green", "blue"]',
        "['(A) red', '(B) green', '(C) blue']",
    ],
)
def test_choices_in_every_layout(value):
    assert parse_choices(value) == ["red", "green", "blue"]


def test_choices_keep_what_is_not_a_letter():
    assert parse_choices(["A. Smith", "C. Jones"]) == ["A. Smith", "C. Jones"]
    assert parse_choices(["A cat", "B movie"]) == ["A cat", "B movie"]
    assert parse_choices([3, 4.5]) == ["3", "4.5"]
    assert parse_choices("(A) one\n  and more\n(B) two") == ["one and more", "two"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "2 to 26 texts, got 0"),
        (["red"], "2 to 26 texts, got 1"),
        (["x"] * 27, "2 to 26 texts, got 27"),
        ("red, green or blue", "2 to 26 texts, got 0"),
        (["red", " "], "Every choice needs a text"),
        (["red", None], "Every choice needs a text"),
        (["(A)", "(B) green"], "Every choice needs a text"),
        (["(A) red", "(C) blue"], "lettered A, B, C"),
        (["(A) red", "(A) blue"], "lettered A, B, C"),
        ({"A": "red", "C": "blue"}, "lettered A, B, C"),
        ({"first": "red", "second": "blue"}, "lettered A, B, C"),
        ("A. Smith and D. Jones", "lettered A, B, C"),
        (7, "must be a list, a dictionary or a string, got int"),
        (None, "got NoneType"),
    ],
)
def test_choices_that_are_refused(value, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_choices(value)


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=8), min_size=2, max_size=26)
)
def test_what_prompts_show_is_read_back(choices):
    assert parse_choices(format_choices(choices)) == choices
    for letter, index in zip(LETTERS, range(len(choices)), strict=False):
        assert normalise_answer(index, choices) == normalise_answer(f"({letter})", choices) == letter


def test_format_choices():
    assert format_choices(["red", "blue"]) == "(A) red\n(B) blue"


@pytest.mark.parametrize("answer", ["C", "c", " (C) ", "C.", "[C]", "blue", "Blue.", "(C) blue", "C. blue", 2])
def test_answers_of_rows(answer):
    assert normalise_answer(answer, CHOICES) == "C"


def test_free_form_answers_of_rows():
    assert normalise_answer(" a cat ", None) == "a cat"
    assert (normalise_answer(3, None), normalise_answer(2.5, None)) == ("3", "2.5")
    assert normalise_answer("B", ["B", "A"]) == "B"  # a letter is a letter
    assert normalise_answer("7", ["5", "7"]) == "B"  # a text is no index


@pytest.mark.parametrize(
    "answer", ["E", "pink", "(A) blue", "2", 4, -1, 2.5, "", " ", None, True, float("nan"), ["C"]]
)
def test_answers_that_are_refused(answer):
    with pytest.raises(ValueError, match=rf"`answer` must be .*got {re.escape(repr(answer))}"):
        normalise_answer(answer, CHOICES)


@pytest.mark.parametrize("answer", ["", " ", None, False, float("nan"), []])
def test_free_form_answers_that_are_refused(answer):
    with pytest.raises(ValueError, match="`answer` must be a text or a number"):
        normalise_answer(answer, None)


# questions that carry their choices


@pytest.mark.parametrize(
    "options",
    [
        "(A) a dog\n(B) a big cat",
        "A. a dog\nB. a big cat",
        "A) a\ndog\nB) a big cat",
        "a: a dog\n\nb: a big cat",
        "Options:\nA. a dog\nB. a big cat\nAnswer with the letter.\nThe best answer is:",
        "The choices are listed below:\n(A) a dog\n(B) a big cat\n",
        "选项如下所示:\n(A) a dog\n(B) a big cat\n",
    ],
)
def test_choices_are_split_off_a_question(options):
    assert split_question(f"What is red?\n{options}") == ("What is red?", ["a dog", "a big cat"])


def test_worked_example_of_splitting():
    text = "What is red?\n(A) a dog\n(B) a cat\nAnswer with the letter."
    assert split_question(text) == ("What is red?", ["a dog", "a cat"])


@pytest.mark.parametrize(
    "announcement", [" The choices are listed below:", " Options:", " choices", " 选项如下所示："]
)
def test_words_that_only_announce_choices_are_left_out_at_the_end_of_a_line_too(announcement):
    assert split_question(f"What is red?{announcement}\n(A) a dog\n(B) a cat")[0] == "What is red?"


@pytest.mark.parametrize("question", ["Which of these are options?", "Compare the choices", "Name two options:"])
def test_a_question_about_options_stays_whole(question):
    assert split_question(f"{question}\n(A) a dog\n(B) a cat") == (question, ["a dog", "a cat"])


@pytest.mark.parametrize(
    "text",
    [
        "What is red?",
        "What is red? (A) a dog (B) a cat",
        "What is red?\n(A) a dog",
        "What is red?\n(A) a dog\n(C) a cat",
        "What is red?\n(A) a dog\n(B)",
        "(A) a dog\n(B) a cat",
        "Options:\n(A) a dog\n(B) a cat",
        "I. What is red?\n(A) a dog\n(B) a cat",
    ],
)
def test_a_text_without_a_question_and_lettered_choices_is_the_question(text):
    assert split_question(f" {text}\n") == (text, None)


@given(st.text(alphabet="ABC().: \nx?"))
def test_splitting_never_raises_and_loses_no_choice(text):
    question, choices = split_question(text)
    assert choices is None and question == text.strip() or (len(choices) > 1 and question and all(choices))
