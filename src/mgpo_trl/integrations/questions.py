"""A harness hands over one text with the options inside; the first round must not see them."""

import logging
import re
from dataclasses import dataclass

from ..answers import split_question
from ..inference import GroundedAnswer, Question

logger = logging.getLogger(__name__)

_PREFIX = re.compile(r"^Question: ?", re.MULTILINE)


@dataclass
class Splitter:
    """Parts harness prompts into question and choices, and counts those where it can not."""

    split: int = 0
    """Prompts whose choices were withheld from the first round."""
    whole: int = 0
    """Prompts without lettered options, asked as they are in both rounds."""

    def question(self, image, text: str) -> Question:
        """
        The question and the choices of a harness prompt, see [`~mgpo_trl.answers.split_question`].

        Where no choices are found the whole text is asked in both rounds, without choices, and the first such prompt
        is shown in a warning: options in another format would be seen in the first round.

        Args:
            image: What [`~mgpo_trl.GroundedVQA`] opens.
            text (`str`): The prompt. What follows the last choice (the harness's answer instruction) is left out.
        """
        text = text.replace("<image>", "").strip()
        question, choices = split_question(text)
        if choices is None:
            if self.whole == 0:
                logger.warning("No lettered options in %r: the whole prompt is asked in both rounds.", text[:200])
            self.whole += 1
            return Question(image, text)
        self.split += 1
        return Question(image, _PREFIX.sub("", question, count=1), choices)

    @property
    def summary(self) -> str:
        """How many prompts went which way, as a sentence."""
        return (
            f"{self.split} questions with their choices withheld from round 1, {self.whole} prompts asked as they are."
        )


def said(answer: GroundedAnswer) -> str:
    """What the harness gets to score: the boxed answer where there is one, else the whole answer turn."""
    return answer.answer if answer.answer is not None else answer.text
