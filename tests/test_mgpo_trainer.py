"""What the trainer makes of hand-written turns: ids, masks, images, rewards, metrics, and errors that name the row."""

import io

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

import mgpo_trl.rollout
from mgpo_trl.boxes import BoxStatus, format_box
from mgpo_trl.geometry import view_to_original
from mgpo_trl.images import ImageError, open_image
from mgpo_trl.processing import vision_token_ids

VIEW_SIZES = [(112, 56), (56, 112), (84, 84), (84, 56)]  # of the rows in `photos`
BOX = {number: (5, 4, 50, 40) if number != 1 else (4, 10, 50, 100) for number in range(4)}


def ids_of(trainer, text, end=True):
    return trainer._tokenizer(text)["input_ids"] + ([trainer._tokenizer.eos_token_id] if end else [])


def box_text(number, box=None):
    return format_box(box or BOX[number], VIEW_SIZES[number], "absolute", "card")


def group_rows(rows, generations=2):
    return [dict(row) for row in rows for _ in range(generations)]


def generate(trainer, script, rows, *rounds):
    """The training batch of hand-written turns, given as texts ("..." closed, ("...",) cut) for each round and row."""
    turns = [
        [ids_of(trainer, turn) if isinstance(turn, str) else ids_of(trainer, *turn, end=False) for turn in turns]
        for turns in rounds
    ]
    newline = ids_of(trainer, "\n", end=False)
    for written, ids in zip(rounds, turns, strict=True):
        for number, turn in enumerate(written):
            if isinstance(turn, tuple):  # a cut turn used up its whole budget
                ids[number] += newline * (max(map(len, ids)) - len(ids[number]))
    script(trainer, *turns)
    trainer.model.train()
    return trainer._generate_and_score_completions(rows), turns


ANSWER = "The card shows vertical lines. \\boxed{A}"


@pytest.fixture
def scripted_batch(make_trainer, script, photos):
    """Landscape and portrait photo, two rollouts each: a box, no box, a cut box, a cut answer."""
    trainer = make_trainer(photos_dataset(photos))
    grounding = [box_text(0), "I do not know.", (box_text(1),), box_text(1, (10, 20, 56, 60))]
    answers = [ANSWER, "\\boxed{B}", "\\boxed{B}", ("It is \\boxed",)]
    return trainer, *generate(trainer, script, group_rows(photos[:2]), grounding, answers)


def photos_dataset(photos):
    return Dataset.from_list(photos).cast_column("image", ImageFeature(decode=False))


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
    assert output["num_items_in_batch"].item() == 0.5 * lengths[0] + 2.0 * lengths[1]


# rewards


def test_a_reward_function_receives_the_rollout(make_trainer, script, photos):
    seen = {}

    def reward(prompts, completions, completion_ids, log_extra, log_metric, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        log_extra("status", [status[0] for status in kwargs["statuses"]])
        log_metric("my/metric", 3.0)
        return [1.0, 0.0]

    rows = group_rows([{**photos[0], "difficulty": {"level": 3}}])
    trainer = make_trainer(photos_dataset(photos), reward)
    output, turns = generate(trainer, script, rows, [box_text(0), "no"], [ANSWER, ANSWER])
    assert [image.size for image in seen["image"]] == [(400, 200)] * 2 and seen["image"][0] is seen["image"][1]
    assert seen["statuses"] == [["ok"], ["no_json"]] and [boxes[0].box_view_px for boxes in seen["boxes"]] == [
        BOX[0],
        None,
    ]
    assert seen["crops"][0][0] is seen["rollouts"][0].turns[0].reply_image and seen["crops"][1] == [None]
    assert [rollout.id for rollout in seen["rollouts"]] == ["photo-0"] * 2 == seen["id"]
    assert seen["answer"] == ["A", "A"] and seen["target_boxes"] == [[[0, 0, 200, 100]]] * 2
    assert seen["choices"][0] == ["vertical lines", "horizontal lines"] and seen["category"] == [None, None]
    assert seen["difficulty"] == [{"level": 3}] * 2 and seen["question"] == [photos[0]["question"]] * 2
    assert [[message["role"] for message in completion] for completion in seen["completions"]] == [
        ["assistant", "user", "assistant"]
    ] * 2
    assert seen["completions"][0][0]["content"] == box_text(0) and seen["completions"][1][-1]["content"] == ANSWER
    assert "(A) vertical lines" in seen["completions"][0][1]["content"]
    mask = output["completion_mask"].bool()
    assert seen["completion_ids"] == [
        ids[keep].tolist() for ids, keep in zip(output["completion_ids"], mask, strict=True)
    ]
    assert trainer._metrics["train"]["my/metric"] == [3.0]
    assert list(trainer._logs["extra"]["status"]) == ["ok", "no_json"]


def test_the_papers_reward_scores_the_answer_turn(make_trainer, script, photos):
    from mgpo_trl.rewards import accuracy_reward

    trainer = make_trainer(photos_dataset(photos), accuracy_reward)
    grounding = ["\\boxed{A}", box_text(0), "no", box_text(1)]
    output, _ = generate(trainer, script, group_rows(photos[:2]), grounding, ["no", ANSWER, "\\boxed{B}", ANSWER])
    assert list(trainer._logs["rewards"]["accuracy_reward"]) == [0.0, 1.0, 1.0, 0.0]
    assert (output["advantages"] > 0).tolist() == [False, True, True, False]


# images


@pytest.mark.parametrize("source", ["bytes", "path", "decoded"])
def test_an_image_is_opened_once_for_a_generation_batch(make_trainer, photos, tmp_path, monkeypatch, source):
    rows = [dict(photos[number]) for number in (0, 1)]
    for row in rows if source == "path" else []:
        path = tmp_path / f"{row['id']}.png"
        path.write_bytes(row["image"]["bytes"])
        row["image"] = str(path)
    dataset = Dataset.from_list(rows)
    if source != "path":
        dataset = dataset.cast_column("image", ImageFeature(decode=source == "decoded"))
    opened = []
    count = lambda image, name: opened.append(name) or open_image(image, name)  # noqa: E731
    monkeypatch.setattr(mgpo_trl.rollout, "open_image", count)
    make_trainer(dataset, num_generations=4, per_device_train_batch_size=8).train()
    assert sorted(opened) == ["photo-0", "photo-1"]


def test_equal_names_do_not_hide_different_pictures(make_trainer, script, photos):
    rows = [{**photos[number], "image": {**photos[number]["image"], "path": "same.png"}} for number in (0, 1)]
    trainer = make_trainer(photos_dataset(photos))
    output, _ = generate(trainer, script, group_rows(rows), ["no"] * 4, [ANSWER] * 4)
    assert output["image_grid_thw"][[0, 4]].tolist() == [[1, 4, 8], [1, 8, 4]]


# errors


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_for_one_batch_are_refused(make_trainer, photos, count):
    dataset = photos_dataset(photos).select(range(count))
    with pytest.raises(
        ValueError, match=f"has {count} rows, but a generation batch holds 2 different questions.*Add rows"
    ):
        make_trainer(dataset)


def test_a_literal_image_token_names_the_sample(make_trainer, photos):
    rows = [{**photos[0], "question": "What is <|image_pad|>?"}]
    for num_rounds in (1, 2):
        trainer = make_trainer(photos_dataset(rows), num_rounds=num_rounds, per_device_train_batch_size=2)
        with pytest.raises(
            ValueError, match=r"Sample 'photo-0' has 9 image placeholder tokens but its 1 images give 8 "
        ):
            trainer.train()


def test_a_literal_image_token_in_the_choices_names_the_sample(make_trainer, photos):
    rows = [{**photos[0], "choices": ["a", "<|image_pad|>"]}]
    with pytest.raises(ValueError, match="Sample 'photo-0' has 17 image placeholder tokens but its 2 images give 16"):
        make_trainer(photos_dataset(rows), per_device_train_batch_size=2).train()


def test_images_that_trl_drops_are_noticed(make_trainer, script, photos, monkeypatch):
    trainer = make_trainer(photos_dataset(photos))
    monkeypatch.setattr(trainer.chat, "check_image_tokens", lambda *args: None)
    rows = group_rows([{**photos[0], "choices": ["a", "<|image_pad|>"]}])
    with pytest.raises(RuntimeError, match=r"Images were dropped on the way to the loss .*photo-0"):
        generate(trainer, script, rows, ["no", "no"], [ANSWER, ANSWER])


@pytest.mark.parametrize("column", ["image", "question"])
def test_a_missing_column_is_named(make_trainer, photos, column):
    dataset = photos_dataset(photos).rename_column(column, "other")
    with pytest.raises(ValueError, match=rf"`train_dataset` has no column \['{column}'\], only \[.*'other'.*Rename"):
        make_trainer(dataset)
    with pytest.raises(ValueError, match=rf"`eval_dataset\['val'\]` has no column \['{column}'\]"):
        make_trainer(photos_dataset(photos), kwargs={"eval_dataset": {"val": dataset}})


@pytest.mark.parametrize("image", ["none.png", "empty.png", "text.png", "cut.png", "long.png"])
def test_a_bad_image_names_its_row(make_trainer, photos, tmp_path, image):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(photos[0]["image"]["bytes"][:5000])
    Image.new("RGB", (3000, 10)).save(tmp_path / "long.png")
    rows = [{**photos[0], "id": "row-9", "image": str(tmp_path / image)}]
    with pytest.raises(ValueError, match="row-9.*(file|picture|image).*out|row-9.*out"):
        make_trainer(Dataset.from_list(rows), per_device_train_batch_size=2).train()


def test_a_row_without_an_id_is_named_by_its_place(make_trainer, photos):
    rows = [{name: value for name, value in photos[0].items() if name != "id"} | {"image": "none.png"}]
    with pytest.raises(ImageError, match="#0 of the batch: there is no image file at none.png"):
        make_trainer(Dataset.from_list(rows), per_device_train_batch_size=2).train()


def test_a_tokenizer_in_place_of_the_processor_is_refused(make_trainer, tiny_dir):
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="without an image processor: not a vision-language model"):
        make_trainer(kwargs={"processing_class": AutoTokenizer.from_pretrained(tiny_dir)})


def test_vision_tokens_are_never_sampled(make_trainer, photos):
    """The random model would sample each of them about once in 60 tokens."""
    trainer = make_trainer(
        photos_dataset(photos), num_generations=8, per_device_train_batch_size=32, max_completion_length=32
    )
    trainer.args.round_token_budgets = [32, 32]
    trainer.model.train()
    output = trainer._generate_and_score_completions(group_rows(photos, 8))
    sampled = output["completion_ids"][output["turn_ids"] > 0]
    vision = torch.tensor(vision_token_ids(trainer.model.config))
    assert len(sampled) > 1000 and len(vision) == 4 and not torch.isin(sampled, vision).any()
    assert trainer.generation_config.suppress_tokens == sorted(vision.tolist())


def test_each_round_has_its_own_budget(make_trainer, photos):
    trainer = make_trainer(photos_dataset(photos), round_token_budgets=[7, 3])
    trainer.model.train()
    for _ in range(2):  # the second batch starts with the first budget again
        output = trainer._generate_and_score_completions(group_rows(photos))
        lengths = [(output["turn_ids"] == number).sum(1) for number in (1, 2)]
        assert lengths[0].max() == 7 and lengths[1].max() == 3
    assert trainer.max_completion_length == 10


def test_an_embedded_rotation_is_undone_before_anything_is_shown(make_trainer, script, photos):
    image = Image.open(io.BytesIO(photos[0]["image"]["bytes"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    rows = group_rows([{**photos[0], "image": {"bytes": buffer.getvalue(), "path": None}}])
    trainer = make_trainer(photos_dataset(photos))
    output, _ = generate(trainer, script, rows, ["no", "no"], [ANSWER, ANSWER])
    assert output["image_grid_thw"].tolist() == [[1, 8, 4]] * 4


def test_the_model_card_names_the_method(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.create_model_card(model_name="m")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "MGPO" in card and "2507.05920" in card and "huang2025highresolution" in card
    assert "2402.03300" not in card and "DeepSeekMath" not in card
    assert "mgpo" in card.split("---")[1]
