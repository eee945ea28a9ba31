"""What the trainer makes of hand-written turns: ids, masks, images and metrics."""

import pytest
import torch
from scripted import ANSWER, BOX, VIEW_SIZES, box_text, generate, group_rows, photos_dataset
from transformers import AutoProcessor

from mgpo_trl.boxes import BoxStatus, format_box
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import open_image


@pytest.fixture
def scripted_batch(make_trainer, script, photos):
    """Landscape and portrait photo, two rollouts each: a box, no box, a cut box, a cut answer."""
    trainer = make_trainer(photos_dataset(photos))
    grounding = [box_text(0), "I do not know.", (box_text(1),), box_text(1, (10, 20, 56, 60))]
    answers = [ANSWER, "\\boxed{B}", "\\boxed{B}", ("It is \\boxed",)]
    return trainer, *generate(trainer, script, group_rows(photos[:2]), grounding, answers)


def test_sampled_ids_reach_the_loss_as_sampled(scripted_batch):
    trainer, output, turns = scripted_batch
    pad = trainer._tokenizer.pad_token_id
    for number in range(4):
        grounding, answer = turns[0][number], turns[1][number]
        ids, turn_ids = output["completion_ids"][number].tolist(), output["turn_ids"][number].tolist()
        mask = output["completion_mask"][number].tolist()
        reply = ids[len(grounding) : sum(mask) - len(answer)]
        assert ids == [*grounding, *reply, *answer, *[pad] * (len(ids) - sum(mask))]
        assert turn_ids == [1] * len(grounding) + [0] * len(reply) + [2] * len(answer) + [0] * (len(ids) - sum(mask))
        assert mask == [1] * sum(mask) + [0] * (len(ids) - sum(mask))
        text = trainer._tokenizer.decode(reply)
        assert text.startswith("<|im_end|>\n<|im_start|>user" if number == 2 else "\n<|im_start|>user")
        assert text.endswith("<|im_start|>assistant\n") and "(A) vertical lines" in text


def test_the_prompt_is_rendered_without_tools_and_padded_on_the_left(scripted_batch):
    trainer, output, _ = scripted_batch
    for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True):
        text = trainer._tokenizer.decode(ids[mask.bool()])
        assert text.startswith(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        assert "tool" not in text and "vertical" not in text and mask.tolist() == sorted(mask.tolist())


def test_the_loss_sees_the_view_and_the_crop_of_the_original(scripted_batch, photos):
    trainer, output, _ = scripted_batch
    expected = []
    for number, box in zip([0, 0, 1, 1], [BOX[0], None, BOX[1], (10, 20, 56, 60)], strict=True):
        original = open_image(photos[number]["image"], "")
        shown = original if box is None else original.crop(view_to_original(box, VIEW_SIZES[number], original.size))
        expected += [original, shown]
    theirs = trainer.processing_class.image_processor(images=expected, return_tensors="pt")
    assert output["num_images"] == [2, 2, 2, 2]
    assert torch.equal(output["image_grid_thw"], theirs["image_grid_thw"])
    assert torch.equal(output["pixel_values"], theirs["pixel_values"])
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    assert torch.equal(output["mm_token_type_ids"], (ids == trainer.chat.image_token_id).long())
    assert len({tuple(grid) for grid in output["image_grid_thw"].tolist()}) > 2


def test_metrics_of_the_rollouts(scripted_batch):
    trainer, _, turns = scripted_batch
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    statuses = {
        name.rsplit("/", 1)[1]: value for name, value in metrics.items() if name.startswith("grounding/status")
    }
    assert statuses == {status.value: {"ok": 0.75, "no_json": 0.25}.get(status.value, 0.0) for status in BoxStatus}
    assert metrics["grounding/valid_ratio"] == 0.75
    assert metrics["turn1/truncated_ratio"] == metrics["turn2/truncated_ratio"] == 0.25
    for number in (1, 2):
        assert metrics[f"turn{number}/length"] == sum(map(len, turns[number - 1])) / 4
    # crops 162x130 of 400x200 (5..50 x 400/112, 4..40 x 200/56), 124x242 and 124x108 of 150x300
    first, second, third = (17, 14, 179, 143), (10, 26, 134, 268), (26, 53, 150, 161)
    assert view_to_original(BOX[0], (112, 56), (400, 200)) == first
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second, third)]
    crop_area = (areas[0] / 80_000 + areas[1] / 45_000 + areas[2] / 45_000) / 3
    assert metrics["grounding/crop_area"] == pytest.approx(crop_area)
    covered = [(179 - 17) * (100 - 14) / 20_000, 0.0, (75 - 10) * (150 - 26) / 11_250, (75 - 26) * (150 - 53) / 11_250]
    assert metrics["grounding/coverage"] == pytest.approx(sum(covered) / 4)
    assert metrics["grounding/hit_rate"] == sum(share >= 0.5 for share in covered) / 4 == 0.5
    assert not [name for name in metrics if name.startswith("tools/")]


def test_metrics_are_averaged_over_the_rollouts_that_have_them(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos))
    rows = group_rows([{**photos[2], "target_boxes": None}])
    generate(trainer, script, rows, ["no", "no"], ["\\boxed{A}", "\\boxed{A}"])
    names = set(trainer._metrics["train"])
    assert not {"grounding/crop_area", "grounding/coverage", "grounding/hit_rate"} & names
    assert trainer._metrics["train"]["grounding/valid_ratio"] == [0.0]


def test_turn_metrics_of_the_loss(scripted_batch):
    trainer, output, _ = scripted_batch
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, output)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    logps, entropies = trainer._loss_outputs
    for number in (1, 2):
        assert metrics[f"turn{number}/entropy"] == pytest.approx(entropies[output["turn_ids"] == number].mean().item())
    assert metrics["entropy"] == pytest.approx(entropies[output["turn_ids"] > 0].mean().item())
    assert metrics["turn1/clip_ratio"] == metrics["turn2/clip_ratio"] == 0.0 and "turn1/kl" not in metrics
    old = logps.clone()
    old[output["turn_ids"] == 2] -= 1.0  # the answer became e times as likely: clipped where it was right
    trainer._compute_loss(trainer.model, {**output, "old_per_token_logps": old})
    right = (output["turn_ids"] == 2) & (output["advantages"] > 0).unsqueeze(1)
    share = right.sum().item() / (output["turn_ids"] == 2).sum().item()
    assert trainer._metrics["train"]["turn1/clip_ratio"][-1] == 0.0
    assert trainer._metrics["train"]["turn2/clip_ratio"][-1] == pytest.approx(share)


def test_kl_of_each_turn(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos), beta=0.01)
    trainer.current_gradient_accumulation_steps = 1
    output, _ = generate(trainer, script, group_rows(photos[:1]), [box_text(0), "no"], [ANSWER, ANSWER])
    output["ref_per_token_logps"] = output["ref_per_token_logps"] - 0.5 * (output["turn_ids"] == 2)
    trainer._compute_loss(trainer.model, output)
    metrics = trainer._metrics["train"]
    assert metrics["turn1/kl"][-1] == pytest.approx(0.0, abs=1e-5)
    assert metrics["turn2/kl"][-1] == pytest.approx(2.718281828**-0.5 + 0.5 - 1, abs=1e-4)


def test_three_rounds_carry_three_images(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos), num_rounds=3)
    second = format_box((3, 3, 40, 50), (56, 56), "absolute")
    rounds = [box_text(2), "no"], [second, box_text(2)], [ANSWER, ANSWER]
    output, turns = generate(trainer, script, group_rows(photos[2:3]), *rounds)
    assert output["num_images"] == [3, 3] and output["image_grid_thw"].shape == (6, 3)
    for number in range(2):
        mine = [[turn_id for turn_id in output["turn_ids"][number].tolist() if turn_id == n] for n in (1, 2, 3)]
        assert [len(turn) for turn in mine] == [len(turns[n][number]) for n in range(3)]
    assert trainer._metrics["train"]["grounding/valid_ratio"] == [0.75]


def test_one_round_is_plain_grpo(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos), num_rounds=1)
    output, turns = generate(trainer, script, group_rows(photos[:2]), [ANSWER, "no", ANSWER, ("cut",)])
    assert output["num_images"] == [1] * 4 and "tool_mask" not in output
    assert torch.equal(output["turn_ids"], output["completion_mask"])
    text = trainer._tokenizer.decode(output["prompt_ids"][0])
    assert "(A) vertical lines" in text and "tool" not in text
    assert not [name for name in trainer._metrics["train"] if name.startswith("grounding/")]
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    assert torch.equal(output["mm_token_type_ids"], (ids == trainer.chat.image_token_id).long())


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_processor_that_pads_on_the_right_is_set_to_the_left(make_trainer, script, photos, tiny_dir, num_rounds):
    processor = AutoProcessor.from_pretrained(tiny_dir, padding_side="right")
    assert processor.tokenizer.padding_side == "right"
    trainer = make_trainer(
        photos_dataset(photos), num_rounds=num_rounds, kwargs={"processing_class": processor}, beta=0.01
    )
    rounds = [["no"] * 4, [ANSWER] * 4][:num_rounds]
    rows = group_rows([photos[0], {**photos[1], "question": "What?"}])
    output, _ = generate(trainer, script, rows, *rounds)
    assert output["prompt_mask"].min() == 0
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    assert torch.equal(output["mm_token_type_ids"], (ids == trainer.chat.image_token_id).long())


def test_cut_turns_leave_the_loss_but_not_the_attention(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos), mask_truncated_completions=True)
    rounds = [box_text(0), (box_text(0),), box_text(1), "no"], [ANSWER, ANSWER, ("cut",), ANSWER]
    output, turns = generate(trainer, script, group_rows(photos[:2]), *rounds)
    kept = [set(row.tolist()) - {0} for row in output["turn_ids"]]
    assert kept == [{1, 2}, {2}, set(), {1, 2}]
    trained = sum(len(turns[n][i]) for n, i in [(0, 0), (1, 0), (1, 1), (0, 3), (1, 3)])
    assert output["num_items_in_batch"].item() == trained
    assert output["completion_mask"].sum(1)[2] > len(turns[0][2]) + len(turns[1][2])


def test_the_number_of_items_is_weighed(make_trainer, script, photos):
    trainer = make_trainer(photos_dataset(photos), turn_loss_weights=[0.5, 2.0])
    output, turns = generate(trainer, script, group_rows(photos[:1]), [box_text(0), "no"], [ANSWER, ANSWER])
    lengths = [sum(map(len, turns[0])), sum(map(len, turns[1]))]
    assert output["num_items_in_batch"].item() == lengths[0] + 4.0 * lengths[1]
