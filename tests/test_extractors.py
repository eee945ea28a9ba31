r"""The field's loose extractors, with the traps that make their numbers differ from `strict`."""

import pytest

from mgpo_trl.answers import extract_answer
from mgpo_trl.evaluation.extractors import EXTRACTORS, resolve_scoring

CHOICES = ["rubber", "cotton", "kevlar", "leather"]
CASES = [  # text, strict, mme-realworld, vstar, hrbench
    (r"\boxed{D}", "D", "D", None, "D"),  # in capitals there are B, D and D
    ("D", None, "D", "D", "D"),
    ("(D) leather", None, "D", "D", "D"),
    (r"Based on the crop, \boxed{D}", "D", "B", "B", "D"),
    ("After zooming in, it is D.", None, "A", "A", "D"),
    ("The best answer is C", None, "C", "C", "C"),
    ("the glove is made of leather", None, None, None, "D"),
    ("It is A or B", None, "A", "A", None),
    ("", None, "A", None, None),
]


@pytest.mark.parametrize(("text", "strict", "mme", "vstar", "hrbench"), CASES)
def test_traps(text, strict, mme, vstar, hrbench):
    assert extract_answer(text, CHOICES) == strict
    said = {name: extract(text, CHOICES) for name, (extract, _) in EXTRACTORS.items()}
    assert said == {"mme-realworld": mme, "vstar": vstar, "hrbench": hrbench}


def test_scoring_is_resolved_by_name_or_by_dataset():
    assert resolve_scoring("strict", "vstar") is None and resolve_scoring(None, None) is None
    assert resolve_scoring("official", "vstar:/data") == "vstar"
    assert resolve_scoring("official", "mgpo-eval") == "mme-realworld"
    assert resolve_scoring("official:hrbench", "my.jsonl") == "hrbench"
    with pytest.raises(ValueError, match="No official scoring is known for 'my.jsonl'"):
        resolve_scoring("official", "my.jsonl")
    with pytest.raises(ValueError, match="must be one of .*got 'official:mine'"):
        resolve_scoring("official:mine", "vstar")
