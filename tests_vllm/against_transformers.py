"""What vLLM is compared with: the trainer's own model, run by transformers on the same ids and images."""

from contextlib import contextmanager

import torch

from mgpo_trl.boxes import format_box
from mgpo_trl.generation import ModelGenerator
from mgpo_trl.processing import vision_token_ids
from mgpo_trl.rollout import Context, start_rollouts

IMAGES = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
BOXES = {0: (10, 10, 120, 50), 3: (4, 8, 50, 120), 4: (0, 0, 60, 100)}
"""Boxes in the view, by row: the test writes them, because a random model names none."""


@contextmanager
def written_boxes(trainer):
    """In round 1 these rows get a turn with a box, so that their round 2 sees a crop."""
    generation = trainer.vllm_generation
    generate = generation.generate

    def write(prompts, images, num_generations, profiler=None):
        seen, ids, logprobs, others = generate(prompts, images, num_generations, profiler)
        if len(images[0]) == 1:
            for row, box in BOXES.items():
                text = format_box(box, images[row][0].size, trainer.template.coordinates, "card")
                ids[row] = [*trainer._tokenizer(text)["input_ids"], trainer._tokenizer.eos_token_id]
                logprobs[row] = [[0.0]] * len(ids[row])
        return seen, ids, logprobs, others

    generation.generate = write
    try:
        yield
    finally:
        del generation.generate


def logprobs_of(trainer, batch):
    """Log-probabilities (B, C) of the completion by one padded pass: (as in the loss, with vLLM's bias on logits)."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **{name: batch[name] for name in IMAGES}).logits.float()
    model.train()
    length = batch["completion_ids"].size(1)
    logits = logits[:, -length - 1 : -1]
    biased = logits.clone()
    biased[..., vision_token_ids(model.config)] -= 100.0
    chosen = batch["completion_ids"].unsqueeze(-1)
    return [one.log_softmax(-1).gather(-1, chosen).squeeze(-1) for one in (logits, biased)]


def greedy(trainer, rows, budget=8):
    """Greedy round-1 turns by vLLM with its present weights, and by transformers with the trainer's."""
    rollouts = start_rollouts(rows, trainer.template, trainer.args.num_rounds)
    contexts = [Context(rollout.prompt_ids, rollout.images, 1) for rollout in rollouts]
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    theirs = [sampled.ids for sampled in ModelGenerator(model, trainer.chat, [budget])(contexts)]
    model.train()
    generation = trainer.vllm_generation
    generation.samples = [rollout.id for rollout in rollouts]
    generation.temperature, generation.max_completion_length = 0.0, budget
    _, ours, *_ = generation.generate([c.ids for c in contexts], [c.images for c in contexts], 1)
    generation.temperature = trainer.temperature
    return [list(ids) for ids in ours], theirs
