import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    InternVLConfig,
    LlamaConfig,
    SmolVLMConfig,
)

from mgpo_trl.generation import ModelGenerator, load_for_inference
from mgpo_trl.processing import VisionChat, vision_token_ids
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import Context

SIZES = [(112, 84), (56, 112), (84, 84)]


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return AutoProcessor.from_pretrained(tiny_dir)


@pytest.fixture
def model(tiny_dir):
    return AutoModelForImageTextToText.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat(processor):
    return VisionChat(processor, max_pixels=112 * 112, min_pixels=56 * 56)


def noise(width, height, seed):
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


@pytest.fixture(scope="module")
def contexts(chat):
    """Three prompts of different lengths over images of different shapes; the last one shows two images."""
    template, found = PromptTemplate(), []
    for number, size in enumerate(SIZES):
        image = noise(*size, seed=number)
        ids = chat.prompt_ids(template.first_messages("What is it?" * (number + 1), ["a", "b"], 2), [image])
        found.append(Context(ids, [image], 1))
    crop = noise(112, 56, seed=9)
    ids, images, _ = found[-1]
    reply = chat.reply_ids(template.reply_message("What is it?", ["a", "b"], "ok", is_last=True), crop)
    found[-1] = Context([*ids, chat.end_of_turn_id, *reply], [*images, crop], 1)
    return found


def argmax_alone(model, chat, context, budget):
    """Greedy decoding written by hand: one sample, no cache, no padding."""
    ids, sampled = list(context.ids), []
    images = chat.encode_images(context.images)
    never = vision_token_ids(model.config)
    for _ in range(budget):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                mm_token_type_ids=torch.tensor([chat.token_types(ids)]),
                use_cache=False,
                **images,
            ).logits[0, -1]
        logits[never] = float("-inf")
        sampled.append(int(logits.argmax()))
        ids.append(sampled[-1])
        if chat.ends_turn(sampled[-1]):
            break
    return sampled


def bias(model, token_ids, by=100.0):
    """Lift some tokens above all others, after the last layer."""

    def lift(_module, _inputs, logits):
        logits[..., token_ids] += by
        return logits

    return model.lm_head.register_forward_hook(lift)


def test_greedy_is_the_argmax_at_every_step(model, chat, contexts):
    """In a padded batch with a cache, images of different sizes, and one context with two images."""
    batch = ModelGenerator(model, chat, [8])(contexts)
    alone = [argmax_alone(model, chat, context, 8) for context in contexts]
    assert [sample.ids for sample in batch] == alone
    assert len({tuple(ids) for ids in alone}) > 1  # the images and the prompts matter


def test_greedy_means_greedy_whatever_the_checkpoint_suggests(model, chat, contexts):
    """The published Qwen2.5-VL suggests `repetition_penalty=1.05`; training samples without it, and so do we."""
    plain = [sample.ids for sample in ModelGenerator(model, chat, [8])(contexts)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert any(len(set(ids)) < len(ids) for ids in plain)  # else a penalty would change nothing
    assert [sample.ids for sample in ModelGenerator(model, chat, [8])(contexts)] == plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vision_tokens_are_never_sampled(model, chat, contexts, temperature):
    never = vision_token_ids(model.config)
    assert len(never) == 4
    bias(model, never)
    torch.manual_seed(0)
    for sample in ModelGenerator(model, chat, [6], temperature)(contexts):
        assert sample.ids and not set(sample.ids) & set(never)


def test_a_turn_stops_at_the_end_of_turn_and_keeps_it(model, chat, contexts):
    bias(model, [chat.end_of_turn_id])
    assert [sample.ids for sample in ModelGenerator(model, chat, [6])(contexts)] == [[chat.end_of_turn_id]] * 3


def test_every_end_token_ends_a_turn(model, processor, contexts):
    other = processor.tokenizer.convert_tokens_to_ids("(A) ")
    chat = VisionChat(processor, max_pixels=112 * 112, min_pixels=56 * 56, end_ids=[other])
    bias(model, [other])
    assert [sample.ids for sample in ModelGenerator(model, chat, [6])(contexts)] == [[other]] * 3


def test_rows_that_end_early_lose_their_padding_only(model, chat, contexts, monkeypatch):
    end, pad = chat.end_of_turn_id, chat.tokenizer.pad_token_id

    def generate(input_ids, **kwargs):
        written = torch.tensor([[50, end, pad, pad], [51, 52, 53, end], [54, 55, 56, 57]])
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    samples = ModelGenerator(model, chat, [4])(contexts)
    assert [sample.ids for sample in samples] == [[50, end], [51, 52, 53, end], [54, 55, 56, 57]]


def test_each_round_has_its_own_budget(model, chat, contexts):
    bias(model, [60])
    generate = ModelGenerator(model, chat, [2, 5])
    assert [len(sample.ids) for sample in generate(contexts)] == [2, 2, 2]
    assert [len(s.ids) for s in generate([context._replace(round=2) for context in contexts])] == [5, 5, 5]


def test_sampling_follows_the_seed_and_the_temperature(model, chat, contexts):
    def sample(seed, temperature, top_p=1.0):
        torch.manual_seed(seed)
        return [one.ids for one in ModelGenerator(model, chat, [8], temperature, top_p)(contexts)]

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    greedy = sample(0, 0.0)
    assert sample(1, 1.0) != greedy
    assert sample(1, 1e-4) == sample(1, 1.0, top_p=1e-6) == greedy


def test_a_negative_temperature_is_refused(model, chat):
    with pytest.raises(ValueError, match="`temperature` must be >= 0, got -0.5. Use 0 for greedy"):
        ModelGenerator(model, chat, [4], temperature=-0.5)


# loading


def logits(model, chat, context):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([context.ids]),
            attention_mask=torch.ones(1, len(context.ids), dtype=torch.long),
            mm_token_type_ids=torch.tensor([chat.token_types(context.ids)]),
            **chat.encode_images(context.images),
        ).logits


@pytest.fixture(scope="module")
def adapter_dir(tiny_dir, processor, tmp_path_factory):
    """A LoRA adapter with an effect, saved as the trainer saves one: adapter and processor."""
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("base_is_named", [True, False])
def test_an_adapter_directory_is_its_base_with_the_adapter(tiny_dir, adapter_dir, chat, contexts, base_is_named):
    base = AutoModelForImageTextToText.from_pretrained(tiny_dir).eval()
    plain = logits(base, chat, contexts[0])
    expected = logits(PeftModel.from_pretrained(base, adapter_dir).eval(), chat, contexts[0])
    assert (expected - plain).abs().max() > 0.1
    loaded, processor = load_for_inference(str(adapter_dir), str(tiny_dir) if base_is_named else None, device="cpu")
    assert not loaded.training and not isinstance(loaded, PeftModel)
    assert torch.allclose(logits(loaded, chat, contexts[0]), expected, atol=1e-4)
    assert processor.image_token_id == chat.image_token_id


def test_an_adapter_without_a_processor_takes_that_of_its_base(tiny_dir, adapter_dir, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter_dir / name).read_bytes())
    model, processor = load_for_inference(str(tmp_path), device="cpu")
    assert processor.image_processor is not None and model.config.model_type == "qwen2_5_vl"


def test_a_model_directory_loads_in_the_asked_precision(tiny_dir):
    model, processor = load_for_inference(str(tiny_dir), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("kind", [Gemma3Config, InternVLConfig, SmolVLMConfig, LlamaConfig])
def test_another_family_is_refused_before_its_weights_load(kind, tmp_path, monkeypatch):
    kind().save_pretrained(tmp_path)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights loaded"))
    with pytest.raises(ValueError, match=f"Models of type '{kind.model_type}' are not supported"):
        load_for_inference(str(tmp_path))


def test_a_model_without_an_image_processor_is_refused_before_its_weights_load(tiny_dir, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights loaded"))
    with pytest.raises(ValueError, match="without an image processor: not a vision-language model"):
        load_for_inference(str(tiny_dir))
