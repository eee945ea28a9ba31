import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mgpo_trl.boxes import format_box
from mgpo_trl.builtin.needle import make_row
from mgpo_trl.builtin.scenes import cell_box
from mgpo_trl.builtin.tiny import (
    MAX_PIXELS,
    MIN_PIXELS,
    ImageOnlyQwen2_5_VLProcessor,
    build_tiny,
    register_processor,
    save_tiny,
)
from mgpo_trl.builtin.tokenizer import BOX_LABEL, answer_text
from mgpo_trl.images import open_image
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate


@pytest.fixture(scope="module")
def tiny():
    return build_tiny("needle", seed=0)


@pytest.fixture(scope="module")
def chat(tiny):
    return VisionChat(tiny[1], max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)


def test_the_size_of_the_model(tiny):
    assert 750_000 < sum(parameter.numel() for parameter in tiny[0].parameters()) < 850_000


def test_weights_depend_on_the_seed_alone(tiny):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = build_tiny("needle", seed=0)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(tiny[0].parameters(), again.parameters(), strict=True))
    other = build_tiny("needle", seed=1)[0]
    assert not torch.equal(tiny[0].lm_head.weight, other.lm_head.weight)


def test_a_saved_model_loads_through_the_auto_classes(tiny, chat, tmp_path):
    save_tiny(tmp_path, "needle", seed=0)
    register_processor()
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, ImageOnlyQwen2_5_VLProcessor)
    assert processor.chat_template == tiny[1].chat_template
    assert dict(processor.image_processor.size) == dict(tiny[1].image_processor.size)
    text = format_box(cell_box(3, 28), (84, 84), "absolute", BOX_LABEL) + " é"
    assert processor.tokenizer(text)["input_ids"] == tiny[1].tokenizer(text)["input_ids"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tiny[0].parameters(), model.parameters(), strict=True))


def test_lengths_of_a_rollout(chat):
    """26 prompt + 10 box + 31 reply + 6 answer tokens for `refer`, of which 16 are trained on."""
    row, template = make_row("refer", "train", 0, 0), PromptTemplate()
    view = chat.fit(open_image(row["image"], row["id"]))
    crop = chat.fit(open_image(row["image"], row["id"]).crop(cell_box(4)))
    assert view.size == crop.size == (84, 84)
    messages = template.first_messages(row["question"], row["choices"], num_rounds=2)
    reply = template.reply_message(row["question"], row["choices"], "ok", is_last=True)
    assert len(chat.prompt_ids(messages, [view])) == 26
    assert len(chat.reply_ids(reply, crop)) == 31
    encode = chat.tokenizer.encode
    assert len(encode(format_box(cell_box(4, 28), view.size, "absolute", BOX_LABEL))) + 1 == 10
    assert len(encode(answer_text(2))) + 1 == 6


def test_the_processor_encodes_a_conversation(tiny):
    model, processor = tiny
    row = make_row("needle", "train", 0, 0)
    messages = PromptTemplate().first_messages(row["question"], row["choices"], num_rounds=1)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    batch = processor(text=[text], images=[open_image(row["image"], row["id"])], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert (batch["input_ids"] == processor.image_token_id).sum() == 9 == batch["mm_token_type_ids"].sum()
    assert model(**batch).logits.shape == (1, batch["input_ids"].shape[1], len(processor.tokenizer))
