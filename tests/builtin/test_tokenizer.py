import pytest

from mgpo_trl.boxes import BoxStatus, format_box, parse_box
from mgpo_trl.builtin.needle import all_questions
from mgpo_trl.builtin.scenes import HATCHES, cell_box
from mgpo_trl.builtin.tokenizer import BOX_LABEL, EOS, PAD, SPECIAL, answer_text, build_tokenizer
from mgpo_trl.prompts import PromptTemplate


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def _texts():
    template = PromptTemplate()
    for question in all_questions():
        for rounds in (1, 2):
            for choices in (list(HATCHES), None):
                yield template.first_messages(question, choices, rounds)[0]["content"][1]["text"]
        for status in BoxStatus:
            for is_last in (True, False):
                yield template.reply_message(question, list(HATCHES), status.value, is_last)["content"][1]["text"]
    yield from (answer_text(hatch) for hatch in range(len(HATCHES)))
    yield from (format_box(cell_box(cell, 28), (84, 84), "absolute", BOX_LABEL) for cell in range(9))


def test_every_text_of_the_task_comes_back_and_needs_no_bytes(tokenizer):
    for text in _texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not [token for token in tokenizer.convert_ids_to_tokens(ids) if token.startswith("<0x")], text


@pytest.mark.parametrize("text", ["Où est le café ?\n\t图", '{"bbox": [1, 337]}', "a<0x41>b▁c", "\x00"])
def test_any_other_text_comes_back_from_bytes(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_token_counts(tokenizer):
    box = format_box(cell_box(4, 28), (84, 84), "absolute", BOX_LABEL)
    assert tokenizer.tokenize(box) == ['```json\n[{"bbox_2d": [', "28", ", ", "28", ", ", "56", ", ", "56", box[-24:]]
    assert tokenizer.tokenize(answer_text(1)) == ["The card shows ", "horizontal lines", ". \\boxed{", "B", "}"]
    assert tokenizer.tokenize("What is on the red card?") == ["What is on the ", "red", " card?"]


def test_a_decoded_box_parses(tokenizer):
    text = format_box((56, 0, 84, 28), (84, 84), "absolute", BOX_LABEL)
    decoded = tokenizer.decode(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id], skip_special_tokens=True)
    assert parse_box(decoded, (84, 84), "absolute", min_side=14).box_view_px == (56, 0, 84, 28)


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert tokenizer.decode(tokenizer("<|image_pad|>A<|im_end|>")["input_ids"], skip_special_tokens=True) == "A"


def test_the_words_follow_the_template():
    template = PromptTemplate(crop_reply="Look here.\n")
    tokens = build_tokenizer(template).tokenize("Look here.\nWhat is on the card?")
    assert tokens == ["Look here.\n", "What is on the card?"]
