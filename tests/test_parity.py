"""Log-probabilities of the loss equal the sampler's, for every token of every round, in one batch of unlike images."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from peft import LoraConfig
from transformers import LogitsProcessor, LogitsProcessorList
from trl import ModelConfig

from mgpo_trl.adapters import quantization_config, target_modules
from mgpo_trl.boxes import format_box
from mgpo_trl.processing import SHARED_FAMILIES

TOLERANCE = 1e-4
VIEW_SIZES = [(112, 56), (56, 112), (84, 84), (84, 56)]  # of the rows in `photos`
BOXES = {
    0: (0, 0, 40, 56),
    2: (0, 2, 50, 110),
    4: (0, 0, 84, 30),
    5: (10, 10, 40, 80),
}  # by rollout; others sample freely


class Force(LogitsProcessor):
    """Make chosen rows write given ids; the logits before this are the model's own."""

    def __init__(self, ids_by_row, prompt_length):
        self.ids_by_row, self.prompt_length = ids_by_row, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.size(1) - self.prompt_length
        for row, ids in self.ids_by_row.items():
            if step < len(ids):
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, ids[step]] = 0.0
        return scores


def record_sampler(trainer, monkeypatch, forced):
    """Let rounds be sampled for real and keep the raw logits of every step; `forced` has {row: ids} for each round."""
    rounds, generate = [], trainer.model.generate

    def recording(input_ids, **kwargs):
        force = Force(forced[len(rounds)], input_ids.size(1))
        output = generate(
            input_ids=input_ids,
            **kwargs,
            logits_processor=LogitsProcessorList([force]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        rounds.append(torch.stack(output.logits, dim=1))  # (B, steps, vocabulary)
        return output.sequences

    monkeypatch.setattr(trainer, "_shares_prefix", False)
    monkeypatch.setattr(trainer.model, "generate", recording)
    return rounds


def sample_batch(make_trainer, monkeypatch, photos, num_rounds, family="qwen2_5_vl", **options):
    """Eight rollouts of four photos; returns (trainer, batch, log-probabilities of the sampler by id)."""
    family = FAMILIES[family]
    trainer = make_trainer(
        Dataset.from_list(photos), num_rounds=num_rounds, num_generations=2, per_device_train_batch_size=8,
        round_token_budgets=[48, 10, 10][:num_rounds], min_box_side=10, **{**family.budget, **options},
    )  # fmt: skip
    assert trainer.template.coordinates == family.coordinates  # found by `auto`

    def written(box, view_size, label=None):
        return format_box(family.scaled(box), family.scaled(view_size), family.coordinates, label)

    end = [trainer._tokenizer.eos_token_id]
    texts = {row: written(box, VIEW_SIZES[row // 2], "card") for row, box in BOXES.items()}
    boxes = {row: trainer._tokenizer(text)["input_ids"] + end for row, text in texts.items()}
    free = {row: [*ids[:3], *end] for row, ids in boxes.items() if row in (0, 5)}  # ends early: padding on the right
    second = {0: trainer._tokenizer(written((0, 0, 50, 30), (56, 56)))["input_ids"] + end}
    forced = {1: [free], 2: [boxes, free], 3: [boxes, second, free]}[num_rounds]
    rounds = record_sampler(trainer, monkeypatch, forced)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(row) for row in photos for _ in range(2)])
    sampler = torch.zeros(batch["completion_ids"].shape)
    for number, logits in enumerate(rounds, start=1):
        logps = (logits.float() / trainer.temperature).log_softmax(-1)
        for row in range(8):
            where = (batch["turn_ids"][row] == number).nonzero().squeeze(1)
            ids = batch["completion_ids"][row, where]
            sampler[row, where] = logps[row, range(len(where)), ids]
    return trainer, batch, sampler


def deviation(trainer, batch, sampler, packed=True, **changed):
    """Largest difference at sampled tokens between the loss pass and the sampler."""
    batch = {**batch, **changed}
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    trainer._facts = trainer._facts_of_batch(batch) if packed else None
    assert bool(trainer._facts) == (packed and trainer._packs)
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            **{name: batch[name] for name in names},
        )
    return (logps - sampler)[batch["turn_ids"] > 0].abs().max().item()


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("num_rounds, temperature", [(1, 1.0), (2, 1.0), (2, 0.7), (3, 1.0)])
def test_the_loss_pass_equals_the_sampler(
    make_trainer, family_dir, monkeypatch, photos, num_rounds, temperature, family
):
    trainer, batch, sampler = sample_batch(
        make_trainer, monkeypatch, photos, num_rounds, family, model=family_dir(family), temperature=temperature
    )
    grids = {tuple(grid) for grid in batch["image_grid_thw"].tolist()}
    assert len(grids) >= 4 and batch["prompt_mask"].min() == 0 and batch["completion_mask"].min() == 0
    for number in range(1, num_rounds + 1):
        assert (batch["turn_ids"] == number).any(dim=1).all()
    assert sampler[batch["turn_ids"] > 0].max() < 0
    assert trainer._packs == (family in SHARED_FAMILIES)
    assert deviation(trainer, batch, sampler) < TOLERANCE
    assert deviation(trainer, batch, sampler, packed=False) < TOLERANCE
    if num_rounds > 1:
        assert trainer._metrics["train"]["grounding/valid_ratio"][0] >= 0.25


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parity_sees_wrong_images_grids_types_and_attention(make_trainer, family_dir, monkeypatch, photos, family):
    """Each of these is a mistake that training would survive silently."""
    trainer, batch, sampler = sample_batch(make_trainer, monkeypatch, photos, 2, family, model=family_dir(family))
    grid, pixels, types = batch["image_grid_thw"], batch["pixel_values"], batch["mm_token_type_ids"]
    crop = grid[1].tolist()
    assert crop[1] != crop[2]
    turned = grid.clone()
    turned[1] = torch.tensor([crop[0], crop[2], crop[1]])
    rows = grid.prod(-1)
    start, end = rows[0].item(), rows[:2].sum().item()
    other_crop = pixels.clone()
    other_crop[start:end] = pixels[start:end].flip(0)
    flat_positions = types.clone()
    flat_positions[:, batch["prompt_ids"].size(1) :] = 0
    wrong = {
        "grid of the crop": {"image_grid_thw": turned},
        "pixels of the crop": {"pixel_values": other_crop},
        "1-D positions everywhere": {"mm_token_type_ids": torch.zeros_like(types)},
        "padding attended to": {"prompt_mask": torch.ones_like(batch["prompt_mask"])},
    }
    for name, changed in wrong.items():
        assert deviation(trainer, batch, sampler, packed=False, **changed) > 10 * TOLERANCE, name
        if name not in ("padding attended to", "1-D positions everywhere"):  # a packed row is not even built from it
            assert deviation(trainer, batch, sampler, **changed) > 10 * TOLERANCE, name
    with pytest.raises(RuntimeError, match="shape mismatch"):  # the position code itself refuses this one
        deviation(trainer, batch, sampler, packed=False, mm_token_type_ids=flat_positions)
    assert deviation(trainer, batch, sampler) < TOLERANCE


def test_parity_with_an_adapter_on_4_bit_weights(make_trainer, family_dir, monkeypatch, photos):
    trainer, batch, sampler = sample_batch(
        make_trainer, monkeypatch, photos, 2, "qwen3_vl", model=family_dir("qwen3_vl"),
        kwargs={
            "peft_config": LoraConfig(r=4, target_modules=target_modules(["language"])),
            "quantization_config": quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True)),
        },
    )  # fmt: skip
    assert deviation(trainer, batch, sampler) < TOLERANCE


def test_parity_survives_shuffling_and_splitting(make_trainer, monkeypatch, photos):
    """Images travel with their samples when a generation batch is cut into micro-batches."""
    trainer = make_trainer(
        Dataset.from_list(photos),
        per_device_train_batch_size=2,
        steps_per_generation=4,
        min_box_side=10,
        learning_rate=0.0,
    )
    boxes = {row: format_box(box, VIEW_SIZES[row // 2], "absolute") for row, box in BOXES.items()}
    ids = {
        row: [*trainer._tokenizer(text)["input_ids"], trainer._tokenizer.eos_token_id] for row, text in boxes.items()
    }
    monkeypatch.setattr(trainer.args, "round_token_budgets", [48, 10])
    record_sampler(trainer, monkeypatch, [ids, {}])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    seen = []
    for step in range(4):
        inputs = trainer._prepare_inputs([dict(row) for row in photos for _ in range(2)])
        trainer._compute_loss(trainer.model, inputs)
        trainer._step = step + 1
        difference = (trainer._loss_outputs[0] - inputs["old_per_token_logps"])[inputs["turn_ids"] > 0]
        assert difference.abs().max() < TOLERANCE
        seen += inputs["completion_ids"].tolist()
    assert len(seen) == 8 and trainer._metrics["train"]["grounding/valid_ratio"] == [0.5]
