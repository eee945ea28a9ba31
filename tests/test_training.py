"""Short real trainings of the tiny model: what GRPO offers still works, whatever the number of rounds."""

import asyncio
import json
import math

import pandas as pd
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import LoraConfig
from transformers import AutoModelForImageTextToText

from mgpo_trl.rewards import accuracy_reward, point_reward

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before, model):
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


def train(trainer):
    """Train, and check what must hold for every run; returns the logs of the steps."""
    before = weights(trainer.model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == trainer.state.global_step == trainer.args.max_steps
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logs)
    assert max(entry["grad_norm"] for entry in logs) > 0 and changed(before, trainer.model)
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    return logs


@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_with_two_updates_a_batch(make_trainer, loss_type, beta):
    level = "sequence" if loss_type == "luspo" else "token"
    trainer = make_trainer(loss_type=loss_type, beta=beta, importance_sampling_level=level, **SMALL)
    first, second = train(trainer)
    assert first["turn1/clip_ratio"] == 0.0 and first["turn2/entropy"] > 0
    assert second["turn1/clip_ratio"] + second["turn2/clip_ratio"] > 0  # the second update is off-policy
    if beta:
        assert first["turn1/kl"] < 1e-6 < second["turn1/kl"]
        kl = [second[f"turn{number}/kl"] for number in (1, 2)]
        if level == "token":
            assert min(kl) * 0.99 <= second["kl"] <= max(kl) * 1.01
    else:
        assert not any(name.endswith("kl") for name in second)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_rounds": 1}, id="one round"),
        pytest.param({"num_rounds": 3}, id="three rounds"),
        pytest.param({"num_rounds": 3, "zoom_from": "original", "beta": 0.01}, id="three rounds from the original"),
        pytest.param({"num_rounds": 1, "beta": 0.01, "round_token_budgets": [5]}, id="one round with a reference"),
        pytest.param({"turn_loss_weights": [0.0, 1.0]}, id="answer turn only"),
        pytest.param({"scale_rewards": "batch"}, id="scaled by the batch"),
        pytest.param({"scale_rewards": "none", "turn_loss_weights": [1.0, 0.25]}, id="not scaled, weighed turns"),
        pytest.param({"top_entropy_quantile": 0.3}, id="high-entropy tokens"),
        pytest.param({"entropy_coef": 0.01, "epsilon_high": 0.28}, id="entropy bonus, clip-higher"),
        pytest.param({"use_adaptive_entropy": True}, id="adaptive entropy"),
        pytest.param({"steps_per_generation": 2, "max_steps": 2}, id="off-policy steps"),
        pytest.param({"num_iterations": 2, "delta": 2.0, "off_policy_mask_threshold": 0.5}, id="off-policy mask"),
        pytest.param({"gradient_checkpointing": True, "pad_to_multiple_of": 8}, id="checkpointing, padded lengths"),
        pytest.param({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}, id="sampling options"),
        pytest.param({"beta": 0.01, "sync_ref_model": True, "ref_model_sync_steps": 1}, id="moving reference"),
        pytest.param({"coordinates": "relative_1000"}, id="relative coordinates"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"importance_sampling_level": "sequence", "loss_type": "grpo"}, id="GSPO"),
        pytest.param({"multi_objective_aggregation": "normalize_then_sum"}, id="normalise, then sum"),
        pytest.param({"shuffle_dataset": False}, id="in order"),
    ],
)  # fmt: skip
def test_options_of_grpo(make_trainer, options):
    logs = train(make_trainer(**options))
    rounds = options.get("num_rounds", 2)
    assert logs[0][f"turn{rounds}/entropy"] > 0 and f"turn{rounds + 1}/entropy" not in logs[0]
    assert ("grounding/valid_ratio" in logs[0]) == (rounds > 1)


def test_all_answers_cut_and_masked_changes_nothing(make_trainer):
    trainer = make_trainer(mask_truncated_completions=True, round_token_budgets=[4, 1], max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["turn2/truncated_ratio"] == 1.0 and entry["loss"] == 0.0 and not changed(before, trainer.model)
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


# datasets


def as_decoded(rows):
    return rows.cast_column("image", ImageFeature(decode=True))


def as_stream(rows):
    return rows.to_iterable_dataset()


def as_decoded_stream(rows):
    return as_decoded(rows).to_iterable_dataset()


def without_optional_columns(rows):
    return rows.select_columns(["image", "question"])


def with_odd_columns(rows):
    """Names that TRL or this package use for something else, and values of any kind."""
    names = [
        "prompt",
        "images",
        "completion",
        "rollouts",
        "boxes",
        "statuses",
        "crops",
        "turn_ids",
        "tool_mask",
        "Ünï x",
    ]
    rows = rows.map(lambda row: dict.fromkeys(names, "mine"))
    return rows.map(lambda row: {"nested": {"a": [1, None]}, "id": None})


@pytest.mark.parametrize(
    "prepare, num_rounds",
    [
        (as_decoded, 2),
        (as_stream, 2),
        (as_decoded_stream, 1),
        (without_optional_columns, 1),
        (without_optional_columns, 2),
        (with_odd_columns, 1),
        (with_odd_columns, 2),
    ],
)
def test_datasets(make_trainer, rows, prepare, num_rounds):
    train(make_trainer(prepare(rows), num_rounds=num_rounds))


def test_rewards_of_every_kind(make_trainer, rows):
    seen = []

    async def slow(completions, rollouts, **kwargs):
        await asyncio.sleep(0.001)
        seen.append([rollout.id for rollout in rollouts])
        return [float(len(completion[-1]["content"]) % 3) for completion in completions]

    def sometimes(completions, statuses, **kwargs):
        return [None if number % 2 else 1.0 for number in range(len(statuses))]

    def alternate(completions, **kwargs):
        return [float(number % 2) for number in range(len(completions))]

    rewards = [accuracy_reward, slow, sometimes, alternate]
    (entry,) = train(make_trainer(reward=rewards, reward_weights=[1.0, 0.5, 0.1, 1.0]))
    assert {f"rewards/{function.__name__}/mean" for function in rewards} <= set(entry)
    assert entry["rewards/sometimes/mean"] == 1.0 and entry["rewards/alternate/mean"] == 0.5
    assert len(seen) == 1 and len(seen[0]) == 4 and set(seen[0]) <= set(rows["id"])


def test_evaluation_during_training(make_trainer, rows):
    heldout = {"kwargs": {"eval_dataset": {"a": rows.select([0, 1]), "b": as_decoded(rows).select([2, 3])}}}
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=1, max_steps=2, num_generations_eval=2, beta=0.01, **heldout
    )
    logs = train(trainer)
    evaluations = [entry for entry in trainer.state.log_history if "eval_a_loss" in entry or "eval_b_loss" in entry]
    assert len(evaluations) == 4
    for entry in evaluations:
        name = "eval_a" if "eval_a_loss" in entry else "eval_b"
        assert math.isfinite(entry[f"{name}_loss"])
        wanted = [
            "turn1/length",
            "turn2/entropy",
            "turn1/kl",
            "grounding/valid_ratio",
            "grounding/status/ok",
            "reward",
        ]
        assert {f"eval_{metric}" for metric in wanted} <= set(entry) | {key.replace(name, "eval") for key in entry}
    assert not any(key.startswith("eval") for entry in logs for key in entry)


def test_the_best_checkpoint_is_really_loaded(make_trainer, rows, tmp_path):
    """Trainer's own loading matches none of the saved names and keeps the last weights."""
    scores = iter([1.0, 0.0])
    trainer = make_trainer(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_score", greater_is_better=True,
        kwargs={"eval_dataset": rows.select([0, 1])},
    )  # fmt: skip
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_score": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert not changed(weights(saved), trainer.model)


@pytest.mark.parametrize("log_multimodal", [True, False])
def test_completions_are_logged(make_trainer, tmp_path, capsys, log_multimodal):
    trainer = make_trainer(log_completions=True, max_steps=2, log_multimodal=log_multimodal)
    train(trainer)
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "run" / "completions" / f"completions_{step:05d}.parquet")
        assert len(table) == 4 and {"step", "prompt", "completion", "parity_reward", "advantage"} <= set(table.columns)
        assert [message["role"] for message in table["completion"][0]] == ["assistant", "user", "assistant"]
        assert "What is on the" in str(table["prompt"][0]) and "bytes" not in str(table["prompt"][0])
    assert "What is on the" in capsys.readouterr().out


# adapters


@pytest.mark.parametrize("num_rounds, beta", [(2, 0.01), (1, 0.0)])
def test_lora_changes_nothing_but_its_adapters(make_trainer, num_rounds, beta):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        num_rounds=num_rounds, kwargs={"peft_config": lora}, **{**SMALL, "beta": beta, "max_steps": 3}
    )
    before = weights(trainer.model)
    logs = train(trainer)
    moved = changed(before, trainer.model)
    assert moved and all("lora_" in name for name in moved)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    if beta:
        assert logs[0]["kl"] < 1e-6 < logs[-1]["kl"]


def test_a_model_object_with_its_processor(make_trainer, tiny_dir, tmp_path):
    from transformers import AutoProcessor

    from mgpo_trl import MGPOConfig, MGPOTrainer

    model = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    processor = AutoProcessor.from_pretrained(tiny_dir, padding_side="left")
    args = make_trainer().args
    assert isinstance(args, MGPOConfig)
    dataset = Dataset.from_list([{"image": tmp_image(tmp_path, number), "question": "What?"} for number in range(2)])
    trainer = MGPOTrainer(
        model, lambda completions, **kwargs: [0.0, 1.0] * 2, args, dataset, processing_class=processor
    )
    train(trainer)
    size = processor.image_processor.size
    assert (size["longest_edge"], size["shortest_edge"]) == (84 * 84, 56 * 56)


def tmp_image(tmp_path, number):
    from PIL import Image

    path = tmp_path / f"{number}.jpg"
    Image.new("RGB", (100 + 50 * number, 80), (number * 90, 40, 200)).save(path)
    return str(path)


def test_points_and_counts_are_rewarded_together(make_trainer, script, photos):
    """Counting in one round: the columns of the dataset reach the rewards, and their weighted sum is the reward."""
    known = [[[20.0, 20.0], [300.0, 100.0]], None]
    rows = [{**photos[n], "choices": None, "answer": "2", "points": known[n]} for n in range(2)]
    features = {"image": ImageFeature(decode=False)}
    dataset = Dataset.from_list(rows).cast_column("image", features["image"])
    trainer = make_trainer(
        dataset, [accuracy_reward, point_reward], num_rounds=1, round_token_budgets=[96], reward_weights=[1.0, 0.5]
    )
    view = (112, 56)  # of the first photo, 400 x 200
    pointed = [{"point_2d": [round(x * view[0] / 400), round(y * view[1] / 200)]} for x, y in known[0]]
    texts = [f"{json.dumps(pointed)} \\boxed{{2}}", "\\boxed{3}", "\\boxed{2}", "no"]
    ids = [[*trainer._tokenizer(text)["input_ids"], trainer._tokenizer.eos_token_id] for text in texts]
    script(trainer, ids)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/accuracy_reward/mean"] == 0.5
    assert log["rewards/point_reward/mean"] == 0.5  # over the two rows whose points are known: 1 and 0
    assert log["reward"] == pytest.approx((1.5 + 0.0 + 1.0 + 0.0) / 4)
    assert (log["points/status/ok"], log["points/status/no_json"]) == (0.25, 0.75)
