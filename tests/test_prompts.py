r"""
Prompts are frozen: a change of one word makes runs incomparable. After a wanted change, raise `PROTOCOL_VERSION`, add
a dated line to CHANGELOG.md, and write the snapshot again with `python tests/test_prompts.py`.
"""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from mgpo_trl.prompts import PROTOCOL_VERSION, PromptTemplate, load_prompts

SNAPSHOT = Path(__file__).parent / "snapshots" / "prompts.txt"
FINGERPRINT = "2e5195e567787084"
WHAT_TO_DO = "A default prompt changed: raise PROTOCOL_VERSION, date a line in CHANGELOG.md, write the snapshot again."
QUESTION, CHOICES = "What is {choices} \\1 {status}?", ["red {question}", "blue"]


def render() -> str:
    """Version, fingerprint, every part, and every turn that the defaults can give."""
    template = PromptTemplate()
    blocks = {f"part {name}": text for name, text in asdict(template).items()}
    for num_rounds in (1, 2):
        for choices in (["red", "blue"], None):
            messages = template.first_messages("What colour?", choices, num_rounds)
            blocks[f"first turn, rounds={num_rounds}, choices={choices}"] = spell(messages)
    for status in ("ok", "too_small"):
        for is_last in (True, False):
            for zoom_from in ("crop", "original"):
                reply = template.reply_message("What colour?", ["red", "blue"], status, is_last, zoom_from)
                blocks[f"reply, status={status}, last={is_last}, zoom_from={zoom_from}"] = spell([reply])
    head = f"PROTOCOL_VERSION {PROTOCOL_VERSION}\nfingerprint {template.fingerprint}\n"
    return head + "".join(f"\n=== {name} ===\n{text}\n" for name, text in blocks.items())


def spell(messages) -> str:
    """One line for each block: roles, images and texts in order."""
    blocks = ((message["role"], block) for message in messages for block in message["content"])
    return "\n".join(f"<{role}> {block['type']} {block.get('text', '')}" for role, block in blocks)


def text_of(message) -> str:
    return message["content"][-1]["text"]


def test_the_default_prompts_match_their_snapshot():
    assert render() == SNAPSHOT.read_text(encoding="utf-8"), WHAT_TO_DO


def test_the_fingerprint_is_pinned_to_the_protocol_version():
    assert (PROTOCOL_VERSION, PromptTemplate().fingerprint) == (1, FINGERPRINT), WHAT_TO_DO


@pytest.mark.parametrize("name", [field.name for field in fields(PromptTemplate)])
def test_a_change_of_any_part_changes_the_fingerprint(name):
    changed = PromptTemplate(**{name: getattr(PromptTemplate(), name) + " "})
    assert changed.fingerprint != PromptTemplate().fingerprint


@pytest.mark.parametrize("num_rounds", [2, 3])
def test_choices_are_withheld_from_the_grounding_turn(num_rounds):
    template = PromptTemplate()
    with_choices = template.first_messages("What colour?", ["red", "blue"], num_rounds)
    assert with_choices == template.first_messages("What colour?", None, num_rounds)
    assert "red" not in str(with_choices) and "(A)" not in str(with_choices)
    for zoom_from in ("crop", "original"):
        zoom = template.reply_message("What colour?", ["red", "blue"], "ok", False, zoom_from)
        assert "red" not in str(zoom) and "(A)" not in str(zoom)


def test_the_answer_is_asked_for_in_the_last_turn_only():
    template = PromptTemplate()
    for choices in (["red", "blue"], None):
        assert "\\boxed" not in str(template.first_messages("Q?", choices, 2))
        assert "\\boxed" not in str(template.reply_message("Q?", choices, "ok", is_last=False))
        assert "\\boxed" in text_of(template.reply_message("Q?", choices, "ok", is_last=True))
        assert "\\boxed" in text_of(template.first_messages("Q?", choices, 1)[-1])
    assert "(A) red\n(B) blue" in text_of(template.reply_message("Q?", ["red", "blue"], "ok", is_last=True))


def test_marks_in_a_question_or_a_choice_stay_as_they_are():
    template = PromptTemplate()
    assert QUESTION in text_of(template.first_messages(QUESTION, CHOICES, 2)[-1])
    direct = text_of(template.first_messages(QUESTION, CHOICES, 1)[-1])
    last = text_of(template.reply_message(QUESTION, CHOICES, "no_box", is_last=True))
    for text in (direct, last):
        assert QUESTION in text and "(A) red {question}\n(B) blue" in text
        assert text.count("\\1") == text.count(QUESTION)


def test_the_reply_names_the_status_or_the_crop():
    template = PromptTemplate()
    fallback = text_of(template.reply_message("Q?", None, "out_of_view", is_last=True))
    crop = text_of(template.reply_message("Q?", None, "ok", is_last=True))
    assert "(out of view)" in fallback and fallback.startswith("Your reply held no usable region")
    assert crop.startswith(template.crop_reply) and "(ok)" not in crop


def test_every_user_turn_has_one_image_before_its_text():
    template = PromptTemplate(system="Be brief.")
    system, user = template.first_messages("Q?", None, 2)
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    replies = [template.reply_message("Q?", None, status, is_last=status == "ok") for status in ("ok", "empty")]
    for message in (user, *replies):
        assert message["role"] == "user" and [block["type"] for block in message["content"]] == ["image", "text"]


def write(tmp_path, text):
    path = tmp_path / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_yaml_file_replaces_the_parts_that_it_names(tmp_path):
    path = write(tmp_path, 'grounding: "Où? {question} {not a mark} {}"\nsystem: |\n  Be brief.\n  Be right.\n')
    template = load_prompts(path)
    assert template == PromptTemplate(grounding="Où? {question} {not a mark} {}", system="Be brief.\nBe right.\n")
    system, user = template.first_messages("What?", None, 2)
    assert text_of(user) == "Où? What? {not a mark} {}" and text_of(system) == "Be brief.\nBe right.\n"
    assert load_prompts(str(path)) == template and load_prompts(None) == PromptTemplate()


@pytest.mark.parametrize(
    "text, message",
    [
        ("grouding: '{question}'", r"names unknown parts \['grouding'\]. Known parts: \['system', 'grounding'"),
        ("1: '{question}'", r"names unknown parts \['1'\]"),
        ("grounding: 'Where?'", r"`grounding` has no {question}: 'Where\?'. Put {question} where it belongs"),
        ("answer_choices: '{question}'", r"`answer_choices` has no {choices}"),
        ("answer_free: '{question} {choices}'", r"`answer_free` can not hold {choices}"),
        ("grounding: '{question} {choices}'", r"`grounding` can not hold {choices}"),
        ("crop_reply: '{status}'", r"`crop_reply` can not hold {status}"),
        ("grounding: 3", r"`grounding` must be a text, got int. Quote it"),
        ("grounding:", r"`grounding` must be a text, got NoneType"),
        ("- grounding", r"must map part names to texts, got list"),
        ("", r"must map part names to texts, got NoneType"),
        ("grounding: '{question}", r"is not valid YAML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_prompts(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`prompts_file` does not exist: '.*none.yaml'. Give the path of a YAML file"):
        load_prompts(tmp_path / "none.yaml")


if __name__ == "__main__":
    SNAPSHOT.write_text(render(), encoding="utf-8")
