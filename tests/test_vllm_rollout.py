"""What our trainer asks of vLLM, checks in its answers and makes of its log-probabilities; vLLM itself is scripted."""

import math
from types import SimpleNamespace

import pytest
import torch
from scripted import ANSWER, box_text, group_rows, ids_of, photos_dataset
from scripted_vllm import OFFSET, ScriptedEngine, install, score_as
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from mgpo_trl.rollout import Rollout, Turn
from mgpo_trl.vllm_rollout import (
    RoundGeneration,
    check_length,
    check_prompt,
    runs_of,
    sampling_logprobs,
    single_placeholders,
)

FIRST = [box_text(0), "I do not know.", (box_text(1),), box_text(1, (10, 20, 56, 60))]
SECOND = [ANSWER, "\\boxed{B}", "\\boxed{B}", ("It is \\boxed",)]


@pytest.fixture
def colocated(make_trainer, photos, monkeypatch):
    """Make (trainer, engine): a landscape and a portrait photo, two rollouts each."""

    def make(rounds=(FIRST, SECOND), **options):
        install(monkeypatch)
        defaults = {"use_vllm": True, "round_token_budgets": [60, 20][: len(rounds)], "num_rounds": len(rounds)}
        trainer = make_trainer(photos_dataset(photos), **{**defaults, **options})
        engine = trainer.vllm_generation.llm
        engine.image_token_id = trainer.chat.image_token_id
        engine.rounds = [
            [ids_of(trainer, turn) if isinstance(turn, str) else ids_of(trainer, *turn, end=False) for turn in turns]
            for turns in rounds
        ]
        trainer.model.train()
        score_as(monkeypatch, trainer)
        return trainer, engine

    return make


def play(trainer, engine, photos):
    engine.calls, engine.seen = [], []
    return trainer._generate_and_score_completions(group_rows(photos[:2]))


def ratios(trainer, engine, photos, mode="sequence_truncate"):
    """(batch, importance sampling ratio, tokens that the model sampled in each round and rollout)."""
    trainer.vllm_importance_sampling_mode, trainer.vllm_importance_sampling_clip_max = mode, math.inf
    batch = play(trainer, engine, photos)
    counts = [(batch["turn_ids"] == number).sum(1) for number in (1, 2)]
    return batch, batch["importance_sampling_ratio"], counts


def test_vllm_samples_from_the_ids_that_are_trained_on(colocated, photos):
    trainer, engine = colocated()
    batch = play(trainer, engine, photos)
    for row in range(4):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        assert engine.seen[0][row] == prompt
        assert engine.seen[1][row] + engine.rounds[1][row] == prompt + completion
        for number, (prompts, _) in enumerate(engine.calls, start=1):
            assert prompts[row]["prompt_token_ids"].count(trainer.chat.image_token_id) == number
    images = [prompt["multi_modal_data"]["image"] for prompt in engine.calls[1][0]]
    assert all(len(pair) == 2 for pair in images) and images[0][0] is images[1][0], "the view is shared by its group"


def test_each_round_has_its_budget_and_no_vision_token(colocated, photos):
    trainer, engine = colocated(generation_kwargs={"logit_bias": {7: 1.0}})
    play(trainer, engine, photos)
    (_, first), (_, second) = engine.calls
    assert (first.max_tokens, second.max_tokens) == (60, 20)
    config = trainer.model.config
    vision = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    for sampling in (first, second):
        assert sampling.logit_bias == {7: 1.0, **dict.fromkeys(vision, -100.0)} and sampling.logprobs == 0


def test_the_engine_fits_images_as_we_do_and_takes_no_video(colocated):
    trainer, engine = colocated(num_rounds=2)
    assert engine.options["mm_processor_kwargs"] == {"size": trainer.processing_class.image_processor.size}
    assert engine.options["limit_mm_per_prompt"] == {"image": 2, "video": 0}
    assert vllm_generation.LLM is ScriptedEngine and grpo_trainer.VLLMGeneration is vllm_generation.VLLMGeneration
    assert vllm_generation.VLLMClient.__module__ == "trl.generation.vllm_client"


def test_image_features_are_dropped_with_the_weights(colocated, photos):
    trainer, engine = colocated()
    play(trainer, engine, photos)
    assert engine.resets == ["prefix", "encoder"] and any("visual" in name for name in engine.loaded)
    play(trainer, engine, photos)
    assert engine.resets == ["prefix", "encoder"]
    trainer.state.global_step += 1
    play(trainer, engine, photos)
    assert engine.resets == ["prefix", "encoder"] * 2


def test_the_ratio_of_a_sequence_covers_sampled_tokens(colocated, photos):
    trainer, engine = colocated()
    batch, ratio, (one, two) = ratios(trainer, engine, photos)
    assert (batch["turn_ids"] == 0).any(1).all()
    torch.testing.assert_close(ratio.squeeze(1), torch.exp(OFFSET[1] * one + OFFSET[2] * two))
    unknown = batch["sampling_per_token_logps"].isnan()
    assert torch.equal(unknown, (batch["turn_ids"] == 0) & (batch["completion_mask"] == 1))


@pytest.mark.parametrize("weights, kept", [([0.0, 1.0], 2), ([0.5, 0.0], 1)])
def test_the_ratio_of_a_sequence_leaves_out_turns_of_no_weight(colocated, photos, weights, kept):
    trainer, engine = colocated(turn_loss_weights=weights)
    _, ratio, counts = ratios(trainer, engine, photos)
    torch.testing.assert_close(ratio.squeeze(1), torch.exp(OFFSET[kept] * counts[kept - 1]))
    differences = trainer._metrics["train"]["sampling/sampling_logp_difference/max"]
    assert differences == [abs(OFFSET[kept])]


def test_the_ratio_of_a_sequence_leaves_out_cut_turns(colocated, photos):
    trainer, engine = colocated(mask_truncated_completions=True)
    _, ratio, (one, two) = ratios(trainer, engine, photos)
    expected = torch.exp(OFFSET[1] * one + OFFSET[2] * two)
    expected[2] = math.exp(OFFSET[2] * len(engine.rounds[1][2]))  # its grounding turn was cut
    expected[3] = 1.0  # its answer was
    torch.testing.assert_close(ratio.squeeze(1), expected)


def test_the_ratio_of_a_token_is_one_where_nothing_was_sampled(colocated, photos):
    trainer, engine = colocated()
    batch, ratio, _ = ratios(trainer, engine, photos, "token_truncate")
    for number, offset in {0: 0.0, **OFFSET}.items():
        mine = batch["turn_ids"] == number
        torch.testing.assert_close(ratio[mine], torch.full_like(ratio[mine], math.exp(offset)))


def test_one_round(colocated, photos):
    trainer, engine = colocated([SECOND], mask_truncated_completions=True)
    trainer.vllm_importance_sampling_mode = "sequence_truncate"
    batch = play(trainer, engine, photos)
    lengths = torch.tensor([len(turn) for turn in engine.rounds[0]])
    lengths[3] = 0
    torch.testing.assert_close(
        batch["importance_sampling_ratio"].squeeze(1), torch.exp(OFFSET[1] * lengths).clamp(max=3)
    )
    assert engine.options["limit_mm_per_prompt"]["image"] == 1


def test_a_processor_that_resizes_again_is_named(colocated, photos):
    trainer, engine = colocated()
    engine.factor = 14
    with pytest.raises(ValueError, match=r"\[32\] features for the images of sample 'photo-0', which have \[8\]"):
        play(trainer, engine, photos)


def test_a_conversation_without_room_is_named(colocated, photos):
    trainer, engine = colocated(vllm_max_model_length=40)
    with pytest.raises(ValueError, match=r"sample 'photo-\d' has \d+ tokens .* takes 40 in all. Raise `vllm_max_mod"):
        play(trainer, engine, photos)
    check_length("a", [1] * 39, 40)
    with pytest.raises(ValueError):
        check_length("a", [1] * 40, 40)


def test_quantised_weights_are_refused():
    model = SimpleNamespace(is_loaded_in_4bit=True)
    with pytest.raises(ValueError, match="`use_vllm` needs weights that are not quantised"):
        RoundGeneration({}, model=model, accelerator=SimpleNamespace(), processing_class=None)


def test_placeholders():
    assert single_placeholders([1, 9, 9, 2, 9, 3, 3], 9) == [1, 9, 2, 9, 3, 3]
    assert runs_of([1, 9, 9, 2, 9, 3], 9) == [2, 1] and runs_of([1, 1], 9) == []


def test_prompts_that_differ():
    check_prompt("a", [1, 9, 9, 2], (1, 9, 9, 2), 9, "{}")
    with pytest.raises(ValueError, match="sample 'a' .* at position 3 id 5 instead of 2"):
        check_prompt("a", [1, 9, 9, 2], [1, 9, 9, 5], 9, "{}")
    with pytest.raises(ValueError, match="5 tokens instead of 4, at position 4 id 3 instead of None"):
        check_prompt("a", [1, 9, 9, 2], [1, 9, 9, 2, 3], 9, "{}")
    with pytest.raises(ValueError, match=r"\[3\] features .* which have \[2\] .*--mm-processor-kwargs '\{\}'"):
        check_prompt("a", [1, 9, 9, 2], [1, 9, 9, 9, 2], 9, "{}")


def test_sampling_logprobs():
    turns = [Turn([1, 2], "", False, [-0.5, -0.25], reply_ids=[3, 4]), Turn([5], "", False, [-1.0])]
    rollout = Rollout("a", "", None, None, [], turns=turns)
    unknown = math.nan
    expected = [-0.5, -0.25, unknown, unknown, -1.0]
    assert sampling_logprobs(rollout, [True] * 5) == pytest.approx(expected, nan_ok=True)
    expected = [unknown] * 4 + [-1.0]
    assert sampling_logprobs(rollout, [False, False, True, True, True]) == pytest.approx(expected, nan_ok=True)
