"""vLLM in the trainer's process, every weight trained: ids, log-probabilities, caches, weights."""

import pytest
import torch
from against_transformers import BOXES, greedy, logprobs_of, written_boxes
from conftest import ENGINE, group_rows

TOLERANCE = 1e-4
BLOCK = ENGINE["block_size"]


def largest(difference, where):
    return difference[where].abs().max().item()


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer()


@pytest.fixture
def engine_outputs(trainer, monkeypatch):
    """What the engine returns, one list for each round."""
    outputs, generate = [], trainer.vllm_generation.llm.generate

    def noted(*args, **kwargs):
        outputs.append(generate(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(trainer.vllm_generation.llm, "generate", noted)
    return outputs


def test_ids_and_log_probabilities_are_those_that_are_trained_on(trainer, photos, engine_outputs, figure):
    trainer.model.train()
    with written_boxes(trainer):
        batch = trainer._generate_and_score_completions(group_rows(photos))
    assert trainer._metrics["train"]["grounding/valid_ratio"] == [len(BOXES) / 8]
    grids = batch["image_grid_thw"].reshape(8, 2, 3)
    assert len({tuple(grid) for grid in grids[:, 0].tolist()}) >= 3 and (grids[:, 0] != grids[:, 1]).any()
    assert len(engine_outputs) == 2
    for row in range(8):
        ids = torch.cat([batch["prompt_ids"][row], batch["completion_ids"][row]]).tolist()
        mask = torch.cat([batch["prompt_mask"][row], batch["completion_mask"][row]]).bool().tolist()
        ids = [one for one, kept in zip(ids, mask, strict=True) if kept]
        last = engine_outputs[1][row]
        assert [*last.prompt_token_ids, *last.outputs[0].token_ids] == ids
        assert ids[: len(engine_outputs[0][row].prompt_token_ids)] == list(engine_outputs[0][row].prompt_token_ids)
    sampled = batch["turn_ids"] > 0
    for row in BOXES:  # written by the test, not by vLLM
        sampled[row] &= batch["turn_ids"][row] == 2
    plain, biased = logprobs_of(trainer, batch)
    theirs = batch["sampling_per_token_logps"]
    assert (
        theirs[sampled].isfinite().all()
        and theirs[(batch["turn_ids"] == 0) & (batch["completion_mask"] == 1)].isnan().all()
    )
    old, same = batch["old_per_token_logps"], largest(theirs - biased, sampled)
    figure("largest difference of a log-probability, vLLM to transformers with the same bias", same)
    figure("largest difference of a log-probability, vLLM to the loss pass", largest(theirs - plain, sampled))
    figure("largest difference of a log-probability, loss pass to a plain one", largest(old - plain, sampled))
    assert same < TOLERANCE


def test_training(trainer, figure):
    """Two steps: the sampler's log-probabilities are those of the policy, which moves."""
    weights = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer._metrics["train"].clear()  # of the batch before, part of which was written by the test
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2
    for entry in log:
        figure("sampling/sampling_logp_difference/max of a step", entry["sampling/sampling_logp_difference/max"])
        assert entry["sampling/sampling_logp_difference/max"] < 0.1
    assert all((value != weights[name]).any() for name, value in trainer.model.named_parameters() if "visual" in name)


def test_caches_are_used(trainer, photos, engine_outputs):
    """A prompt with its image is computed once, for both rounds and as long as the weights stay."""
    trainer.model.train()
    for _ in range(2):
        trainer._generate_and_score_completions(group_rows(photos))
    for once, again in zip(engine_outputs[1], engine_outputs[2], strict=True):
        prompt = len(again.prompt_token_ids)
        assert min(once.num_cached_tokens, again.num_cached_tokens) >= (prompt - 1) // BLOCK * BLOCK >= BLOCK


def test_turns_that_were_cut_are_closed(trainer, photos):
    trainer.model.train()
    batch = trainer._generate_and_score_completions(group_rows(photos))
    eos = trainer._tokenizer.eos_token_id
    for row in range(8):
        turn_ids, ids = batch["turn_ids"][row].tolist(), batch["completion_ids"][row].tolist()
        length = turn_ids.index(0)
        assert length <= 12 and turn_ids.count(2) <= 6
        assert (ids[length] if length == 12 and ids[length - 1] != eos else eos) == eos


def test_vllm_follows_the_weights(trainer, photos):
    """Every weight moves, then the vision tower alone: features that earlier weights computed are not used again."""
    rows = photos
    trainer.vllm_generation.sync_weights()
    before, expected = greedy(trainer, rows)
    assert before == expected
    torch.manual_seed(0)
    for part in (trainer.model, trainer.model.model.visual):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        stale, expected = greedy(trainer, rows)
        assert stale == before != expected
        trainer.vllm_generation.sync_weights()
        before, expected = greedy(trainer, rows)
        assert before == expected


def test_without_dropping_the_features_vllm_would_use_old_ones(trainer, photos, monkeypatch):
    """Why we drop them: this is TRL's own `sync_weights`."""
    trainer.vllm_generation.sync_weights()
    greedy(trainer, photos)
    with torch.no_grad():
        for parameter in trainer.model.model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    monkeypatch.setattr(trainer.vllm_generation.llm.llm_engine, "reset_encoder_cache", lambda: None)
    trainer.vllm_generation.sync_weights()
    ours, expected = greedy(trainer, photos)
    assert ours != expected
