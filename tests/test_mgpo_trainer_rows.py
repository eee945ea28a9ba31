"""Rows in, rewards out: what reward functions receive, how images are opened, and errors that name the row."""

import io
import threading

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from scripted import ANSWER, BOX, box_text, generate, group_rows, photos_dataset

import mgpo_trl.image_loading
from mgpo_trl.images import ImageError, open_image
from mgpo_trl.processing import vision_token_ids

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
    monkeypatch.setattr(mgpo_trl.image_loading, "open_image", count)
    make_trainer(dataset, num_generations=4, per_device_train_batch_size=8).train()
    assert sorted(opened) == ["photo-0", "photo-1"]


def test_equal_names_do_not_hide_different_pictures(make_trainer, script, photos):
    rows = [{**photos[number], "image": {**photos[number]["image"], "path": "same.png"}} for number in (0, 1)]
    trainer = make_trainer(photos_dataset(photos))
    output, _ = generate(trainer, script, group_rows(rows), ["no"] * 4, [ANSWER] * 4)
    assert output["image_grid_thw"][[0, 4]].tolist() == [[1, 4, 8], [1, 8, 4]]


# errors


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_would_play_other_rounds_is_refused(make_trainer, name):
    value = [len] if name == "tools" else len
    with pytest.raises(ValueError, match=f"`{name}` has no place in `MGPOTrainer`.*Leave it out.*GRPOTrainer"):
        make_trainer(kwargs={name: value})


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


def test_a_missing_column_of_a_stream_is_named(make_trainer, photos):
    """A mapped stream does not know its columns before it is read."""
    stream = photos_dataset(photos).to_iterable_dataset().map(lambda row: row, remove_columns=["question"])
    assert stream.column_names is None
    with pytest.raises(ValueError, match=r"a row has no column \['question'\], only \[.*'answer'.*Rename"):
        make_trainer(stream).train()


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


def test_the_next_batch_is_opened_while_this_one_trains(make_trainer, photos, monkeypatch):
    """Two generation batches of two steps: when one begins, threads have its images; each file is opened once."""
    opened = []
    count = lambda image, name: opened.append((name, threading.current_thread().name)) or open_image(image, name)  # noqa: E731
    monkeypatch.setattr(mgpo_trl.image_loading, "open_image", count)
    trainer = make_trainer(
        Dataset.from_list(photos), per_device_train_batch_size=2, steps_per_generation=2, max_steps=4,
        gradient_accumulation_steps=1, shuffle_dataset=False,
    )  # fmt: skip
    started, generate = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: (
        started.append(len(trainer._loader._waiting)) or generate(rows)
    )
    trainer.train()
    names = [name for name, _ in opened]
    assert started == [2, 2] and len(names) == len(set(names)) == 4
    assert {thread.rsplit("_", 1)[0] for _, thread in opened} == {"images"}
    workers = make_trainer(Dataset.from_list(photos), dataloader_num_workers=1)
    assert workers.data_collator != workers._begin_images
