"""LoRA and QLoRA: what is trained, what stays, and an adapter that is saved, reloaded, resumed and merged."""

import json
import logging
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel
from trl import ModelConfig

from mgpo_trl import scripts
from mgpo_trl.adapters import (
    check_adapter_options,
    is_adapter,
    lora_config,
    quantization_config,
    target_modules,
)
from mgpo_trl.evaluation.arguments import EvalArguments
from mgpo_trl.evaluation.runner import run_evaluation
from mgpo_trl.generation import ModelGenerator, load_for_inference
from mgpo_trl.merging import merge_adapter
from mgpo_trl.records import read_rollouts
from mgpo_trl.rollout import run_rounds, start_rollouts

BOTH = sorted(FAMILIES)
PIXELS = {"max_pixels": 96 * 96, "min_pixels": 56 * 56}
FOUR_BITS = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True, use_peft=True)


def lora(lora_on=("language",), rank=4):
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target_modules(lora_on), task_type="CAUSAL_LM")


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before, model):
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


def linear_layers(model):
    """Names of the linear layers of each group, found by class and place rather than by our patterns."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    return {
        "language": {name for name in names if ".language_model." in name},
        "projector": {name for name in names if "merger" in name},
        "vision": {name for name in names if ".visual." in name and "merger" not in name},
    }


# where an adapter goes


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("lora_on", [["language"], ["projector"], ["vision"], ["vision", "projector", "language"]])
def test_every_linear_layer_of_a_group_and_no_other(family_dir, family, lora_on):
    model = AutoModelForImageTextToText.from_pretrained(family_dir(family))
    layers = linear_layers(model)
    assert all(layers.values())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=target_modules(lora_on))).targeted_module_names
    assert set(adapted) == set().union(*(layers[group] for group in lora_on))


@pytest.mark.parametrize("lora_on", [[], ["vision", "head"]])
def test_a_group_that_does_not_exist_is_refused(lora_on):
    with pytest.raises(ValueError, match=r"`lora_on` must name some of \['language', 'projector', 'vision'\], got"):
        target_modules(lora_on)


def test_the_language_layers_are_the_default_and_named_targets_win():
    assert lora_config(ModelConfig()) is None
    assert lora_config(ModelConfig(use_peft=True)).target_modules == target_modules(["language"])
    assert lora_config(ModelConfig(use_peft=True), ["vision"]).target_modules == target_modules(["vision"])
    named = ["q_proj", "v_proj"]
    assert lora_config(ModelConfig(use_peft=True, lora_target_modules=named)).target_modules == set(named)


ON_ITS_OWN = {"lora_target_modules": ["q_proj"], "use_peft": True}


@pytest.mark.parametrize(
    "model_options, lora_on, adapter, message",
    [
        ({"load_in_4bit": True}, None, None, "Weights in 4 bits can not be trained. Add `--use_peft`"),
        ({"load_in_8bit": True}, None, None, "Weights in 8 bits can not be trained. Add `--use_peft`"),
        ({}, ["language"], None, "`--lora_on` says where a new adapter goes. Give `--use_peft`"),
        ({"use_peft": True}, ["head"], None, "`lora_on` must name some of"),
        (ON_ITS_OWN, ["language"], None, "Give `--lora_on` or `--lora_target_modules`"),
        (
            {"load_in_4bit": True, "use_peft": True, "dtype": "auto"}, None, None,
            "computed in the precision that `--dtype` names, got 'auto'. Give `--dtype bfloat16`",
        ),
        ({}, None, "nowhere", "`--adapter` must be a directory or Hub id with `adapter_config.json`, got 'nowhere'"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_are_refused(model_options, lora_on, adapter, message):
    with pytest.raises(ValueError, match=message):
        check_adapter_options(ModelConfig(**model_options), lora_on, adapter)


def test_good_options_pass(adapter_dir):
    check_adapter_options(ModelConfig(), None, None)
    check_adapter_options(ModelConfig(use_peft=True, load_in_4bit=True), ["language", "vision"], None)
    check_adapter_options(ModelConfig(load_in_4bit=True), None, str(adapter_dir("qwen2_5_vl")))


@pytest.mark.parametrize("family", BOTH)
def test_what_is_kept_in_4_bits(family_dir, family):
    """Every linear layer of the language model and nothing else: neither the vision tower nor the head."""
    config = quantization_config(FOUR_BITS)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    model = AutoModelForImageTextToText.from_pretrained(family_dir(family), quantization_config=config)
    small = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    plain = AutoModelForImageTextToText.from_pretrained(family_dir(family))
    assert small == linear_layers(plain)["language"]
    tower = weights(plain.model.visual)
    assert not changed(tower, model.model.visual)
    assert quantization_config(ModelConfig()) is None


# training


@pytest.mark.parametrize(
    "family, lora_on, four_bits, checkpointing",
    [
        ("qwen2_5_vl", ["language"], False, True),
        ("qwen2_5_vl", ["language"], True, True),
        ("qwen2_5_vl", ["projector", "vision"], False, False),
        ("qwen3_vl", ["language"], True, False),
        ("qwen3_vl", ["language", "projector"], False, True),
        ("qwen3_vl", ["vision"], True, True),
    ],
)
def test_only_the_adapter_moves(make_trainer, family_dir, monkeypatch, family, lora_on, four_bits, checkpointing):
    loads, load = [], PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda kind, path, *args, **kwargs: loads.append(path) or load(kind, path, *args, **kwargs)),
    )
    options = {"quantization_config": quantization_config(FOUR_BITS)} if four_bits else {}
    trainer = make_trainer(
        model=family_dir(family), kwargs={"peft_config": lora(lora_on), **options}, beta=0.01, max_steps=2,
        gradient_checkpointing=checkpointing, **PIXELS,
    )  # fmt: skip
    before = weights(trainer.model)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    layers = linear_layers(AutoModelForImageTextToText.from_pretrained(family_dir(family)))
    wanted = set().union(*(layers[group] for group in lora_on))
    assert {name.split("base_model.model.")[1].split(".lora_")[0] for name in trainable} == wanted
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved == trainable
    if "vision" not in lora_on and "projector" not in lora_on:
        assert not any(".visual." in name for name in moved)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.ref_model is None and loads.count(str(family_dir(family))) == 1  # the reference is no second model
    assert abs(logs[0]["kl"]) < 1e-6 < logs[1]["kl"]


def test_the_reference_is_the_model_without_its_adapter(make_trainer, tiny_dir, photos, script):
    """Once the adapter has an effect, the KL term measures it against the base model's own log-probabilities."""
    from scripted import ANSWER, box_text, generate, group_rows, photos_dataset

    adapted = make_trainer(photos_dataset(photos), kwargs={"peft_config": lora()}, beta=0.01)
    for name, value in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    plain = make_trainer(photos_dataset(photos), beta=0.01)
    turns = group_rows(photos[:1]), [box_text(0), "no"], [ANSWER, ANSWER]
    one, other = (generate(trainer, script, *turns)[0] for trainer in (adapted, plain))
    assert torch.allclose(one["ref_per_token_logps"], other["ref_per_token_logps"], atol=1e-5)
    adapted.current_gradient_accumulation_steps = 1
    adapted._compute_loss(adapted.model, one)
    assert adapted._metrics["train"]["kl"][-1] > 1e-3


@pytest.mark.parametrize("lora_on, graph", [(["language"], False), (["vision"], True)])
def test_a_frozen_vision_tower_runs_without_a_graph(make_trainer, lora_on, graph):
    """With gradient checkpointing, TRL and PEFT would have it kept and differentiated for nothing."""
    trainer = make_trainer(kwargs={"peft_config": lora(lora_on)}, gradient_checkpointing=True)
    seen = []
    (tower,) = [module for name, module in trainer.model.named_modules() if name.endswith(".visual")]
    tower.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.requires_grad))
    trainer.train()
    assert any(seen) == graph and seen


# going on from an adapter


@pytest.fixture(scope="session")
def adapter_dir(family_dir, tmp_path_factory, rows):
    """`adapter_dir(family, four_bits)`: an adapter with an effect, saved by a trainer; trained in 4 bits or not."""
    from mgpo_trl import MGPOConfig, MGPOTrainer

    made = {}

    def directory(family, four_bits=False):
        if (family, four_bits) not in made:
            out = tmp_path_factory.mktemp(f"adapter-{family}")
            args = MGPOConfig(
                str(out), round_token_budgets=[10, 4], num_generations=2, per_device_train_batch_size=4,
                learning_rate=3e-2, max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", **PIXELS,
            )  # fmt: skip
            quantization = quantization_config(FOUR_BITS) if four_bits else None
            trainer = MGPOTrainer(
                str(family_dir(family)), lambda completions, **kwargs: [0.0, 1.0] * (len(completions) // 2), args,
                train_dataset=rows, peft_config=lora(), quantization_config=quantization,
            )  # fmt: skip
            trainer.train()
            trainer.save_model(str(out))
            made[family, four_bits] = out
        return made[family, four_bits]

    return directory


def lora_weights(model, adapter="default"):
    marker = f".{adapter}."
    return {
        name.replace(marker, "."): value.detach().clone() for name, value in model.named_parameters() if marker in name
    }


def same(one, other):
    assert one.keys() == other.keys() and one
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_new_run_goes_on_from_an_adapter(make_trainer, adapter_dir, tiny_dir, tmp_path, caplog, four_bits):
    """The adapter keeps training, a frozen copy of it is the reference, and the base is loaded once."""
    adapter = adapter_dir("qwen2_5_vl", four_bits)
    options = {"quantization_config": quantization_config(FOUR_BITS)} if four_bits else {}
    with caplog.at_level(logging.INFO, logger="mgpo_trl.adapters"):
        trainer = make_trainer(model=adapter, beta=0.01, max_steps=2, save_strategy="steps", save_steps=1,
                               kwargs=options, **PIXELS)  # fmt: skip
    assert f"goes on with the adapter '{adapter}' (r=4, alpha=8)" in caplog.text
    start = lora_weights(trainer.model)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert same(start, saved)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    trainer.train()
    assert trainer.ref_model is None and same(lora_weights(trainer.model, "ref"), start)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert abs(logs[0]["kl"]) < 1e-5 < logs[1]["kl"]
    final = lora_weights(trainer.model)
    assert not same(final, start)
    resumed = make_trainer(model=adapter, beta=0.01, max_steps=2, kwargs=options, **PIXELS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(lora_weights(resumed.model), final) and same(lora_weights(resumed.model, "ref"), start)


def test_a_4_bit_run_that_was_stopped_ends_where_the_whole_one_does(make_trainer, tmp_path):
    kwargs = {"peft_config": lora(), "quantization_config": quantization_config(FOUR_BITS)}
    options = {"beta": 0.01, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), kwargs=kwargs, **options)
    start = lora_weights(whole.model)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), kwargs=kwargs, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert not same(start, lora_weights(whole.model)) and same(lora_weights(whole.model), lora_weights(resumed.model))


@pytest.mark.parametrize("how", ["--model_name_or_path", "--adapter", "both"])
def test_the_command_line_starts_from_an_adapter(adapter_dir, family_dir, tmp_path, how):
    adapter, base = str(adapter_dir("qwen3_vl")), str(family_dir("qwen3_vl"))
    named = ["--model_name_or_path", base, "--adapter", adapter] if how == "both" else [how, adapter]
    common = ["--dataset_name", "builtin:refer", "--limit", "4", "--output_dir", str(tmp_path / "run"), "--max_steps",
              "1", "--num_generations", "2", "--per_device_train_batch_size", "4", "--max_pixels", "9216"]  # fmt: skip
    script_args, args, model_args = scripts.parse_training([*named, *common])
    assert not scripts.is_builtin_run(script_args, model_args)
    train, _ = scripts.open_training_sets(script_args, args)
    trainer = scripts.build_trainer(script_args, args, model_args, train, None)
    saved = load_file(adapter_dir("qwen3_vl") / "adapter_model.safetensors")
    assert same(lora_weights(trainer.model), saved)
    assert trainer.model.config._name_or_path == base
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert adapter in (run["config"]["script"]["adapter"], run["config"]["model"]["model_name_or_path"])


def test_two_adapters_are_refused(adapter_dir):
    adapter = str(adapter_dir("qwen2_5_vl"))
    with pytest.raises(ValueError, match="are adapters. Name the base model in `--model_name_or_path`"):
        scripts.starting_point(SimpleNamespace(adapter=adapter), SimpleNamespace(model_name_or_path=adapter))


# merging and evaluation


def play(model, processor, conversation, rows):
    """Greedy rollouts of some rows: the sampled ids of every turn."""
    template = conversation.template(processor, model.config.model_type)
    rollouts = start_rollouts(list(rows), template, 2)
    run_rounds(rollouts, ModelGenerator(model, template.chat, [12, 8]), template)
    return [[turn.ids for turn in rollout.turns] for rollout in rollouts]


@pytest.mark.parametrize("family, four_bits", [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False)])
def test_the_merged_model_plays_as_the_adapter_does(adapter_dir, family_dir, rows, tmp_path, family, four_bits):
    from mgpo_trl.conversation import Conversation

    adapter = adapter_dir(family, four_bits)
    conversation = Conversation.load(adapter)
    merged_dir = merge_adapter(adapter, tmp_path / "merged")
    assert not is_adapter(str(merged_dir)) and Conversation.load(merged_dir) == conversation
    merged, processor = load_for_inference(str(merged_dir), device="cpu")
    assert not isinstance(merged, PeftModel) and processor.image_processor is not None
    base = AutoModelForImageTextToText.from_pretrained(family_dir(family)).eval()
    plain = play(base, processor, conversation, rows)
    apart = play(PeftModel.from_pretrained(base, adapter).eval(), processor, conversation, rows)
    assert play(merged, processor, conversation, rows) == apart != plain


def test_evaluation_of_base_and_adapter_equals_that_of_the_merged_model(adapter_dir, family_dir, rows, tmp_path):
    from mgpo_trl.data import LoadedRows

    adapter = adapter_dir("qwen3_vl")
    merged = merge_adapter(adapter, tmp_path / "merged")
    named = {
        "both": {"model": str(family_dir("qwen3_vl")), "adapter": str(adapter)},
        "adapter": {"model": str(adapter)},
        "merged": {"model": str(merged)},
        "base": {"model": str(family_dir("qwen3_vl")), "max_pixels": "9216", "min_pixels": "3136"},
    }
    found = {}
    for name, models in named.items():
        out = str(tmp_path / name)
        args = EvalArguments(dataset="rows", output_dir=out, token_budgets=[12, 8], device="cpu", **models)
        run_evaluation(args, LoadedRows(rows, [], "rows"))
        found[name] = list(read_rollouts(out))
    assert found["both"] == found["adapter"] == found["merged"] != found["base"]


def test_precision_of_the_merged_weights(adapter_dir, tmp_path):
    merge_adapter(adapter_dir("qwen2_5_vl"), tmp_path / "half", dtype="bfloat16")
    dtypes = {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_merging_into_4_bits_would_lose_the_adapter(adapter_dir, tiny_dir, rows):
    """Why `merge_adapter` takes the full-precision base: the rounding moves weights by more than a small adapter."""
    adapter = adapter_dir("qwen2_5_vl", True)
    name = "model.language_model.layers.0.mlp.down_proj"
    full = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    before = full.get_submodule(name).weight.detach().clone()
    layer = PeftModel.from_pretrained(full, adapter).base_model.model.get_submodule(name)
    delta = layer.get_delta_weight("default").detach()
    exact = PeftModel.from_pretrained(full, adapter).merge_and_unload().get_submodule(name).weight
    assert torch.allclose(exact, before + delta, atol=1e-6)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
    small = AutoModelForImageTextToText.from_pretrained(tiny_dir, quantization_config=config)
    rounded = PeftModel.from_pretrained(small, adapter).merge_and_unload().get_submodule(name)
    weight = bnb.functional.dequantize_4bit(rounded.weight.data, rounded.weight.quant_state)
    assert (weight - (before + delta)).abs().mean() > 0.5 * delta.abs().mean()


def test_a_base_in_4_bits_keeps_the_adapter_beside_it_and_is_not_merged_into(adapter_dir, tiny_dir, tmp_path):
    config = quantization_config(FOUR_BITS)
    small = AutoModelForImageTextToText.from_pretrained(tiny_dir, quantization_config=config)
    small.save_pretrained(tmp_path / "small")
    adapter, base = str(adapter_dir("qwen2_5_vl")), str(tmp_path / "small")
    with pytest.raises(ValueError, match="is stored in 4 or 8 bits.*Give the full-precision model"):
        merge_adapter(adapter, tmp_path / "merged", base_model=base)
    model, _ = load_for_inference(adapter, base)
    assert isinstance(model, PeftModel) and not model.training


def test_merging_refuses_what_it_can_not_do(adapter_dir, tiny_dir, tmp_path):
    for nothing in (tiny_dir, "./outputs/nowhere", "nobody/there"):
        with pytest.raises(ValueError, match=f"There is no adapter in '{nothing}'"):
            merge_adapter(nothing, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty. Give a new directory"):
        merge_adapter(adapter_dir("qwen2_5_vl"), tmp_path / "full")


def test_an_adapter_that_names_no_base_is_refused(adapter_dir, tmp_path):
    for file in adapter_dir("qwen2_5_vl").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say what it was trained on. Name the base model too"):
        merge_adapter(tmp_path, tmp_path / "merged")
