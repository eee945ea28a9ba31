"""A person's own photographs: a file or a folder of them trains and evaluates through the commands of the README."""

import json

import pytest
import torch
from commands import load_script
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import LoraConfig
from photographs import CAMERA, PHOTOGRAPHS, as_folder, as_jsonl, upright_size
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mgpo_trl import MGPOConfig, MGPOTrainer
from mgpo_trl.adapters import target_modules
from mgpo_trl.boxes import format_box
from mgpo_trl.builtin.tiny import build_processor
from mgpo_trl.data import load_rows
from mgpo_trl.generation import ModelGenerator
from mgpo_trl.geometry import original_to_view
from mgpo_trl.images import open_image
from mgpo_trl.records import read_rollouts, read_run
from mgpo_trl.rollout import Sampled

BIG = [name for name, photo in PHOTOGRAPHS.items() if photo["stored"] in ("camera", "rotated")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The photographs as a JSONL file and as a folder with metadata."""
    directory = tmp_path_factory.mktemp("photographs")
    return {"jsonl": as_jsonl(directory / "file"), "folder": as_folder(directory / "folder")}


def test_the_photographs_are_what_a_camera_writes(sources):
    for name in BIG:
        with Image.open(sources["folder"] / f"{name}.jpg") as image:
            assert image.size == CAMERA and image.width * image.height > 12_000_000
            assert image.getexif()[0x0112] == (6 if PHOTOGRAPHS[name]["stored"] == "rotated" else 1)
    assert {PHOTOGRAPHS[name]["stored"] for name in BIG} == {"camera", "rotated"}


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_boxes_and_pictures_agree_once_the_orientation_is_applied(sources, kind):
    """The region of the box in the stored file shows the pixels of the region in the photograph it was made from."""
    rows = load_rows(str(sources[kind])).dataset
    assert len(rows) == len(PHOTOGRAPHS)
    for row in rows:
        photo = PHOTOGRAPHS[row["category"]]
        image = open_image(row["image"], row["id"])
        assert image.size == upright_size(row["category"])
        if photo["box"] is None:
            assert row["target_boxes"] is None
            continue
        with Image.open(photo["source"]) as source:
            wanted = source.convert("RGB").crop(photo["box"]).resize((16, 16))
        found = image.crop(tuple(row["target_boxes"][0])).resize((16, 16))
        pairs = zip(found.tobytes(), wanted.tobytes(), strict=True)
        assert sum(abs(one - other) for one, other in pairs) / (16 * 16 * 3) < 8


# training and evaluation of the tiny model

REWARD = """
import json


def look(completions, image, rollouts, crops, statuses, category, **kwargs):
    with open("seen.jsonl", "a") as file:
        for number, rollout in enumerate(rollouts):
            sizes = [None if crop is None else crop.size for crop in crops[number]]
            row = {"category": category[number], "image": image[number].size, "view": rollout.view.size,
                   "statuses": statuses[number], "crops": sizes, "turns": len(completions[number])}
            file.write(json.dumps(row) + "\\n")
    return [float(number % 2) for number in range(len(completions))]
"""


@pytest.fixture(scope="module", params=["jsonl", "folder"])
def trained(request, sources, tiny_dir, tmp_path_factory):
    """Two steps of training on the photographs through `train.py`, with a reward function of the current directory."""
    directory = tmp_path_factory.mktemp(f"trained_{request.param}")
    (directory / "my_reward.py").write_text(REWARD)
    options = {
        "model_name_or_path": tiny_dir, "dataset_name": sources[request.param], "output_dir": directory / "out",
        "reward_funcs": "my_reward.look", "max_pixels": "112x112", "min_pixels": "56x56", "min_box_side": 1,
        "max_completion_length": 12, "num_generations": 2, "per_device_train_batch_size": 12, "max_steps": 2,
        "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "gradient_checkpointing": "false",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        load_script("train").main(arguments)
    return directory


def test_training_sees_every_photograph_upright(trained):
    seen = [json.loads(line) for line in (trained / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2 * 12 and {row["category"] for row in seen} == set(PHOTOGRAPHS)
    for row in seen:
        width, height = upright_size(row["category"])
        assert row["image"] == [width, height] and row["turns"] == 3
        assert row["view"][0] * row["view"][1] <= 112 * 112
        assert (row["view"][0] > row["view"][1]) == (width > height)


def test_training_changes_and_saves_the_model(trained, tiny_dir):
    before = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_dir).state_dict()
    after = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained / "out").state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(torch.isfinite(value).all() for value in after.values())
    assert json.loads((trained / "out" / "conversation.json").read_text())["max_pixels"] == 112 * 112


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_evaluation_of_the_trained_model(trained, sources, kind, tmp_path):
    arguments = ["--model", trained / "out", "--dataset", sources[kind], "--num_rounds", 2, "--output_dir", tmp_path]
    load_script("eval").main([*map(str, arguments), "--device", "cpu"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["n"], report["num_rounds"], report["max_pixels"]) == (len(PHOTOGRAPHS), 2, 112 * 112)
    assert set(report["by_category"]) == set(PHOTOGRAPHS) and report["hit_rate"] is not None
    assert read_run(tmp_path)["config"]["conversation"]["min_box_side"] == 1
    for record in read_rollouts(tmp_path):
        assert tuple(record["image"]["size"]) == upright_size(record["category"])


def test_a_right_box_of_a_big_photograph_is_a_hit_and_cuts_the_original(sources, tiny_dir, tmp_path, monkeypatch):
    """Written turns name each target in pixels of the view; the crop is as large as the region is in the file."""
    rows = {row["category"]: row for row in load_rows(str(sources["jsonl"])).dataset}
    names = list(PHOTOGRAPHS)

    def speak(self, contexts):
        samples = []
        for name, context in zip(names, contexts, strict=True):
            view, row = context.images[0].size, rows[name]
            text = f"\\boxed{{{row['answer']}}}"
            if context.round == 1 and row["target_boxes"]:
                corners = original_to_view(row["target_boxes"][0], upright_size(name), view)
                text = format_box(tuple(round(corner) for corner in corners), view, "absolute")
            samples.append(Sampled([*self.chat.tokenizer(text)["input_ids"], self.chat.end_of_turn_id]))
        return samples

    monkeypatch.setattr(ModelGenerator, "__call__", speak)
    arguments = ["--model", tiny_dir, "--dataset", sources["jsonl"], "--output_dir", tmp_path, "--device", "cpu"]
    load_script("eval").main([*map(str, arguments), "--min_box_side", "8", "--batch_size", str(len(names))])
    report = json.loads((tmp_path / "report.json").read_text())
    with_box = [name for name in names if rows[name]["target_boxes"]]
    assert report["max_pixels"] == 1280 * 28 * 28 and report["hit_rate"] == 1.0 and report["coverage"] > 0.9
    assert report["accuracy"]["strict"] == 1.0 and report["valid_ratio"] == pytest.approx(len(with_box) / len(names))
    for record in read_rollouts(tmp_path):
        if record["category"] in with_box:
            x1, y1, x2, y2 = rows[record["category"]]["target_boxes"][0]
            found = record["turns"][0]["box"]["box_original_px"]
            one_view_pixel = max(record["image"]["size"]) / max(record["view_size"]) + 1
            assert found == pytest.approx((x1, y1, x2, y2), abs=one_view_pixel)


# real widths


def real_layout(processor):
    """Qwen2.5-VL-3B as published but for two layers a tower and the small vocabulary; random weights, fp32."""
    ids = {
        token: processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in ("vision_start", "vision_end")
    }
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 2048, "intermediate_size": 11008,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True, **ends, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id, vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], tie_word_embeddings=True, **ends,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.slow
def test_real_widths_and_1280_tokens_pass_a_training_step(sources, tmp_path, monkeypatch):
    """
    One step of the LoRA recipe on a 12-megapixel photograph, with a view and a crop of about 1280 tokens each; the
    other rollout of the group has a small crop, so that the batch is padded.
    """
    processor = build_processor()
    rows = [row for row in load_rows(str(sources["jsonl"])).dataset if row["category"] == "coffee"]
    dataset = Dataset.from_list(rows).cast_column("image", ImageFeature(decode=False))
    args = MGPOConfig(
        str(tmp_path), num_generations=2, per_device_train_batch_size=2, round_token_budgets=[64, 4], max_steps=1,
        beta=0.0, optim="sgd", learning_rate=0.1, logging_steps=1, save_strategy="no", report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    assert args.max_pixels == 1280 * 28 * 28
    seen = {}

    def reward(completions, rollouts, **kwargs):
        seen["rollouts"] = rollouts
        return [1.0, 0.0]

    trainer = MGPOTrainer(
        real_layout(processor), reward, args, train_dataset=dataset, processing_class=processor,
        peft_config=LoraConfig(r=8, target_modules=target_modules(["language"])),
    )  # fmt: skip
    boxes = [(203, 152, 702, 751), (300, 310, 340, 350)]
    script_first_round(trainer, boxes, monkeypatch)
    watch_the_loss(trainer, seen, monkeypatch)
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in name}
    trainer.train()

    assert len(adapters) == 2 * 7 and all(torch.isfinite(p).all() and p.any() for p in adapters.values())
    assert torch.isfinite(seen["loss"])
    log = trainer.state.log_history[0]
    assert torch.isfinite(torch.tensor(log["grad_norm"])) and log["grad_norm"] > 0
    assert log["grounding/valid_ratio"] == 1.0 and log["turn2/length"] >= 1
    inputs, rollouts = seen["inputs"], seen["rollouts"]
    features = inputs["image_grid_thw"].prod(dim=1) // 4  # one token for 2x2 patches; view and crop of each sample
    large, small = [count for count in features.tolist() if count > 1150], sorted(features.tolist())[0]
    assert len(features) == 4 and len(large) == 3 and max(large) <= 1280 and 240 <= small <= 300
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    placeholders = (ids == processor.image_token_id).sum(dim=1)
    assert placeholders.tolist() == [sum(features[:2]), sum(features[2:])]
    assert inputs["pixel_values"].shape == (4 * sum(features), 3 * 2 * 14 * 14)
    grids = [sorted(map(grid_size, inputs["image_grid_thw"][pair])) for pair in (slice(0, 2), slice(2, 4))]
    assert sorted(grids) == sorted(sorted(image.size for image in rollout.images) for rollout in rollouts)
    for rollout, (x1, y1, x2, y2) in zip(rollouts, boxes, strict=True):
        width, height = (original / view for original, view in zip(CAMERA, rollout.view.size, strict=True))
        corners = (x1 * width, y1 * height, x2 * width, y2 * height)
        assert rollout.image.size == CAMERA and rollout.turns[0].box_original_px == pytest.approx(corners, abs=1)


def grid_size(grid):
    """Width and height in pixels of an image of (1, rows, columns) patches."""
    return int(grid[2]) * 14, int(grid[1]) * 14


def script_first_round(trainer, boxes, monkeypatch):
    """Round 1 names a box for each rollout. In round 2 the model samples the second answer; the first is written."""
    monkeypatch.setattr(trainer, "_shares_prefix", False)
    original, calls = trainer.model.generate, []
    tokenizer, end = trainer.chat.tokenizer, trainer.chat.end_of_turn_id

    def generate(input_ids, pixel_values=None, image_grid_thw=None, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            view = trainer._rollouts[0].view.size
            turns = [[*tokenizer(format_box(box, view, "absolute"))["input_ids"], end] for box in boxes]
            assert len(turns[0]) == len(turns[1])
            return torch.cat([input_ids, torch.tensor(turns)], dim=1)
        mine = {name: kwargs.pop(name)[1:] for name in ("attention_mask", "mm_token_type_ids")}
        patches = int(image_grid_thw[2:].prod(dim=1).sum())
        images = {"pixel_values": pixel_values[-patches:], "image_grid_thw": image_grid_thw[2:]}
        sampled = original(input_ids=input_ids[1:], **images, **mine, **kwargs)[0, input_ids.size(1) :].tolist()
        written = [*tokenizer("(A) ")["input_ids"], end, *[tokenizer.pad_token_id] * len(sampled)][: len(sampled)]
        return torch.cat([input_ids, torch.tensor([written, sampled])], dim=1)

    monkeypatch.setattr(trainer.model, "generate", generate)


def watch_the_loss(trainer, seen, monkeypatch):
    original = trainer._compute_loss

    def compute(model, inputs):
        seen["inputs"] = inputs
        seen["loss"] = original(model, inputs)
        return seen["loss"]

    monkeypatch.setattr(trainer, "_compute_loss", compute)
