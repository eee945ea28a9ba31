"""A run that was stopped and resumed ends with the weights of a run that was not."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "weight_decay": 0.1, "shuffle_dataset": True}


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def lora():
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


@pytest.mark.parametrize("adapter, beta", [(False, 0.0), (False, 0.01), (True, 0.01)])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(make_trainer, tmp_path, adapter, beta):
    options = {**OPTIONS, "beta": beta}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), kwargs=lora() if adapter else {}, **options)
    start = weights(whole.model)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), kwargs=lora() if adapter else {}, **options)
    assert not different(start, weights(resumed.model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert different(start, weights(whole.model)) and not different(weights(whole.model), weights(resumed.model))
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]] and len(logs[0]) == 4


def test_every_epoch_has_an_order_of_its_own_and_a_resumed_run_keeps_it(make_trainer, tmp_path):
    """Two questions a step, two steps an epoch: every epoch asks each row once, before and after the interruption."""
    asked = []

    def reward(completions, id, **kwargs):
        asked.append(id[::2])
        return [float(number % 2) for number in range(len(id))]

    options = {"reward": reward, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    make_trainer(**options).train()
    epochs = [asked[number] + asked[number + 1] for number in range(0, 6, 2)]
    assert all(len(set(epoch)) == 4 for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    whole = list(asked)
    for step in (2, 3):
        asked.clear()
        make_trainer(**{**options, "save_strategy": "no"}).train(
            resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}")
        )
        assert asked == whole[step:]


def test_loading_restores_the_weights_of_the_checkpoint(make_trainer, tmp_path):
    make_trainer(**{**OPTIONS, "max_steps": 2}).train()
    directory = tmp_path / "run" / "checkpoint-2"
    saved = weights(AutoModelForImageTextToText.from_pretrained(directory))
    fresh = make_trainer(**OPTIONS)
    assert different(saved, weights(fresh.model))
    GRPOTrainer._load_from_checkpoint(fresh, str(directory))
    assert different(saved, weights(fresh.model)), "Trainer loads these checkpoints by itself now: drop our override."
    fresh._load_from_checkpoint(str(directory))
    assert not different(saved, weights(fresh.model))
    assert fresh.model.lm_head.weight is fresh.model.get_input_embeddings().weight  # still tied


def test_a_checkpoint_carries_what_the_model_needs(make_trainer, tmp_path):
    from transformers import AutoProcessor

    from mgpo_trl.conversation import Conversation

    trainer = make_trainer(**{**OPTIONS, "max_steps": 2})
    trainer.train()
    directory = tmp_path / "run" / "checkpoint-2"
    size = AutoProcessor.from_pretrained(directory).image_processor.size
    assert (size["longest_edge"], size["shortest_edge"]) == (84 * 84, 56 * 56)
    assert Conversation.load(directory) == trainer.conversation
    assert "MGPO" in (tmp_path / "run" / "README.md").read_text()
    trainer.save_model(str(tmp_path / "final"))
    assert not different(
        weights(trainer.model), weights(AutoModelForImageTextToText.from_pretrained(tmp_path / "final"))
    )


def test_a_run_resumed_inside_a_generation_window_plays_that_window_anew_and_keeps_the_next(make_trainer, tmp_path):
    """A window is two steps. From step 1 its questions are asked again for the one step that is left, from 2 they are
    not; either way the later windows begin where they would have."""
    asked = []

    def reward(completions, id, **kwargs):
        asked.append(sorted(set(id)))
        return [float(number % 2) for number in range(len(id))]

    options = {"reward": reward, "num_iterations": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**options)
    whole.train()
    first, second, third = list(asked)
    for step, wanted in ((1, [first, second, third]), (2, [second, third])):
        asked.clear()
        resumed = make_trainer(**{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert asked == wanted
    assert not different(weights(whole.model), weights(resumed.model))  # from the end of a window: bit for bit


@pytest.mark.parametrize(
    "options, window",
    [
        ({"num_iterations": 2, "save_steps": 3}, 2),
        ({"num_iterations": 2, "save_steps": 4}, None),
        ({"steps_per_generation": 6, "gradient_accumulation_steps": 4, "save_steps": 2}, 3),
        ({"gradient_accumulation_steps": 4, "save_steps": 1}, None),
        ({"num_iterations": 2, "save_steps": 3, "save_strategy": "no"}, None),
        ({"num_iterations": 2, "save_steps": 3, "save_strategy": "epoch"}, None),
        ({"num_iterations": 2, "save_steps": 0.3}, None),
    ],
)
def test_checkpoints_inside_a_generation_window_are_announced(tmp_path, caplog, options, window):
    from mgpo_trl import MGPOConfig

    batch = {"per_device_train_batch_size": 4, "num_generations": 2}
    MGPOConfig(str(tmp_path), **{"save_strategy": "steps", **batch, **options})
    found = [record.getMessage() for record in caplog.records if "`save_steps`" in record.getMessage()]
    assert len(found) == (window is not None)
    if window:
        assert f"multiple of {window}" in found[0] and f"got {options['save_steps']}" in found[0]
