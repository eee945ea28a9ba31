"""The warm start must show the model exactly the ids that the trainer will show it."""

import numpy as np
import pytest
import torch

from mgpo_trl.builtin.batch import Collator, branch_mask, token_losses, weighted_mean
from mgpo_trl.builtin.lessons import Lessons, Sample
from mgpo_trl.builtin.needle import make_row
from mgpo_trl.builtin.scenes import MAX_PIXELS, MIN_PIXELS
from mgpo_trl.builtin.tiny import build_tiny
from mgpo_trl.images import open_image
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import RoundTemplate, Sampled, flatten, run_rounds


@pytest.fixture(scope="module", params=["needle", "refer"])
def setting(request):
    model, processor = build_tiny(request.param, seed=3)
    chat = VisionChat(processor, max_pixels=MAX_PIXELS, min_pixels=MIN_PIXELS)
    lessons = Lessons(chat, PromptTemplate(), request.param, seed=1)
    return model, chat, lessons, lessons.items(0, 3)


def _play(chat, level, index, turns):
    """The rollout of row `index` when the model says `turns`."""
    template = RoundTemplate(PromptTemplate(), chat, "absolute", min_box_side=14)
    row = make_row(level, "train", index, 1)
    image = open_image(row["image"], row["id"])
    rollout = template.start(row, image, chat.fit(image), len(turns))
    said = iter([[*chat.tokenizer.encode(turn), chat.end_of_turn_id] for turn in turns])
    run_rounds([rollout], lambda contexts: [Sampled(next(said)) for _ in contexts], template, len(turns))
    return flatten(rollout)


@pytest.mark.parametrize("cell", [0, 4, 8])
def test_a_dialogue_is_the_rollout_of_the_trainer(setting, cell):
    _, chat, lessons, items = setting
    sample = lessons.dialogue(items[2], cell, np.random.default_rng(0))
    taught = [index for index, weight in enumerate(sample.weights) if weight]
    turns = chat.decode([sample.ids[index] for index in taught if sample.ids[index] != chat.end_of_turn_id])
    box, answer = turns.split("```The ")
    rollout = _play(chat, lessons.level, 2, [f"{box}```", f"The {answer}"])
    assert sample.ids == rollout.ids
    prompt = len(rollout.ids) - len(rollout.turn_ids)
    assert taught == [prompt + index for index, turn in enumerate(rollout.turn_ids) if turn]
    for ours, theirs in zip(sample.images, rollout.images, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_direct_answer_is_the_one_round_rollout(setting):
    _, chat, lessons, items = setting
    rollout = _play(chat, lessons.level, 0, ["The card shows falling lines. \\boxed{D}"])
    assert lessons.direct(items[0], hatch=3).ids == rollout.ids


def test_the_answer_is_right_where_the_crop_shows_the_card(setting):
    _, chat, lessons, items = setting
    for item in items:
        text = chat.decode(lessons.dialogue(item, item.asked.cell, np.random.default_rng(0)).ids)
        assert text.endswith("\\boxed{" + "ABCD"[item.asked.hatch] + "}")
    elsewhere = (items[0].asked.cell + 1) % 9
    guesses = {chat.decode(lessons.dialogue(items[0], elsewhere, np.random.default_rng(s)).ids)[-2] for s in range(30)}
    assert guesses == set("ABCD")


def test_a_given_box_is_read_only(setting):
    _, chat, lessons, items = setting
    sample = lessons.dialogue(items[0], 4, np.random.default_rng(0), box_weight=0.0)
    assert sum(weight > 0 for weight in sample.weights) == 6
    assert all(weight == 0 for weight in sample.weights[:-6])


def test_the_probe_weighs_the_first_corner_alone(setting):
    _, chat, lessons, items = setting
    sample = lessons.probe(items[1])
    column, row = items[1].asked.cell % 3, items[1].asked.cell // 3
    weighed = [chat.decode([i]) for i, weight in zip(sample.ids, sample.weights, strict=True) if weight]
    assert weighed == [str(28 * column), str(28 * row)]


def test_branch_mask():
    mask = branch_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0] == 0
    assert mask.int().tolist()[:5] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]


def test_every_branch_is_computed_as_if_it_were_alone(setting):
    model, chat, lessons, items = setting
    if lessons.level == "needle":
        pytest.skip("one card has no branches")
    collate, sample = Collator(model, chat), lessons.branches(items[0], other_weight=0.1)
    together = _losses(model, collate, sample)
    assert sorted(set(sample.segments)) == [0, 1, 2, 3, 4]
    for branch in range(1, 5):
        own = [i for i, segment in enumerate(sample.segments) if segment in (0, branch)]
        alone = Sample([sample.ids[i] for i in own], [sample.weights[i] for i in own], [0] * len(own), sample.images)
        expected = _losses(model, collate, alone)
        ours = [i for i in own if sample.segments[i] == branch][1:]  # the first of a branch has no target before it
        assert torch.allclose(together[[i - 1 for i in ours]], expected[-len(ours) :], atol=1e-5)


def test_losses_equal_those_of_a_plain_forward_pass(setting):
    model, chat, lessons, items = setting
    sample = lessons.dialogue(items[0], 4, np.random.default_rng(0))
    batch = Collator(model, chat)([sample, lessons.direct(items[1], 0)])
    with torch.no_grad():
        ours = token_losses(model, batch)[0]
        logits = model(
            input_ids=torch.tensor([sample.ids]),
            mm_token_type_ids=torch.tensor([chat.token_types(sample.ids)], dtype=torch.int),
            **chat.encode_images(sample.images),
        ).logits[0, :-1]
    plain = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.ids[1:]), reduction="none")
    taught = torch.tensor(sample.weights[1:]) > 0
    assert torch.allclose(ours[: len(plain)][taught], plain[taught], atol=1e-5)
    assert not ours[: len(plain)][~taught].any()


def test_weighted_mean():
    assert weighted_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[3.0, 1.0, 0.0]])) == 1.5


def _losses(model, collate, sample):
    with torch.no_grad():
        return token_losses(model, collate([sample]))[0]
