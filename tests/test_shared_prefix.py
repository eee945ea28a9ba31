"""Generation that shares prefixes gives what `model.generate` gives, and computes each shared part once."""

import threading

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from scripted import group_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import mgpo_trl.rollout
from mgpo_trl.generation import ModelGenerator
from mgpo_trl.processing import SHARED_FAMILIES, VisionChat, vision_token_ids
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import Context, RoundTemplate, Sampled, run_rounds, start_rollouts
from mgpo_trl.shared_prefix import ImageFeatures, SharedPrefixSampler, unknown_options

BUDGETS = [7, 9, 5]


@pytest.fixture(scope="module", params=SHARED_FAMILIES)
def model_dir(family_dir, request):
    return family_dir(request.param)


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def chat(model_dir):
    processor = AutoProcessor.from_pretrained(model_dir)
    return VisionChat(processor, max_pixels=112 * 112, min_pixels=56 * 56)


def config_of(model, chat, **options):
    return GenerationConfig(
        pad_token_id=chat.tokenizer.pad_token_id, eos_token_id=sorted(chat.end_ids),
        suppress_tokens=vision_token_ids(model.config), **{"do_sample": False, **options},
    )  # fmt: skip


def sampler_of(model, chat, num_rounds=2, **options):
    features = ImageFeatures(model.base_model, chat)
    return SharedPrefixSampler(model, chat, config_of(model, chat, **options), BUDGETS[:num_rounds], features)


def played(chat, rows, generate, num_rounds):
    """Rollouts of the rows, played with a generator; boxes are small enough for a random model to hit some."""
    template = RoundTemplate(PromptTemplate(), chat, "absolute", min_box_side=1)
    rollouts = start_rollouts(rows, template, num_rounds)
    return run_rounds(rollouts, generate, template, num_rounds)


def sampled_ids(rollouts):
    return [[turn.ids for turn in rollout.turns] for rollout in rollouts]


def boxes_first(generate, texts, chat):
    """The generator, with its first round's turns replaced by texts of the same rows (cached as if sampled)."""

    def forced(contexts):
        if contexts[0].round > 1:
            return generate(contexts)
        ids = [chat.tokenizer(text)["input_ids"] + [chat.end_of_turn_id] for text in texts]
        generate(contexts)
        return [Sampled(one) for one in ids]

    return forced


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_greedy_turns_equal_those_of_generate(model, chat, photos, num_rounds):
    """Different images, prompts and lengths in one batch; a group of three, and rows alone."""
    rows = [photos[0], *[dict(photos[number]) for number in (1, 1, 1, 2, 3)]]
    plain = played(chat, rows, ModelGenerator(model, chat, BUDGETS[:num_rounds]), num_rounds)
    shared = played(chat, rows, sampler_of(model, chat, num_rounds), num_rounds)
    assert sampled_ids(shared) == sampled_ids(plain)
    assert len({tuple(turn.ids) for rollout in plain for turn in rollout.turns}) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 0},
        {"do_sample": True, "top_k": 5, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "top_k": 0},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_options_equal_those_of_generate(model, chat, photos, options):
    """The same draws: with no row dropped, both ask the random generator for the same numbers in the same order."""
    rows = group_rows(photos[:2], 2)
    config = config_of(model, chat, max_new_tokens=BUDGETS[0], **options)
    contexts = [Context(r.prompt_ids, r.images, 1) for r in played(chat, rows, lambda c: [Sampled([5])] * 4, 1)]
    inputs = ModelGenerator(model, chat, BUDGETS)._inputs(contexts)
    torch.manual_seed(3)
    expected = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].size(1) :]
    sampler = sampler_of(model, chat, 1, **options)
    sampler.ends = torch.tensor([-1])
    torch.manual_seed(3)
    ends = chat.end_ids
    for row, sampled in zip(expected.tolist(), sampler(contexts), strict=True):
        stop = next((i for i, one in enumerate(row) if one in ends), len(row) - 1)
        assert sampled.ids[: stop + 1] == row[: stop + 1]


def test_what_is_shared_is_computed_once(model, chat, photos, monkeypatch):
    """Two groups of three: every image once, every prompt once, then only replies; equal boxes are one."""
    rows, prefilled, encoded = group_rows(photos[:2], 3), [], []
    forward, encode = model.forward, model.base_model.get_image_features

    def counting(input_ids, **kwargs):
        if input_ids.size(1) > 1:
            prefilled.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    def encoding(pixel_values, grids, **kwargs):
        encoded.append(len(grids))
        return encode(pixel_values, grids, **kwargs)

    monkeypatch.setattr(model, "forward", counting)
    monkeypatch.setattr(model.base_model, "get_image_features", encoding)
    sampler = sampler_of(model, chat)
    texts = ['[{"bbox_2d": [2, 2, 40, 40]}]'] * 2 + ["none"] + ['[{"bbox_2d": [4, 4, 50, 90]}]'] * 3
    monkeypatch.setattr("mgpo_trl.shared_prefix._Decoding.run", force_first_round(texts, chat))
    rollouts = played(chat, rows, sampler, 2)
    assert sum(encoded) == 2 + 2  # two views, two distinct crops; the third row gets its view back
    prompts = [shape for shape in prefilled if shape[1] == max(map(len, (r.prompt_ids for r in rollouts)))]
    assert sum(shape[0] for shape in prompts) == 2
    assert sum(shape[0] for shape in prefilled) == 2 + 3  # two prompts; three distinct second contexts


def force_first_round(texts, chat):
    """A `_Decoding.run` that writes these texts in round 1, through the model's cache, and samples afterwards."""
    from mgpo_trl.shared_prefix import _Decoding

    original, calls = _Decoding.run, []

    def run(self, budget):
        if calls:
            return original(self, budget)
        calls.append(1)
        ids = [[*chat.tokenizer(text)["input_ids"], chat.end_of_turn_id] for text in texts]
        steps = iter(range(100))

        def choose():
            step = next(steps)
            return torch.tensor([ids[n][step] if step < len(ids[n]) else 0 for n in self.numbers.tolist()])

        self._choose = choose
        return original(self, max(map(len, ids)))

    return run


def test_rows_that_ended_leave_the_batch(model, chat, photos, monkeypatch):
    rows, sizes = group_rows(photos, 1), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda input_ids, **kw: sizes.append(tuple(input_ids.shape)) or forward(input_ids=input_ids, **kw),
    )
    texts = ["no", "no", '[{"bbox_2d": [2, 2, 40, 40]}]', "no"]
    monkeypatch.setattr("mgpo_trl.shared_prefix._Decoding.run", force_first_round(texts, chat))
    forced = played(chat, rows, sampler_of(model, chat), 2)
    assert (1, 1) in sizes and (4, 1) in sizes
    monkeypatch.undo()
    plain = ModelGenerator(model, chat, BUDGETS[:2])
    expected = played(chat, rows, lambda c: first_of(forced) if c[0].round == 1 else plain(c), 2)
    assert sampled_ids(forced) == sampled_ids(expected)


def first_of(rollouts):
    return [Sampled(rollout.turns[0].ids) for rollout in rollouts]


def test_contexts_that_do_not_continue_are_refused(model, chat, photos):
    rollouts = played(chat, photos[:2], lambda contexts: [Sampled([5])] * 2, 1)
    sampler = sampler_of(model, chat)
    sampler([Context(r.prompt_ids, r.images, 1) for r in rollouts])
    with pytest.raises(ValueError, match=r"Context \d of round 2 does not continue"):
        sampler([Context([9, *r.prompt_ids], r.images, 2) for r in rollouts])


def test_unknown_options_are_named(model, chat):
    assert (
        unknown_options(config_of(model, chat, do_sample=True, temperature=0.5, top_k=0, no_repeat_ngram_size=0)) == []
    )
    assert unknown_options(config_of(model, chat, do_sample=True)) == ["top_k"]
    config = config_of(model, chat, num_beams=3, no_repeat_ngram_size=2)
    assert unknown_options(config) == ["no_repeat_ngram_size", "num_beams"]


# in the trainer


def test_the_trainer_shares_and_falls_back(make_trainer, photos):
    assert make_trainer(Dataset.from_list(photos))._shares_prefix
    assert not make_trainer(Dataset.from_list(photos), share_prefix=False)._shares_prefix
    odd = make_trainer(Dataset.from_list(photos), generation_kwargs={"no_repeat_ngram_size": 3})
    assert not odd._shares_prefix


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_log_probabilities_of_the_sampler_equal_those_of_the_loss(make_trainer, photos, model_dir, lora):
    """The sampler's own, kept where it chooses, against the packed loss pass."""
    kwargs = (
        {"peft_config": LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)} if lora else {}
    )
    trainer = make_trainer(
        Dataset.from_list(photos), per_device_train_batch_size=8, num_generations=2, round_token_budgets=[12, 8],
        min_box_side=1, temperature=0.8, model=model_dir, max_pixels=96 * 96, kwargs=kwargs,
    )  # fmt: skip
    trainer._keeps_logprobs = True
    trainer.model.train()
    batch = trainer._generate_and_score_completions(group_rows(photos, 2))
    trainer._facts = trainer._facts_of_batch(batch)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad():
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            compute_entropy=True,
            **{name: batch[name] for name in names},
        )
    sampled = batch["turn_ids"] > 0
    assert (batch["sampling_per_token_logps"][sampled] < 0).all()
    assert (logps - batch["sampling_per_token_logps"])[sampled].abs().max() < 1e-4
    assert (entropies[batch["turn_ids"] > 0] > 0).all() and (entropies[batch["turn_ids"] == 0] == 0).all()


def test_crops_are_cut_by_threads_while_others_sample(make_trainer, photos, monkeypatch):
    """Row 0 names a region in its first turn and ends; the other goes on to its budget."""
    trainer = make_trainer(
        Dataset.from_list(photos), per_device_train_batch_size=2, num_generations=2, round_token_budgets=[48, 4],
        min_box_side=1,
    )  # fmt: skip
    cut, running = [], []
    crop = mgpo_trl.rollout.crop_original

    def watched(image, box):
        cut.append((box, threading.current_thread().name))
        return crop(image, box)

    monkeypatch.setattr(mgpo_trl.rollout, "crop_original", watched)
    monkeypatch.setattr(
        trainer, "_begin_crop", lambda *one, begin=trainer._begin_crop: running.append(one[0]) or begin(*one)
    )
    texts = ['[{"bbox_2d": [2, 2, 60, 40]}]', "no box in this one, and it is a longer text than the other"]
    monkeypatch.setattr("mgpo_trl.shared_prefix._Decoding.run", force_first_round(texts, trainer.chat))
    trainer.model.train()
    trainer._generate_and_score_completions(group_rows(photos[:1], 2))
    assert running[:2] == [0, 1] and len(cut) == 1
    assert cut[0][1].startswith("images") and cut[0][0] == (7, 7, 215, 143)
