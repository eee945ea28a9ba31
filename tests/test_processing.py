import random

import pytest
import torch
from families import FAMILIES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mgpo_trl.boxes import format_box, resolve_coordinates
from mgpo_trl.builtin.tiny import build_processor
from mgpo_trl.processing import (
    OTHER_LAYOUTS,
    SUPPORTED_MODEL_TYPES,
    VisionChat,
    check_model_type,
    check_processor,
    vision_token_ids,
)
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import RoundTemplate, Sampled, flatten, run_rounds

MAX_PIXELS, MIN_PIXELS = 112 * 112, 56 * 56


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return AutoProcessor.from_pretrained(tiny_dir)


@pytest.fixture(scope="module")
def chat(processor):
    return VisionChat(processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def family_chat(family, family_dir):
    processor = AutoProcessor.from_pretrained(family_dir(family.model_type))
    return VisionChat(processor, max_pixels=(4 * family.factor) ** 2, min_pixels=(2 * family.factor) ** 2)


def noise(width, height, seed=0):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def user(text, image):
    """A user turn that carries the pixels themselves, as the processor of a model expects them."""
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


def played(chat, num_rounds, row, image, turns, coordinates="absolute"):
    """A rollout whose turns were written by hand; returns it with the conversation as messages of original images."""
    template = RoundTemplate(PromptTemplate(), chat, coordinates)
    ids = [[*chat.tokenizer(text)["input_ids"], chat.end_of_turn_id] for text in turns]
    rollout = template.start(row, image, chat.fit(image), num_rounds)
    run_rounds([rollout], lambda contexts: [Sampled(ids[contexts[0].round - 1])], template, num_rounds)
    messages = template.prompts.first_messages(row["question"], row["choices"], num_rounds)
    conversation = [user(messages[-1]["content"][-1]["text"], image)]
    for number, (turn, text) in enumerate(zip(rollout.turns, turns, strict=True), start=1):
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        if number < num_rounds:
            reply = template.reply(rollout, turn, is_last=number == num_rounds - 1)
            shown = image.crop(turn.box_original_px) if turn.box.ok else image
            conversation.append(user(reply["content"][-1]["text"], shown))
    return rollout, conversation


BOX = format_box((10, 20, 60, 80), (112, 84), "absolute", "card")
RELATIVE_BOX = format_box((10, 20, 80, 80), (112, 84), "relative_1000", "card")
ANSWER = "I see a cat. \\boxed{B}"


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([ANSWER], id="one round"),
        pytest.param([BOX, ANSWER], id="two rounds"),
        pytest.param(["no idea", ANSWER], id="two rounds, no box"),
        pytest.param([BOX, format_box((5, 3, 44, 60), (84, 112), "absolute"), ANSWER], id="three rounds"),
        pytest.param([BOX, " nothing\n\n", ANSWER], id="three rounds, second box missing"),
    ],
)
@pytest.mark.parametrize("choices", [["a dog", "a cat"], None])
def test_the_models_own_template_renders_the_same_conversation(family, family_chat, turns, choices):
    chat, row = family_chat, {"id": "1", "question": "  What\nis there? é ", "choices": choices}
    if family.coordinates == "relative_1000":
        turns = [RELATIVE_BOX if "bbox_2d" in turn else turn for turn in turns]
    rollout, conversation = played(chat, len(turns), row, noise(400, 300), turns, family.coordinates)
    assert [box.ok for box in rollout.boxes] == ["bbox_2d" in turn for turn in turns[:-1]]
    rendered = chat.processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    ids = rendered["input_ids"][0].tolist()
    end = len(ids) - ids[::-1].index(chat.end_of_turn_id)  # the template closes with a line break
    assert flatten(rollout).ids == ids[:end] and len(ids) - end == 1
    ours = chat.encode_images(rollout.images)
    assert torch.equal(ours["image_grid_thw"], rendered["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], rendered["pixel_values"])
    assert chat.token_types(flatten(rollout).ids) == rendered["mm_token_type_ids"][0, :end].tolist()
    chat.check_image_tokens(flatten(rollout).ids, rollout.images, "1")


def test_the_prompt_ends_where_the_assistant_starts(chat):
    messages = PromptTemplate(system="Be brief.").first_messages("What?", None, 2)
    ids = chat.prompt_ids(messages, [noise(112, 84)])
    text = chat.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and ids.count(chat.image_token_id) == 4 * 3


def test_a_reply_starts_after_the_end_of_turn(chat):
    reply = PromptTemplate().reply_message("What?", None, "ok", is_last=True)
    text = chat.tokenizer.decode(chat.reply_ids(reply, noise(56, 56)))
    assert text.startswith("\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_cached_text_still_expands_to_the_image_at_hand(chat):
    messages = PromptTemplate().first_messages("What?", None, 2)
    reply = PromptTemplate().reply_message("What?", None, "ok", is_last=True)
    for size, tokens in (((56, 56), 4), ((112, 84), 12), ((56, 56), 4)):
        assert chat.prompt_ids(messages, [noise(*size)]).count(chat.image_token_id) == tokens
        assert chat.reply_ids(reply, noise(*size)).count(chat.image_token_id) == tokens


# sizes


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (112, 112), (111, 113), (20, 20), (1, 1), (56, 55)])
def test_fit_is_the_processors_own_resize(family_chat, size):
    chat = family_chat
    image = noise(*size)
    fitted = chat.fit(image)
    theirs = chat.image_processor(images=[image], return_tensors="pt")
    ours = chat.image_processor(images=[fitted], return_tensors="pt")
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_an_extreme_aspect_ratio_comes_under_the_budget_and_stays_there(chat):
    """The processor alone shows 1500x30 at twice the budget, and shrinks it again each time that it sees it."""
    image = noise(1500, 30)
    once = chat.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert once.prod() * 14 * 14 > MAX_PIXELS
    fitted = chat.fit(image)
    grid = chat.image_processor(images=[fitted], return_tensors="pt")["image_grid_thw"].tolist()
    assert fitted.width * fitted.height <= MAX_PIXELS and grid == [[1, fitted.height // 14, fitted.width // 14]]


SIDES = st.one_of(st.integers(1, 400), st.integers(1, 12_000))


@settings(max_examples=400, deadline=None)
@example(7499, 38, (1280 * 784, 256 * 784))  # rounded to whole tokens, it is more than 200 times as long as wide
@example(54, 9785, (640 * 784, 256 * 784))
@given(SIDES, SIDES, st.sampled_from([(7056, 3136), (112 * 112, 56 * 56), (1280 * 784, 256 * 784), (784, 784)]))
def test_a_fitted_size_is_in_the_budget_and_stays(width, height, budget):
    chat = VisionChat(PROCESSOR, max_pixels=budget[0], min_pixels=budget[1])
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="more than 200 times as long as it is wide.* leave the row out"):
            chat.fitted_size((width, height))
        return
    fitted = chat.fitted_size((width, height))
    assert chat.fitted_size(fitted) == fitted
    assert all(side % 28 == 0 and side > 0 for side in fitted)
    assert budget[1] <= fitted[0] * fitted[1] <= budget[0]


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.data())
def test_every_usable_box_has_a_crop_that_fits(width, height, data):
    """The limits on a box are there so that no crop is too narrow for the processor."""
    from mgpo_trl.boxes import parse_box
    from mgpo_trl.geometry import view_to_original

    chat = VisionChat(PROCESSOR, max_pixels=1280 * 784, min_pixels=256 * 784)
    if max(width, height) > 200 * min(width, height):
        return
    view = chat.fitted_size((width, height))
    x1, y1 = data.draw(st.integers(0, view[0] - 1)), data.draw(st.integers(0, view[1] - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, view[0])), data.draw(st.integers(y1 + 1, view[1]))
    box = parse_box(format_box((x1, y1, x2, y2), view, "absolute"), view, "absolute")
    if box.ok:
        left, top, right, bottom = view_to_original(box.box_view_px, view, (width, height))
        chat.fitted_size((right - left, bottom - top))


PROCESSOR = build_processor()


def test_the_budget_reaches_the_processor_and_its_checkpoint(tmp_path):
    processor = build_processor()
    VisionChat(processor, max_pixels=28 * 28 * 20, min_pixels=28 * 28 * 2)
    processor.save_pretrained(tmp_path)
    size = AutoProcessor.from_pretrained(tmp_path).image_processor.size
    assert (size["longest_edge"], size["shortest_edge"]) == (28 * 28 * 20, 28 * 28 * 2)


@pytest.mark.parametrize("budget", [(783, 1), (7056, 7057)])
def test_an_empty_budget_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget is empty: min_pixels={budget[1]}, max_pixels={budget[0]}.*28x28"):
        VisionChat(PROCESSOR, max_pixels=budget[0], min_pixels=budget[1])


@pytest.mark.parametrize("budget", [(7056, 7056), (1280 * 784, 1000 * 784), (12_544, 9408)])
def test_a_budget_without_room_for_every_shape_is_refused(budget):
    with pytest.raises(ValueError, match=f"min_pixels={budget[1]} and max_pixels={budget[0]} are too close.*at most"):
        VisionChat(PROCESSOR, max_pixels=budget[0], min_pixels=budget[1])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 256, 640])
def test_every_shape_fits_where_the_cap_is_twice_the_least(tokens):
    chat = VisionChat(PROCESSOR, max_pixels=2 * tokens * 784, min_pixels=tokens * 784)
    for step in range(250):
        long = round(500 * 1.02**step)
        for size in [(long, 500), (500, long)]:
            fitted = chat.fitted_size(size)
            assert chat.min_pixels <= fitted[0] * fitted[1] <= chat.max_pixels


# image tokens


@pytest.mark.parametrize("size", [(400, 300), (20, 700), (1, 1), (112, 112)])
def test_image_tokens_are_the_models_features(family, family_chat, family_dir, size):
    chat = family_chat
    fitted = chat.fit(noise(*size))
    grid = chat.image_processor(images=[fitted], return_tensors="pt")["image_grid_thw"][0]
    assert chat.image_tokens(fitted) == grid.prod().item() // 4
    model = AutoModelForImageTextToText.from_pretrained(family_dir(family.model_type))
    with torch.no_grad():
        features = model.get_image_features(**chat.encode_images([fitted]))
    assert len(features.pooler_output[0]) == chat.image_tokens(fitted)


def test_an_image_that_occurs_twice_is_encoded_once(chat, monkeypatch):
    calls = []
    encode = type(chat.image_processor).__call__
    monkeypatch.setattr(
        type(chat.image_processor), "__call__", lambda self, **kwargs: calls.append(1) or encode(self, **kwargs)
    )
    a, b = chat.fit(noise(400, 300)), chat.fit(noise(300, 400, seed=1))
    together = chat.encode_images([a, b, a])
    assert len(calls) == 2
    apart = [encode(chat.image_processor, images=[image], return_tensors="pt") for image in (a, b, a)]
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(together[name], torch.cat([one[name] for one in apart]))


@pytest.mark.parametrize("where", ["question", "choices"])
def test_a_literal_image_token_raises_and_names_the_sample(chat, where):
    row = {"id": "row-7", "question": "What?", "choices": ["a", "b"]}
    row[where] = "What is <|image_pad|>?" if where == "question" else ["a", "<|image_pad|>"]
    rollout, _ = played(chat, 2, row, noise(112, 84), [BOX, ANSWER])
    with pytest.raises(ValueError, match=r"Sample 'row-7' has \d+ image placeholder tokens but its 2 images give 16 "):
        chat.check_image_tokens(flatten(rollout).ids, rollout.images, rollout.id)


def test_a_missing_image_raises_too(chat):
    ids = chat.prompt_ids(PromptTemplate().first_messages("What?", None, 2), [noise(56, 56)])
    chat.check_image_tokens(ids, [noise(56, 56)], "a")
    with pytest.raises(ValueError, match="Sample 'a' has 4 image placeholder tokens but its 0 images give 0 features"):
        chat.check_image_tokens(ids, [], "a")


def test_a_literal_video_token_raises_and_names_the_sample(chat):
    messages = PromptTemplate().first_messages("What is <|video_pad|>?", None, 2)
    view = noise(56, 56)
    with pytest.raises(
        ValueError, match=r"Sample 'row-7' holds a video placeholder.*'<\|video_pad\|>' in its question"
    ):
        chat.check_image_tokens(chat.prompt_ids(messages, [view]), [view], "row-7")


def test_no_vision_token_may_be_sampled(tiny_dir, processor):
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    expected = sorted(processor.tokenizer.convert_tokens_to_ids(names))
    assert vision_token_ids(AutoConfig.from_pretrained(tiny_dir)) == expected
    assert vision_token_ids(object()) == []


# turns


def test_which_tokens_end_a_turn(processor):
    pad = processor.tokenizer.pad_token_id
    plain = VisionChat(processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)
    more = VisionChat(processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS, end_ids=[pad])
    eos = processor.tokenizer.eos_token_id
    assert plain.end_of_turn_id == more.end_of_turn_id == eos
    assert [plain.ends_turn(token) for token in (eos, pad, 0 if pad else 1)] == [True, False, False]
    assert more.ends_turn(pad) and more.ends_turn(eos)


def test_decode_leaves_special_tokens_out(chat):
    ids = chat.tokenizer("<|im_start|>a box<|im_end|><|endoftext|>")["input_ids"]
    assert chat.decode(ids) == "a box" and chat.decode([]) == ""


# what is refused


def test_a_tokenizer_in_place_of_a_processor_is_refused(processor):
    message = r"The processor is a TokenizersBackend without an image processor.*AutoProcessor"
    with pytest.raises(ValueError, match=message.replace("TokenizersBackend", type(processor.tokenizer).__name__)):
        check_processor(processor.tokenizer)


@pytest.mark.parametrize("model_type", ["gemma3", "internvl", "smolvlm", "idefics3", "llama"])
def test_other_families_are_refused_by_their_type(model_type):
    reason = {"gemma3": "one square of 256 tokens", "internvl": "number of tiles", "llama": ""}
    pattern = f"Models of type '{model_type}' are not supported \\('some/model'\\).*{reason.get(model_type, 'tiles')}"
    with pytest.raises(ValueError, match=pattern + r".*\['qwen2_5_vl', 'qwen3_vl', 'qwen3_vl_moe'\]"):
        check_model_type(model_type, "some/model")


def test_supported_families_pass():
    for model_type in SUPPORTED_MODEL_TYPES:
        check_model_type(model_type, "some/model")
        assert resolve_coordinates("auto", model_type) in ("absolute", "relative_1000")
    assert set(FAMILIES) <= set(SUPPORTED_MODEL_TYPES) and not set(OTHER_LAYOUTS) & set(SUPPORTED_MODEL_TYPES)


def test_another_kind_of_image_processor_is_refused():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    class Clip:
        image_processor = CLIPImageProcessorPil()

    with pytest.raises(ValueError, match="CLIPImageProcessorPil does not show an image as a grid.*qwen2_5_vl"):
        check_processor(Clip())


def with_template(chat_template):
    processor = build_processor()
    processor.chat_template = chat_template
    return VisionChat(processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)


def test_a_template_that_does_not_close_the_assistants_turn_is_refused():
    chat = with_template("{% for message in messages %}{{ message['role'] }}\n{% endfor %}")
    with pytest.raises(ValueError, match="does not close an assistant turn with '<|im_end|>'"):
        chat.reply_ids(PromptTemplate().reply_message("Q?", None, "ok", True), noise(56, 56))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    chat = with_template(
        "{{ messages | length }}{% for message in messages %}{{ message['role'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="changes earlier turns when a reply is added"):
        chat.reply_ids(PromptTemplate().reply_message("Q?", None, "ok", True), noise(56, 56))
