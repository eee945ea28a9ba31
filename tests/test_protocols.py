"""Protocols with scripted generators: what comes back, what is asked, and that the first round is sampled once."""

import pytest

from mgpo_trl.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    SharedFirstRound,
    _grown,
    oracle_box,
    resolve_protocols,
)
from mgpo_trl.processing import VisionChat
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.rollout import RoundTemplate, Sampled, start_rollouts

TEXTS = ['[{"bbox_2d": [10, 10, 50, 40]}]', "no box"]
ANSWER = "\\boxed{A}"


@pytest.fixture(scope="module")
def chat(tiny_dir):
    from transformers import AutoProcessor

    return VisionChat(AutoProcessor.from_pretrained(tiny_dir), max_pixels=84 * 84, min_pixels=56 * 56)


@pytest.fixture
def template(chat):
    return RoundTemplate(PromptTemplate(), chat, "absolute", min_box_side=14)


class Script:
    """Writes fixed texts, and remembers what it was asked."""

    def __init__(self, chat, texts=TEXTS):
        self.chat, self.texts, self.calls = chat, texts, []

    def __call__(self, contexts):
        self.calls.append(contexts)
        texts = self.texts if contexts[0].round == 1 and len(contexts[0].images) == 1 else [ANSWER] * len(contexts)
        return [
            Sampled([*self.chat.tokenizer(t)["input_ids"], self.chat.end_of_turn_id]) for t in texts[: len(contexts)]
        ]


def play(name, photos, template, seed=0, num_rounds=2):
    protocol = Protocol(name, 1 if name == "direct" else num_rounds)
    own = protocol.template(template, seed)
    script = Script(template.chat, TEXTS if name != "direct" else [ANSWER] * 2)
    rollouts = start_rollouts(photos[:2], own, protocol.num_rounds)
    protocol.play(rollouts, script, own)
    return rollouts, script


def shown(rollouts):
    return [rollout.turns[0].shown_px for rollout in rollouts]


def test_what_comes_back(photos, template):
    """Photos of 400x200 and 150x300; the first box is usable, the second answer holds none."""
    rollouts, _ = play("mgpo", photos, template)
    named = rollouts[0].turns[0].box_original_px
    assert shown(rollouts) == [named, None] and named == (35, 35, 179, 143)
    assert [[turn.text for turn in rollout.turns] for rollout in rollouts] == [[text, ANSWER] for text in TEXTS]
    rollouts, _ = play("no-crop", photos, template)
    assert shown(rollouts) == [(0, 0, 400, 200), None] and rollouts[0].turns[0].box_original_px == named
    assert rollouts[0].turns[0].reply_image.size == rollouts[0].view.size
    rollouts, _ = play("oracle-crop", photos, template)
    assert shown(rollouts) == [(0, 0, 200, 100), (0, 0, 75, 150)]
    assert [rollout.turns[0].box.status.value for rollout in rollouts] == ["ok", "no_json"]
    rollouts, _ = play("direct", photos, template)
    assert [len(rollout.turns) for rollout in rollouts] == [1, 1] and rollouts[0].boxes == []


def test_a_random_crop_has_the_size_of_the_box_and_a_place_of_its_own(photos, template):
    places = set()
    for seed in range(20):
        rollouts, _ = play("random-crop", photos, template, seed)
        x1, y1, x2, y2 = rollouts[0].turns[0].shown_px
        assert (x2 - x1, y2 - y1) == (144, 108) and 0 <= x1 and x2 <= 400 and 0 <= y1 and y2 <= 200
        assert rollouts[1].turns[0].shown_px is None
        places.add((x1, y1))
    assert len(places) > 15
    again = [shown(play("random-crop", photos, template, 3)[0]) for _ in range(2)]
    assert again[0] == again[1]


def test_crop_only_asks_with_the_crop_alone(photos, template):
    rollouts, script = play("crop-only", photos, template)
    grounding, answer = script.calls
    assert [len(context.images) for context in answer] == [1, 1] and answer[0].round == 2
    assert answer[0].images[0] is rollouts[0].turns[0].reply_image
    assert answer[1].images[0] is rollouts[1].view  # no usable box: the whole image, alone
    direct = template.prompts.first_messages(photos[0]["question"], photos[0]["choices"], 1)
    assert answer[0].ids == template.chat.prompt_ids(direct, answer[0].images)
    assert [rollout.turns[-1].text for rollout in rollouts] == [ANSWER] * 2 and len(rollouts[0].turns) == 2


def test_the_reply_announces_a_crop_where_one_comes_back(photos, template):
    texts = {name: template.chat.tokenizer.decode(play(name, photos, template)[0][1].turns[0].reply_ids)
             for name in ("mgpo", "oracle-crop")}  # fmt: skip
    assert "no usable region" in texts["mgpo"] and "no usable region" not in texts["oracle-crop"]


def test_the_first_round_is_sampled_once(photos, template):
    script, seen = Script(template.chat), []
    first = SharedFirstRound(script)
    for name in ("mgpo", "no-crop", "random-crop", "oracle-crop", "crop-only"):
        protocol = Protocol(name, 2)
        own = protocol.template(template, 0)
        rollouts = start_rollouts(photos[:2], own, 2)
        protocol.play(rollouts, first.for_rollouts(rollouts), own)
        seen.append([rollout.turns[0].ids for rollout in rollouts])
    assert all(one == seen[0] for one in seen)
    assert [calls[0].round for calls in script.calls] == [1, 2, 2, 2, 2, 2]
    more = start_rollouts(photos[:3], template, 2)
    first.for_rollouts(more)([type("C", (), {"round": 1, "images": [0]})()] * 3)
    assert len(script.calls[-1]) == 1  # only the third is new


def test_oracle_boxes_grow_to_the_smallest_usable_size(photos, template):
    assert (
        _grown(10, 12, 8, 100) == (7, 15) and _grown(0, 2, 8, 100) == (0, 8) and _grown(99, 100, 8, 100) == (92, 100)
    )
    assert _grown(10, 40, 8, 100) == (10, 40) and _grown(1, 2, 200, 100) == (0, 100)
    (rollout,) = start_rollouts(photos[:1], template, 2)  # 400x200 seen as 112x56
    rollout.target_boxes = [(100, 100, 104, 102)]
    x1, y1, x2, y2 = oracle_box(rollout, template)
    assert x1 <= 100 and x2 >= 104 and y1 <= 100 and y2 >= 102
    assert (x2 - x1) * 112 / 400 > 14 and (y2 - y1) * 56 / 200 > 14 and x2 - x1 < 60


def test_names():
    assert [p.name for p in resolve_protocols(None, 1)] == ["direct"]
    assert [(p.name, p.num_rounds) for p in resolve_protocols(None, 3)] == [("mgpo", 3)]
    assert [p.num_rounds for p in resolve_protocols(PROTOCOLS, 1)] == [1, 2, 2, 2, 2, 2]
    assert not Protocol("oracle-crop", 2).takes({"target_boxes": None}) and Protocol("mgpo", 2).takes({})
    with pytest.raises(ValueError, match="must be among .*got 'magic'"):
        resolve_protocols(["magic"], 2)
    with pytest.raises(ValueError, match="names one twice"):
        resolve_protocols(["mgpo", "mgpo"], 2)
