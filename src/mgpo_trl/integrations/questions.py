"""A harness hands over one text with the options inside; the first round must not see them."""

import logging

from ..answers import split_question
from ..inference import Question

logger = logging.getLogger(__name__)


def question_of(image, text: str) -> Question:
    """
    The question and the choices of a harness prompt.

    The choices are lines that begin with a letter (`A. red`, `(A) red`). Where none are found the whole text is asked
    in both rounds, without choices, and a warning says so: the answer is then scored by the harness as free text.

    Args:
        image: What [`~mgpo_trl.GroundedVQA`] opens.
        text (`str`): The prompt of the harness; what follows the last choice (its answer instruction) is left out.
    """
    text = text.replace("<image>", "").strip()
    question, choices = split_question(text)
    if choices is None:
        logger.warning("No lettered options in %r: the whole prompt is asked in both rounds.", text[:80])
    return Question(image, question, choices)


def said(answer) -> str:
    """What the harness gets to score: the boxed answer where there is one, else the whole answer turn."""
    return answer.answer if answer.answer is not None else answer.text
