import dataclasses
import json

import pytest

from mgpo_trl import MGPOConfig
from mgpo_trl.conversation import CONVERSATION_FILE, Conversation
from mgpo_trl.prompts import PROTOCOL_VERSION, PromptTemplate, load_prompts

EVERY_FIELD_CHANGED = Conversation(
    num_rounds=3,
    max_pixels=7056,
    min_pixels=3136,
    token_budgets=(5, 6, 7),
    coordinates="relative_1000",
    min_box_side=14,
    max_box_aspect=7.5,
    zoom_from="original",
    prompts=PromptTemplate(system="Sei genau. é", grounding="{question} Where? \\boxed{} {"),
)


def test_save_and_load_keep_every_setting(tmp_path):
    for field in dataclasses.fields(Conversation):
        assert getattr(EVERY_FIELD_CHANGED, field.name) != getattr(Conversation(), field.name), field.name
    EVERY_FIELD_CHANGED.save(tmp_path)
    loaded = Conversation.load(tmp_path)
    assert loaded == EVERY_FIELD_CHANGED
    assert loaded.prompts.fingerprint == EVERY_FIELD_CHANGED.prompts.fingerprint
    assert json.loads((tmp_path / CONVERSATION_FILE).read_text())["protocol_version"] == PROTOCOL_VERSION


def test_a_directory_without_the_file_has_no_conversation(tmp_path):
    assert Conversation.load(tmp_path) is None


@pytest.mark.parametrize("place", ["top", "prompts"])
def test_an_unknown_setting_is_named(tmp_path, place):
    Conversation().save(tmp_path)
    path = tmp_path / CONVERSATION_FILE
    record = json.loads(path.read_text())
    (record if place == "top" else record["prompts"])["zoom_twice"] = True
    path.write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=r"conversation.json' names unknown settings \['zoom_twice'\].*Update mgpo-trl"
    ):
        Conversation.load(tmp_path)


@pytest.mark.parametrize(
    "budgets, num_rounds, expected",
    [
        ((12, 34), 1, (34,)),
        ((12, 34), 2, (12, 34)),
        ((12, 34), 4, (12, 12, 12, 34)),
        ((5, 6, 7), 2, (5, 7)),
        ((9,), 2, (9, 9)),
    ],
)
def test_another_number_of_rounds_keeps_the_budget_of_the_answer(budgets, num_rounds, expected):
    before = Conversation(num_rounds=len(budgets), token_budgets=budgets, max_pixels=7056, min_pixels=3136)
    after = before.with_rounds(num_rounds)
    assert (after.num_rounds, after.token_budgets) == (num_rounds, expected)
    assert dataclasses.replace(after, num_rounds=len(budgets), token_budgets=budgets) == before


def test_no_rounds_at_all_is_refused():
    with pytest.raises(ValueError, match="`num_rounds` must be >= 1, got 0. Use 1"):
        Conversation().with_rounds(0)


def test_a_config_describes_the_same_conversation(tmp_path):
    """Every setting of the conversation arrives from the options of training, pixel caps as numbers."""
    prompts_file = tmp_path / "prompts.yaml"
    prompts_file.write_text("system: Be brief.\n")
    args = MGPOConfig(
        str(tmp_path),
        num_rounds=3,
        max_pixels="9x28x28",
        min_pixels="4x28x28",
        round_token_budgets=[5, 6, 7],
        coordinates="relative_1000",
        min_box_side=14,
        max_box_aspect=7.5,
        zoom_from="original",
        prompts_file=str(prompts_file),
    )
    prompts = load_prompts(args.prompts_file)
    assert prompts.system == "Be brief."
    assert Conversation.from_config(args, prompts) == dataclasses.replace(EVERY_FIELD_CHANGED, prompts=prompts)
    default = Conversation.from_config(MGPOConfig(str(tmp_path)), PromptTemplate())
    assert default == Conversation()


def test_the_template_is_set_to_the_conversation(tiny_dir):
    from transformers import AutoProcessor

    template = EVERY_FIELD_CHANGED.template(AutoProcessor.from_pretrained(tiny_dir), "qwen2_5_vl", end_ids=[3])
    assert (template.coordinates, template.min_box_side) == ("relative_1000", 14)
    assert (template.max_box_aspect, template.zoom_from) == (7.5, "original")
    assert (template.chat.max_pixels, template.chat.min_pixels) == (7056, 3136) and 3 in template.chat.end_ids
    auto = Conversation(max_pixels=7056, min_pixels=3136)
    assert auto.template(AutoProcessor.from_pretrained(tiny_dir), "qwen2_5_vl").coordinates == "absolute"
