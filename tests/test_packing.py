"""Packed rows: the worked example, and the same log-probabilities, losses and gradients as TRL's padded pass."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from scripted import ANSWER, box_text, generate, group_rows

from mgpo_trl.packing import ATTENTION, Span, grouped_order, pack_rows, reorder

LANGUAGE = r"^(?!.*visual).*\.(q_proj|v_proj|up_proj)$"


def test_worked_example():
    """P P P A A A and P P P B B, padded to four prompt and three completion columns."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    scored = torch.tensor([[True, True, False], [True, False, False]])
    packed = pack_rows(mask, scored, ["same", "same"], [1, 1], [2, 1])
    prompt = Span(0, 3)
    assert packed.spans == (prompt, Span(3, 6, prompt), Span(6, 8, prompt))
    assert packed.token_rows.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert packed.token_columns.tolist() == [1, 2, 3, 4, 5, 6, 4, 5]
    assert packed.sources.tolist() == [2, 3, 2]  # both completions begin after the last token of the prompt
    assert packed.image_owners == ((0, 0), (0, 1))
    ids = torch.arange(14).view(2, 7)
    assert packed.gather(ids).tolist() == [[1, 2, 3, 4, 5, 6, 11, 12]]
    assert packed.scatter(torch.tensor([[7.0, 8.0, 9.0]])).tolist() == [[7.0, 8.0, 0.0], [9.0, 0.0, 0.0]]


def test_different_prompts_are_packed_apart_and_in_order():
    mask = torch.ones(4, 3, dtype=torch.long)
    packed = pack_rows(mask, torch.ones(4, 1, dtype=torch.bool), ["a", "b", "a", "b"], [1] * 4, [1] * 4)
    assert [span.length for span in packed.spans] == [2, 1, 1, 2, 1, 1]
    assert packed.token_rows.tolist() == [0, 0, 0, 2, 1, 1, 1, 3]
    assert packed.sources.tolist() == [1, 5, 1, 5] and packed.image_owners == ((0, 0), (1, 0))


def test_groups_stay_together_in_random_order():
    prompts = [0, 0, 1, 1, 2, 2]
    orders = {tuple(grouped_order(prompts).tolist()) for _ in range(50)}
    assert len(orders) > 10
    for order in orders:
        assert sorted(order) == list(range(6))
        assert all(prompts[order[i]] == prompts[order[i + 1]] for i in (0, 2, 4))
    batch = reorder(
        {"a": torch.tensor([5, 6, 7]), "b": ["x", "y", "z"], "c": torch.tensor(1), "d": None}, torch.tensor([2, 0, 1])
    )
    assert (
        batch["a"].tolist() == [7, 5, 6] and batch["b"] == ["z", "x", "y"] and batch["c"] == 1 and batch["d"] is None
    )


def scripted_rounds(num_rounds, rows=8):
    """Boxes, no box, a cut turn; answers of different lengths."""
    boxes = [box_text(row // 2) if row % 3 else "no box here" for row in range(rows)]
    boxes[4] = (boxes[4],)  # its end of turn is appended
    answers = [ANSWER if row % 2 else "\\boxed{B}" for row in range(rows)]
    second = [f'[{{"bbox_2d": [2, 2, {40 + row}, 44]}}]' for row in range(rows)]
    return {1: [answers], 2: [boxes, answers], 3: [boxes, second, answers]}[num_rounds]


QWEN3 = {"model": "qwen3_vl", "coordinates": "absolute", "max_pixels": 96 * 96, "min_pixels": 56 * 56}
SETTINGS = {
    "one round": {"num_rounds": 1},
    "two rounds": {"num_rounds": 2},
    "three rounds": {"num_rounds": 3},
    "reference model": {"beta": 0.05},
    "LoRA, frozen tower": {"lora": True, "beta": 0.05},
    "frozen tower, encoded in every pass": {"lora": True, "encode_once": False},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "grpo, micro-batches of two": {"loss_type": "grpo", "steps_per_generation": 4, "gradient_accumulation_steps": 4},
    "two groups of four": {"num_generations": 4},
    "Qwen3-VL, trained tower": QWEN3,
    "Qwen3-VL, frozen tower": {**QWEN3, "lora": True, "beta": 0.05},
    "Qwen3-VL, three rounds": {**QWEN3, "num_rounds": 3},
    "Qwen3-VL, ratio of a sequence": {**QWEN3, "importance_sampling_level": "sequence", "turn_loss_weights": [1, 3]},
    "Qwen3-VL, high-entropy tokens": {**QWEN3, "top_entropy_quantile": 0.3, "loss_type": "cispo"},
}


def total_gradient(trainer, batch):
    """Loss and gradient by parameter over the micro-batches of a generation batch."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._step, trainer._buffered_inputs, losses = 0, None, []
    for step in range(trainer.args.steps_per_generation):
        loss = trainer._compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        losses.append(loss.item())
        trainer._step = step + 1
    gradient = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return sum(losses), gradient


@pytest.mark.parametrize("setting", SETTINGS)
def test_losses_and_gradients_equal_the_padded_pass(make_trainer, script, photos, family_dir, setting):
    options = dict(SETTINGS[setting])
    options["model"] = family_dir(options.pop("model", "qwen2_5_vl"))
    lora = LoraConfig(target_modules=LANGUAGE, init_lora_weights=False) if options.pop("lora", False) else None
    num_rounds, size = options.get("num_rounds", 2), 8 // options.get("steps_per_generation", 1)
    rows = group_rows(photos[: 8 // options.get("num_generations", 2)], options.get("num_generations", 2))
    results = []
    for pack in (False, True):
        trainer = make_trainer(
            Dataset.from_list(photos), per_device_train_batch_size=size, min_box_side=10, pack_loss=pack,
            round_token_budgets=[64] * num_rounds, kwargs={"peft_config": lora}, **options,
        )  # fmt: skip
        assert trainer._packs == pack
        torch.manual_seed(0)
        if lora:  # random adapters, the same in both
            for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
                parameter.data.normal_(std=0.02)
        generate_kept(trainer, script, rows, num_rounds)
        results.append(total_gradient(trainer, rows))
    (loss, gradient), (packed_loss, packed_gradient) = results
    assert gradient.keys() == packed_gradient.keys() and abs(loss - packed_loss) < 1e-5
    assert max(g.abs().max() for g in gradient.values()) > 1e-4
    for name, value in gradient.items():
        assert (value - packed_gradient[name]).abs().max() < 1e-5, name


def generate_kept(trainer, script, rows, num_rounds):
    """Let the trainer take hand-written rollouts for the next generation batch."""
    made, _ = generate(trainer, script, rows, *scripted_rounds(num_rounds, len(rows)))
    trainer._generate_and_score_completions = lambda inputs: made


def test_only_sampled_tokens_reach_the_head_and_a_prompt_is_computed_once(make_trainer, script, photos):
    trainer = make_trainer(
        Dataset.from_list(photos), per_device_train_batch_size=8, num_generations=4, min_box_side=10
    )
    rows = group_rows(photos[:2], 4)
    batch, _ = generate(trainer, script, rows, *scripted_rounds(2))
    seen = {}
    model = trainer.model
    hooks = [
        model.base_model.register_forward_hook(lambda m, a, o: seen.update(head=o.last_hidden_state.size(1))),
        model.base_model.language_model.register_forward_pre_hook(
            lambda m, a, k: seen.update(row=k["inputs_embeds"].shape[:2]), with_kwargs=True
        ),
    ]
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(model, batch)
    for hook in hooks:
        hook.remove()
    prompts = batch["prompt_mask"].sum(1)[[0, 4]].sum() + batch["completion_mask"].sum()
    assert seen == {"head": (batch["turn_ids"] > 0).sum(), "row": (1, prompts)}


def test_other_attention_keeps_the_padded_pass(make_trainer, photos):
    eager = make_trainer(Dataset.from_list(photos), model_init_kwargs={"attn_implementation": "eager"})
    assert not eager._packs and eager.model.config.get_text_config()._attn_implementation == "eager"
    packed = make_trainer(Dataset.from_list(photos))
    assert packed._packs and packed.model.config.get_text_config()._attn_implementation == ATTENTION


def test_the_saved_model_names_no_attention_of_ours(make_trainer, photos, tmp_path):
    trainer = make_trainer(Dataset.from_list(photos))
    trainer.save_model(str(tmp_path / "saved"))
    assert ATTENTION not in (tmp_path / "saved" / "config.json").read_text()
