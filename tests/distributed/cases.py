"""
Trainings that one process and several processes must play alike.

Sampling would differ by the number of processes, as every one has a random state of its own. Here the draw of a token
depends on the step, the round, the place of the rollout in the *global* batch and the position, and on nothing else,
and every second rollout opens with a box of its own size. The model still generates, through its own engine.
"""

import os
import signal
import time
from pathlib import Path

import torch
from commands import load_script
from conftest import photo_row
from datasets import Dataset
from peft import LoraConfig
from scripted import photos_dataset
from transformers import BitsAndBytesConfig, LogitsProcessor, LogitsProcessorList

from mgpo_trl import MGPOConfig, MGPOTrainer
from mgpo_trl.boxes import format_box

GLOBAL_BATCH = 8
"""Rollouts of a step over all processes: one question, so that its group reaches over the processes."""
OPTIONS = {
    "max_pixels": 84 * 84, "min_pixels": 56 * 56, "round_token_budgets": [24, 8], "num_generations": 8,
    "gradient_accumulation_steps": 2, "beta": 0.01, "learning_rate": 1e-3, "adam_epsilon": 1e-5, "max_steps": 3,
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 7,
}  # fmt: skip
LORA = {"r": 4, "target_modules": r"^(?!.*visual).*\.(q_proj|v_proj)$", "task_type": "CAUSAL_LM"}


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def dataset() -> Dataset:
    """Four rows whose pictures differ in size and aspect ratio."""
    return photos_dataset(
        [photo_row(n, size) for n, size in enumerate([(400, 200), (150, 300), (336, 336), (336, 224)])]
    )


class PlacedNoise(LogitsProcessor):
    """Gumbel noise by (seed, global row, position): the likeliest token afterwards is a sample."""

    def __init__(self, seed, first_row):
        self.seed, self.first_row, self.position = seed, first_row, 0

    def __call__(self, input_ids, scores):
        uniform = torch.stack([self._row(number, scores.size(1)) for number in range(len(scores))])
        self.position += 1
        return scores - torch.log(-torch.log(uniform))

    def _row(self, number, width):
        seed = hash((self.seed, self.first_row + number, self.position)) % 2**63
        return torch.rand(width, generator=torch.Generator().manual_seed(seed))


class ForcedLength(LogitsProcessor):
    """Short turns end at once, long ones only with their budget."""

    def __init__(self, end_id, short):
        self.end_id, self.short = torch.tensor([end_id]), short

    def __call__(self, input_ids, scores):
        if self.short:
            return torch.full_like(scores, -torch.inf).index_fill(1, self.end_id, 0.0)
        return scores.index_fill(1, self.end_id, -torch.inf)


class PlacedTrainer(MGPOTrainer):
    """
    Rollouts depend on their place in the global batch. With `lopsided`, those of the first process are short and name
    no box, and those of the others are long and name one.
    """

    lopsided = False

    def __init__(self, model, output_dir, **options):
        models = {name: options.pop(name) for name in ("peft_config", "quantization_config") if name in options}
        batch = GLOBAL_BATCH // OPTIONS["gradient_accumulation_steps"] // world_size()
        args = MGPOConfig(str(output_dir), **{**OPTIONS, "per_device_train_batch_size": batch, **options})
        super().__init__(str(model), self.by_ids, args, train_dataset=dataset(), **models)
        self.generation_config.do_sample = self.generation_kwargs["do_sample"] = False
        self.first_row = self.accelerator.process_index * GLOBAL_BATCH // world_size()
        self.played, self.forwards, self.generating = [], [], False
        self.sampler_generate, self.model.generate = self.model.generate, self.placed_generate
        self.model.register_forward_pre_hook(self.count_forward)

    def by_ids(self, completion_ids, id, **kwargs):
        """A reward that tells the rollouts by their sampled ids, and keeps them."""
        rewards = [float(sum(ids) % 3) for ids in completion_ids]
        for row, (name, ids, reward) in enumerate(zip(id, completion_ids, rewards, strict=True)):
            place = [self.state.global_step, self.first_row + row]
            self.played.append({"place": place, "id": name, "ids": ids, "reward": reward})
        return rewards

    def placed_generate(self, input_ids, **kwargs):
        processors = [PlacedNoise(10 * self.state.global_step + self._round, self.first_row)]
        if self.lopsided:
            processors.append(ForcedLength(self._tokenizer.eos_token_id, short=self.first_row == 0))
        self.forwards.append(0)
        self.generating = True
        ids = self.sampler_generate(input_ids=input_ids, **kwargs, logits_processor=LogitsProcessorList(processors))
        self.generating = False
        return self.with_boxes(ids, input_ids.size(1)) if self._round == 1 else ids

    def count_forward(self, *args):
        if self.generating:
            self.forwards[-1] += 1

    def with_boxes(self, ids, prompt_length):
        """The size of a box follows from the place of its rollout: crops, and so round 2, differ in length."""
        turns = [row[prompt_length:].tolist() for row in ids]
        for number, rollout in enumerate(self._rollouts):
            row = self.first_row + number
            if self.first_row > 0 if self.lopsided else row % 2:
                width, height = rollout.view.size
                box = (2 + row, 3, min(width - 2, 34 + 3 * row), height - 4)
                text = format_box(box, rollout.view.size, "absolute", "card")
                turns[number] = [*self._tokenizer(text)["input_ids"], self._tokenizer.eos_token_id]
        longest = max(map(len, turns))
        padded = [[*turn, *[self._tokenizer.pad_token_id] * (longest - len(turn))] for turn in turns]
        return torch.cat([ids[:, :prompt_length], torch.tensor(padded, device=ids.device)], dim=1)

    def result(self):
        """What the tests compare, as JSON."""
        parameters = list(self.model.parameters())
        sharded = sum(hasattr(value, "ds_tensor") or type(value).__name__ == "DTensor" for value in parameters)
        return {
            "logs": [entry for entry in self.state.log_history if "loss" in entry],
            "played": self.played,
            "forwards": self.forwards,
            "engine": self.accelerator.distributed_type.value,
            "processes": self.accelerator.num_processes,
            "parameters": len(parameters),
            "sharded": sharded,
        }


class LopsidedTrainer(PlacedTrainer):
    lopsided = True


class DyingTrainer(PlacedTrainer):
    """The second process is killed: while it generates round 2 of the second step, or late in its second save."""

    dies_in = "rollout"

    def placed_generate(self, input_ids, **kwargs):
        if self.dies_in == "rollout" and (self.state.global_step, self._round) == (1, 2):
            self.die()
        return super().placed_generate(input_ids, **kwargs)

    def _save_rng_state(self, output_dir):
        if self.dies_in == "save" and self.state.global_step == 2:
            time.sleep(1)  # the first process is through with its own files by then
            self.die()
        super()._save_rng_state(output_dir)

    def die(self):
        if self.args.process_index == 1:
            Path(self.args.output_dir, "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def whole_and_resumed(model, directory, **options):
    """Three steps, and the third again from the checkpoint of the second."""
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = PlacedTrainer(model, directory / "whole", **options)
    whole.train()
    whole.save_model(str(directory / "final"))
    resumed = PlacedTrainer(model, directory / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(directory / "whole" / "checkpoint-2"))
    return {"whole": whole.result(), "resumed": resumed.result()}


def full(model, directory):
    return whole_and_resumed(model, directory)


def adapter(model, directory):
    return whole_and_resumed(model, directory, peft_config=LoraConfig(**LORA))


def four_bit(model, directory):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    lora = LoraConfig(**LORA)
    trainer = PlacedTrainer(model, directory, peft_config=lora, quantization_config=config, max_steps=2)
    trainer.train()
    return {"whole": trainer.result()}


def lopsided(model, directory):
    trainers = {}
    for gather in (True, False):
        trainer = LopsidedTrainer(model, directory, ds3_gather_for_generation=gather, max_steps=2)
        trainer.train()
        trainers[f"gather {gather}"] = trainer.result()
    return trainers


def dies_in_a_rollout(model, directory):
    DyingTrainer(model, directory).train()


def dies_in_a_save(model, directory):
    trainer = DyingTrainer(model, directory, save_strategy="steps", save_steps=1)
    trainer.dies_in = "save"
    trainer.train()


def train_script(model, directory):
    """`train.py` itself, with its options."""
    options = {
        "model_name_or_path": model, "dataset_name": "builtin:needle", "limit": 4, "output_dir": directory,
        "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "round_token_budgets": "6 4",
        "report_to": "none", "disable_tqdm": "true",
    }  # fmt: skip
    parts = [part for name, value in options.items() for part in (f"--{name}", *str(value).split(" "))]
    load_script("train").main(parts)


CASES = {
    case.__name__: case
    for case in (full, adapter, four_bit, lopsided, dies_in_a_rollout, dies_in_a_save, train_script)
}
