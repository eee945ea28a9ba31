"""
What `MGPOTrainer` overrides or relies on in TRL. A failure here after an upgrade names the seam that moved: read TRL's
change, adapt `mgpo_trainer.py`, then this file.
"""

import importlib
import inspect
import re

import pytest
import trl
from packaging.version import Version
from PIL import Image
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler, shuffle_sequence_dict, split_pixel_values_by_grid, split_tensor_dict

from mgpo_trl import MGPOConfig, MGPOTrainer
from mgpo_trl.checkpoints import Checkpoints
from mgpo_trl.launch_checks import TRAINER_STATE
from mgpo_trl.processing import OTHER_LAYOUTS
from mgpo_trl.round_options import RoundOptions

OURS = {**vars(Checkpoints), **vars(MGPOTrainer)}
"""Attributes of the trainer that are written here."""
SIGNATURES = {
    "_generate_and_score_completions": ["inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_tokenize_prompts": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_generate": ["prompts"],
    "_tool_call_loop": [
        "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images", "multimodal_fields",
    ],
    "_compute_loss": ["model", "inputs"],
    "get_high_entropy_mask": ["entropies", "mask", "threshold"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_train_sampler": ["dataset"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
    "create_model_card": ["model_name", "dataset_name", "tags"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
}  # fmt: skip
LOGPS = ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
LOGPS_IMAGES = {"pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids"}


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def source(function):
    """Source with every run of blanks as one, so that a reformatting is no change."""
    return re.sub(r"\s+", " ", inspect.getsource(function))


def test_the_version_is_the_pinned_one():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert parameters(getattr(GRPOTrainer, name)) == SIGNATURES[name], f"GRPOTrainer.{name} changed its parameters"


def test_our_overrides_take_what_theirs_take():
    ours = [name for name in SIGNATURES if name in OURS]
    assert set(SIGNATURES) == set(ours)
    for name in ours:
        assert parameters(OURS[name]) == SIGNATURES[name], name


def test_every_private_override_is_listed_here():
    inherited = {name for name in OURS if name.startswith("_") and hasattr(GRPOTrainer, name)}
    dunder = {name for name in inherited if name.startswith("__")}
    known = {
        *SIGNATURES,
        "_get_per_token_logps_and_entropies",
        "_tag_names",
        "_name",
        "_paper",
        "_init_training_state",
    }
    assert inherited - dunder - {"_abc_impl"} <= known


def test_the_log_probability_pass():
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[: len(LOGPS)] == LOGPS and LOGPS_IMAGES <= set(names)
    text = source(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "return logps, entropies, aux_loss" in text
    assert "compute_entropy=True" in source(GRPOTrainer._compute_loss), "the loss pass no longer asks for the entropy"


def test_the_buffer_of_micro_batches():
    """`_prepare_inputs` is written again to keep groups together: these are the lines that it follows."""
    text = source(GRPOTrainer._prepare_inputs)
    for line in (
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "generation_batch = split_pixel_values_by_grid(generation_batch) "
        "generation_batch = shuffle_sequence_dict(generation_batch) "
        "generation_batches = split_tensor_dict(generation_batch, self.args.steps_per_generation) "
        "self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in generation_batches]",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert line in text, f"GRPOTrainer._prepare_inputs no longer has: {line}"


def test_generation_hands_over_what_we_return():
    text = source(GRPOTrainer._generate)
    assert "prompt_ids, images, multimodal_fields = self._tokenize_prompts(prompts)" in text
    order = "( tool_mask, completions, completion_ids, logprobs, tool_call_count, tool_failure_count, tool_images, )"
    assert f"{order} = self._tool_call_loop(" in text, "the tuple of _tool_call_loop changed"
    result = "prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images"
    assert f"return {result}" in text, "the tuple of _generate changed"
    assert "return completion_ids, logprobs" in source(GRPOTrainer._generate_single_turn)
    for name in ("tools/call_frequency", "tools/failure_frequency"):
        assert name in text, f"the metric {name}, which we remove, has another name"


def test_images_of_later_turns_become_tensors():
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "if self.tools and any(imgs for imgs in tool_images) and self._is_vlm:" in text
    assert "images = [(existing or []) + new for existing, new in zip(images, tool_images" in source(
        GRPOTrainer._generate
    )
    for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images", "tool_mask", "advantages"):
        assert f'"{key}"' in text, f"the batch no longer has {key}"


OTHER_FAMILIES = {
    "gemma3": ("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil", {"num_crops"}, (4, 3, 224, 224)),
    "internvl": (
        "got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil", {"num_patches"}, (4, 3, 384, 384)
    ),
    "smolvlm": ("smolvlm.image_processing_pil_smolvlm", "SmolVLMImageProcessorPil", set(), (1, 56, 3, 364, 364)),
    "idefics3": ("idefics3.image_processing_pil_idefics3", "Idefics3ImageProcessorPil", set(), (1, 56, 3, 364, 364)),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_LAYOUTS)
def test_why_other_image_layouts_are_refused(family):
    """
    Where images join during the rollout, TRL calls the image processor with the images of the whole batch and hands
    everything that it returns to the log-probability pass. For Gemma 3 and InternVL that is an argument which the pass
    does not have; for SmolVLM and Idefics3 it is one row for the whole batch, which it cuts by sample. A failure here
    means that TRL or transformers may carry the family now.
    """
    source_of_images = source(GRPOTrainer._generate_and_score_completions)
    assert 'self.processing_class.image_processor(images=flat_images, return_tensors="pt")' in source_of_images
    assert "forward_kwargs = dict(image_inputs)" in source_of_images
    module, name, refused, shape = OTHER_FAMILIES[family]
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)()
    images = [Image.new("RGB", size) for size in ((400, 200), (60, 60), (300, 300), (50, 80))]  # of two samples
    output = processor(images=images, return_tensors="pt")
    taken = set(parameters(GRPOTrainer._get_per_token_logps_and_entropies))
    assert set(output) - taken == refused and tuple(output["pixel_values"].shape) == shape
    assert refused or (len(output["pixel_values"]) == 1 and "pixel_values[start:end]" in source(
        GRPOTrainer._get_per_token_logps_and_entropies
    ))  # fmt: skip


def test_the_loss_reads_the_mask_that_we_put_there():
    text = source(GRPOTrainer._compute_loss)
    assert 'completion_mask * inputs["tool_mask"]' in text
    assert 'inputs["num_items_in_batch"]' in text and 'inputs.get("old_per_token_logps")' in text
    assert "self.max_completion_length" in text, "the normaliser of dr_grpo moved"
    assert "self.get_gamma_weights( advantages=advantages," in text, "VESPO's weights are asked for in another way"
    assert "mask" in parameters(GRPOTrainer.get_gamma_weights)


def test_reward_functions_receive_the_extra_fields():
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "inp[key] = values[i]" in text
    rewards = source(GRPOTrainer._calculate_rewards)
    assert 'key not in ["prompt", "completion", "completion_ids"]' in rewards
    assert "rewards_per_func = gather(rewards_per_func)" in rewards, (
        "The watcher expects the rewards of all processes, in order."
    )
    assert "advantages = advantages[process_slice]" in text, "The watcher expects this process's advantages."


def test_the_batch_travels_whole():
    """Extra tensors of shape (B, ...) are shuffled and split with the rest."""
    text = source(GRPOTrainer._prepare_inputs)
    for function in (split_pixel_values_by_grid, shuffle_sequence_dict, split_tensor_dict):
        assert f"{function.__name__}(" in text


def test_attributes_that_we_set_after_init():
    text = source(GRPOTrainer.__init__)
    names = ["tools", "mask_truncated_completions", "max_completion_length", "eos_token_ids", "generation_kwargs"]
    for name in [*names, "generation_config", "vllm_generation", "epsilon_low", "epsilon_high", "beta", "use_vllm"]:
        assert f"self.{name} =" in text, f"GRPOTrainer no longer sets {name}"
    assert 'generation_kwargs["suppress_tokens"]' in text


def test_the_sampler_that_we_wrap():
    assert {"generator", "seed", "shuffle"} <= set(vars(RepeatSampler([0], 1, seed=3)))
    assert isinstance(GRPOTrainer._get_train_sampler, type(test_signatures))
    assert parameters(RepeatSampler) == [
        "data_source",
        "mini_repeat_count",
        "batch_size",
        "repeat_count",
        "shuffle",
        "seed",
    ]


def test_a_resumed_run_tells_how_many_batches_of_its_epoch_are_done():
    text = source(Trainer)
    assert "epochs_trained, steps_trained_in_current_epoch = self._init_training_state(" in text
    assert "return epochs_trained, steps_trained_in_current_epoch" in text
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source(GRPOTrainer._prepare_inputs)


def test_a_card_is_written_with_every_checkpoint_and_before_every_push():
    assert "self.create_model_card(model_name=model_name) super()._save_checkpoint" in source(GRPOTrainer)
    text = source(Trainer.push_to_hub)
    assert text.index("self.save_model(_internal_call=True)") < text.index("self.create_model_card(")
    assert text.index("self.create_model_card(") < text.index("upload_folder(")
    assert "self.push_in_progress.jobs.extend(push_jobs)" in source(Trainer._push_from_checkpoint)


def test_full_weights_are_loaded_where_we_step_in():
    assert "_load_from_checkpoint(resume_from_checkpoint" in source(Trainer)
    assert "self._load_best_model()" in source(Trainer)


def test_the_state_is_the_last_file_of_a_checkpoint():
    text = source(Trainer._save_checkpoint)
    steps = ["self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_rng_state(", "save_to_json("]
    places = [text.index(step) for step in steps]
    assert places == sorted(places) and TRAINER_STATE == TRAINER_STATE_NAME
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in text and PREFIX_CHECKPOINT_DIR == "checkpoint"


def test_the_config_still_has_what_ours_builds_on():
    theirs = set(GRPOConfig.__dataclass_fields__)
    needed = {"beta", "max_completion_length", "lr_scheduler_type", "mask_truncated_completions", "num_generations"}
    assert needed | {"generation_batch_size", "use_bias_correction_kl"} <= theirs
    ours = set(RoundOptions.__dataclass_fields__) | set(vars(MGPOConfig)["__annotations__"])
    shared = {"beta", "max_completion_length", "lr_scheduler_type"}
    assert ours & theirs == shared, "TRL has an option of the same name as one of ours now"


def test_vllm_is_built_from_names_that_we_replace():
    assert "self.vllm_generation = VLLMGeneration(" in source(GRPOTrainer.__init__)
    text = source(VLLMGeneration._init_vllm)
    assert "self.llm = LLM(" in text and "self.vllm_client = VLLMClient( base_url=base_url" in text
    assert "limit_mm_per_prompt" not in text and "mm_processor_kwargs" not in text, "TRL sets these by itself now"


def test_vllm_is_asked_where_we_step_in():
    assert parameters(VLLMGeneration.generate) == ["prompts", "images", "num_generations", "profiler"]
    assert parameters(VLLMGeneration._place_features) == ["features", "prompt_ids"]
    text = source(VLLMGeneration.generate)
    assert "return prompt_ids, completion_ids, logprobs, logprob_token_ids" in text
    assert "ordered_set_of_prompt_ids = all_prompts[::num_generations]" in text
    assert "zip(features, ordered_set_of_prompt_ids, strict=True)" in text, "features are placed in another order"
    assert 'row = {"prompt_token_ids": ids}' in text
    assert "encoder" not in source(VLLMGeneration.sync_weights), "TRL drops image features by itself now"
    for name in ("image_features", "generate", "reset_prefix_cache", "update_named_params", "_finish_weight_update"):
        assert callable(getattr(VLLMClient, name)), name
    assert "self._finish_weight_update()" in source(VLLMClient.update_named_params)
    assert "self.session.mount(" in source(VLLMClient.__init__)


def test_a_token_without_a_sampling_log_probability_has_no_part_in_ratios():
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "per_token_logps_diff = torch.nan_to_num(per_token_logps_diff, nan=0.0)" in text
    assert "delta = delta[mask & ~torch.isnan(delta)]" in text
    assert "kl_div = torch.nan_to_num(kl_div, nan=0.0)" in source(GRPOTrainer.get_off_policy_mask)
