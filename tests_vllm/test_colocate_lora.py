"""vLLM in the trainer's process, a LoRA adapter trained: vLLM samples with the adapter merged into the weights."""

import pytest
import torch
from against_transformers import greedy
from peft import LoraConfig


@pytest.fixture(scope="module")
def trainer(make_trainer):
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    return make_trainer(peft_config=adapter, beta=0.01, learning_rate=1e-2)


def test_vllm_has_the_adapter_in_its_weights(trainer, photos):
    """`init_lora_weights=False`: it has an effect before the first step."""
    with trainer.model.disable_adapter():
        _, base = greedy(trainer, photos)
    trainer.vllm_generation.sync_weights()
    ours, expected = greedy(trainer, photos)
    assert ours == expected != base


def test_training_moves_what_vllm_samples(trainer, photos, figure):
    weights = {name: value.clone() for name, value in trainer.model.named_parameters()}
    before, _ = greedy(trainer, photos)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2
    for entry in log:
        figure("sampling/sampling_logp_difference/max of a step", entry["sampling/sampling_logp_difference/max"])
        assert entry["sampling/sampling_logp_difference/max"] < 0.1
    for name, value in trainer.model.named_parameters():
        changed = (value != weights[name]).any().item()
        assert changed == ("lora_" in name) or torch.allclose(value, weights[name], atol=1e-6), name
    trainer.vllm_generation.sync_weights()
    after, expected = greedy(trainer, photos)
    assert after == expected != before
