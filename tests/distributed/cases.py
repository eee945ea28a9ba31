"""
Trainings that one process and several processes must play alike.

Sampling would differ by the number of processes, as every one has a random state of its own. Here the draw of a token
depends on the step, the round, the place of the rollout in the *global* batch and the position, and on nothing else,
and every second rollout opens with a box of its own size. Both engines still generate: the shared-prefix sampler where
a process holds the whole model, and TRL's `generate` where it is sharded.
"""

import os
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from commands import load_script, shorten_builtin
from conftest import photo_row
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pytest import MonkeyPatch, raises
from scripted import photos_dataset
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LogitsProcessor, LogitsProcessorList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from mgpo_trl import MGPOConfig, MGPOTrainer
from mgpo_trl.boxes import format_box
from mgpo_trl.shared_prefix import _Decoding

GLOBAL_BATCH = 8
"""Rollouts of a step over all processes. By default of one question, so that its group reaches over the processes."""
HELDOUT = 6
"""Held-out scenes of the built-in run: as many as its picture shows."""
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


class PlacedLogits(LogitsProcessor):
    """For `generate`: [`PlacedTrainer.placed`] on every row of this process."""

    def __init__(self, trainer):
        self.trainer, self.position = trainer, 0

    def __call__(self, input_ids, scores):
        self.position += 1
        return self.trainer.placed(scores, range(len(scores)), [self.position - 1] * len(scores))


class PlacedDecoding(_Decoding):
    """For the shared-prefix sampler, whose rows leave the batch when they end: likewise."""

    def __init__(self, trainer, sampler, rows, logits):
        super().__init__(sampler, rows, logits)
        self.trainer = trainer

    def _choose(self):
        rows = self.numbers.tolist()
        scores = self.sampler.process(self.ids, self.logits.float())
        return self.trainer.placed(scores, rows, [len(self.sampled[row]) for row in rows]).argmax(-1)


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
        self.played, self.forwards, self.generating, self.encoded = [], [], False, Counter()
        self.sampler_generate, self.model.generate = self.model.generate, self.placed_generate
        self.model.register_forward_pre_hook(self.count_forward)
        for name, one in {"policy": self.model, "reference": self.ref_model}.items():
            if one is not None:
                tower = self._bare_model(one).base_model.visual
                tower.register_forward_pre_hook(partial(self.count_images, name), with_kwargs=True)

    def by_ids(self, completion_ids, id, **kwargs):
        """A reward that tells the rollouts by their sampled ids, and keeps them."""
        rewards = [float(sum(ids) % 3) for ids in completion_ids]
        for row, (name, ids, reward) in enumerate(zip(id, completion_ids, rewards, strict=True)):
            place = [self.state.global_step, self.first_row + row]
            self.played.append({"place": place, "id": name, "ids": ids, "reward": reward})
        return rewards

    def placed_generate(self, *args, **kwargs):
        return self.sampler_generate(*args, **kwargs, logits_processor=LogitsProcessorList([PlacedLogits(self)]))

    def _generate_single_turn(self, *args, **kwargs):
        self.forwards.append(0)
        self.generating = True
        with patch("mgpo_trl.shared_prefix._Decoding", partial(PlacedDecoding, self)):
            turns = super()._generate_single_turn(*args, **kwargs)
        self.generating = False
        return turns

    def placed(self, scores, rows, positions):
        """Scores (R, V) of which the largest is what a row samples at its position: a written token, or a draw."""
        return torch.stack([self.placed_row(*one) for one in zip(scores, rows, positions, strict=True)])

    def placed_row(self, scores, row, position):
        written = self.written(row)
        if written is not None and position < len(written):
            return torch.full_like(scores, -torch.inf).index_fill(0, torch.tensor(written[position]), 0.0)
        if self.lopsided:  # long turns end only with their budget
            scores = scores.index_fill(0, torch.tensor(self._tokenizer.eos_token_id), -torch.inf)
        seed = hash((self.state.global_step, self._round, self.first_row + row, position)) % 2**63
        uniform = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed))
        return scores - torch.log(-torch.log(uniform))  # Gumbel noise: the likeliest token is a sample

    def written(self, row):
        """A box whose size follows from the place of its rollout: crops, and so round 2, differ in length."""
        place, end = self.first_row + row, self._tokenizer.eos_token_id
        if self.lopsided and self.first_row == 0:
            return [end]
        if self._round > 1 or not (self.lopsided or place % 2):
            return None
        width, height = self._rollouts[row].view.size
        box = (2 + place, 3, min(width - 2, 34 + 3 * place), height - 4)
        text = format_box(box, (width, height), "absolute", "card")
        return [*self._tokenizer(text)["input_ids"], *([] if self.lopsided else [end])]

    def count_forward(self, *args):
        if self.generating:
            self.forwards[-1] += 1

    def count_images(self, name, tower, args, kwargs):
        self.encoded[name] += len(kwargs["grid_thw"])

    def result(self):
        """What the tests compare, as JSON."""
        parameters = list(self.model.parameters())
        sharded = sum(hasattr(value, "ds_tensor") or type(value).__name__ == "DTensor" for value in parameters)
        return {
            "logs": [entry for entry in self.state.log_history if "loss" in entry],
            "played": self.played,
            "forwards": self.forwards,
            "encoded": self.encoded,
            "engine": self.accelerator.distributed_type.value,
            "processes": self.accelerator.num_processes,
            "parameters": len(parameters),
            "sharded": sharded,
            "shares": self._shares_prefix and self._packs,
        }


class LopsidedTrainer(PlacedTrainer):
    lopsided = True


class DyingTrainer(PlacedTrainer):
    """The second process is killed: while it generates round 2 of the second step, or late in its second save."""

    dies_in = "rollout"

    def _generate_single_turn(self, *args, **kwargs):
        if self.dies_in == "rollout" and (self.state.global_step, self._round) == (1, 2):
            self.die()
        return super()._generate_single_turn(*args, **kwargs)

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
    """Four questions a step, so that every process has groups of its own."""
    return whole_and_resumed(model, directory, peft_config=LoraConfig(**LORA), num_generations=2)


def save_adapter(model):
    """An adapter that changes what the model says, beside it: what `further` starts from."""
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(model), LoraConfig(**LORA))
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    adapted.save_pretrained(Path(model, "adapter"))


def further(model, directory):
    """An adapter is trained further; a frozen copy of it is the reference."""
    trainer = PlacedTrainer(Path(model, "adapter"), directory, max_steps=2, beta=0.5)
    trainer.train()
    return {"whole": trainer.result()}


def four_bit(model, directory):
    """Stored in floating point, as FSDP needs it to shard them."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    lora = LoraConfig(**LORA)
    trainer = PlacedTrainer(model, directory, peft_config=lora, quantization_config=config, max_steps=2)
    trainer.train()
    return {"whole": trainer.result()}


def lopsided(model, directory):
    """Under ZeRO-3 with whole layers gathered for the generation, and one by one."""
    trainers = {}
    for gather in (True, False) if is_deepspeed_zero3_enabled() else (True,):
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


def train_script(model, directory, **more):
    """`train.py` itself, with its options: the schedule of the built-in recipe is one with a floor."""
    options = {
        "model_name_or_path": model, "dataset_name": "builtin:needle", "limit": 4, "output_dir": directory,
        "max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "round_token_budgets": "6 4",
        "report_to": "none", "disable_tqdm": "true", **more,
    }  # fmt: skip
    parts = [part for name, value in options.items() if value for part in (f"--{name}", *str(value).split(" "))]
    load_script("train").main(parts)


def preflight(model, directory):
    """The look before the run, on several processes; its exit code says that the run is ready."""
    with raises(SystemExit) as ended:
        train_script(model, directory, preflight="true")
    assert ended.value.code == 0


def builtin_run(model, directory):
    """The built-in run: every process needs its warm start, and one of them plays the held-out scenes."""
    with MonkeyPatch.context() as patch:
        shorten_builtin(patch, directory / "cache", HELDOUT)
        train_script(None, directory)


CASES = {
    case.__name__: case
    for case in (
        full,
        adapter,
        further,
        four_bit,
        lopsided,
        train_script,
        preflight,
        builtin_run,
        dies_in_a_rollout,
        dies_in_a_save,
    )
}
