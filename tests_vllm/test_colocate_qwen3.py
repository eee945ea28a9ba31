"""Qwen3-VL: other placeholders and patches, coordinates of 0 to 1000, vision features in several language layers."""

import pytest
from against_transformers import BOXES, greedy, logprobs_of, written_boxes
from conftest import HERE, build_trainer, group_rows, prepare_engine

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trainer(photos, tmp_path_factory, session_patch):
    session_patch.syspath_prepend(str(HERE.parent / "tests"))
    from families import save_family
    from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    directory = save_family("qwen3_vl", tmp_path_factory.mktemp("model"))
    budget = {"shortest_edge": 256 * 256, "longest_edge": 512 * 512}
    norm = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": budget}
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**norm), tokenizer, Qwen3VLVideoProcessor(size=budget), chat_template=template
    )
    whole.save_pretrained(directory)
    prepare_engine(session_patch)
    return build_trainer(directory, photos, tmp_path_factory.mktemp("run"), min_pixels=128 * 128, max_pixels=224 * 224)


def test_ids_and_log_probabilities_are_those_that_are_trained_on(trainer, photos, figure):
    trainer.model.train()
    with written_boxes(trainer):
        batch = trainer._generate_and_score_completions(group_rows(photos))
    assert trainer._metrics["train"]["grounding/valid_ratio"] == [len(BOXES) / 8]
    sampled = batch["turn_ids"] > 0
    for row in BOXES:
        sampled[row] &= batch["turn_ids"][row] == 2
    _, biased = logprobs_of(trainer, batch)
    same = (batch["sampling_per_token_logps"] - biased)[sampled].abs().max().item()
    figure("largest difference of a log-probability, vLLM to transformers with the same bias, Qwen3-VL", same)
    assert same < TOLERANCE


def test_vllm_follows_the_weights(trainer, photos):
    before, expected = greedy(trainer, photos)
    assert before == expected
    trainer.train()
    trainer.vllm_generation.sync_weights()
    after, expected = greedy(trainer, photos)
    assert after == expected != before
