"""What a launch can not do is refused with the alternative named; what it can do passes."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from mgpo_trl import MGPOConfig
from mgpo_trl.builtin import run
from mgpo_trl.launch_checks import (
    check_launch,
    check_quantized,
    check_resume,
    check_whole_models,
    checkpoint_engine,
    warn_of_lost_updates,
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def zero(stage, **more):
    return SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": {"stage": stage, **more}})


def of_type(kind):
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """`config(world_size=..., name=value)`: options as they are after the launcher did its part."""

    def make(world_size=1, *, set_later=None, **options):
        args = MGPOConfig(str(tmp_path), **options)
        monkeypatch.setattr(MGPOConfig, "world_size", world_size)
        for name, value in (set_later or {}).items():
            setattr(args, name, value)
        return args

    return make


def test_usual_launches_pass(config):
    check_launch(config(), environment={})
    check_launch(config(), environment={"ACCELERATE_MIXED_PRECISION": "no"})
    check_launch(config(8), environment={"MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "8"})
    whole = {"stage3_gather_16bit_weights_on_model_save": True}
    check_launch(config(8, set_later={"deepspeed_plugin": zero(3, **whole)}), environment=DEEPSPEED)
    check_launch(config(8, set_later={"distributed_state": of_type("MULTI_GPU")}), environment=FSDP)


REFUSED = {
    "one of two processes": (
        {}, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, r"one was started.*multi_gpu\.yaml",
    ),
    "DeepSpeed turned off": (
        {}, {**DEEPSPEED, "ACCELERATE_USE_CPU": "true"}, "plain data parallelism would run.*`--use_cpu true`",
    ),
    "DeepSpeed without a launcher": (
        {"deepspeed": "zero3.json"}, {}, r"`deepspeed` \(zero3\.json\).*--config_file ds_configs/zero3\.yaml",
    ),
    "shards that no model loads": (
        {"deepspeed_plugin": zero(3)}, DEEPSPEED, "stage3_gather_16bit_weights_on_model_save.*Set it to true",
    ),
    "FSDP on CPUs": ({}, FSDP, r"shards with it on GPUs only.*zero3\.yaml"),
    "FSDP's shards": (
        {"distributed_state": of_type("MULTI_GPU")},
        {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        "`fsdp_state_dict_type: SHARDED_STATE_DICT`.*Use `FULL_STATE_DICT`",
    ),
    "one sequence on several processes": (
        {}, {"PARALLELISM_CONFIG_CP_SIZE": "2"}, r"`parallelism_config_cp_size: 2`.*ds_configs/zero3\.yaml",
    ),
    "one layer on several processes": ({}, {"PARALLELISM_CONFIG_TP_SIZE": "4"}, "`parallelism_config_tp_size: 4`"),
    "continuous batching": (
        {"use_transformers_continuous_batching": True}, {}, "can not generate with images.*`--use_vllm true`",
    ),
    "no vLLM": ({"use_vllm": True}, {}, r"vLLM is not installed.*pip install -e '\.\[vllm\]'"),
}  # fmt: skip


@pytest.mark.parametrize("later, environment, message", REFUSED.values(), ids=REFUSED)
def test_what_can_not_work_is_refused(config, later, environment, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_launch(config(set_later=later), environment=environment)


def test_colocated_engines_divide_the_processes(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    later = {"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 4}
    check_launch(config(8, set_later=later), environment={})
    with pytest.raises(ValueError, match=r"`vllm_tensor_parallel_size` \(4\) does not divide the 6 processes"):
        check_launch(config(6, set_later=later), environment={})
    check_launch(config(6, set_later={**later, "vllm_mode": "server"}), environment={})


def test_the_trainer_checks_the_launch_before_it_looks_for_the_model(make_trainer, monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match="parallelism_config_sp_size: 2"):
        make_trainer(model="nowhere")


FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True)
STORED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)


def test_fsdp_takes_quantised_weights_that_it_shards(config):
    args = config()
    for quantization, environment in ((None, FSDP), (FOUR_BITS, {}), (FOUR_BITS, DEEPSPEED), (STORED, FSDP)):
        check_quantized(quantization, args, environment=environment)
    with pytest.raises(ValueError, match=r"stored as torch\.uint8 whole.*`--bnb_4bit_quant_storage bfloat16`"):
        check_quantized(FOUR_BITS, args, environment=FSDP)
    with pytest.raises(ValueError, match=r"can not shard weights in 8 bits.*zero2\.yaml"):
        check_quantized(BitsAndBytesConfig(load_in_8bit=True), args, environment=FSDP)


def test_vllm_takes_no_quantised_weights(config):
    args = config(set_later={"use_vllm": True})
    check_quantized(None, args, environment={})
    with pytest.raises(ValueError, match="`use_vllm` needs weights that are not quantised"):
        check_quantized(FOUR_BITS, args, environment={})


def test_the_trainer_checks_the_precision_before_it_looks_for_the_model(make_trainer, monkeypatch):
    monkeypatch.setattr("mgpo_trl.mgpo_trainer.check_launch", lambda args: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="whole on every process"):
        make_trainer(model="nowhere", kwargs={"quantization_config": FOUR_BITS})


def lora():
    return {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}


def test_whole_weights_in_16_bits_are_warned_of(make_trainer, caplog):
    for dtype, kwargs in (("float32", {}), ("bfloat16", lora())):
        make_trainer(model_init_kwargs={"dtype": dtype}, kwargs=kwargs)
    assert "lost to rounding" not in caplog.text
    trainer = make_trainer(model_init_kwargs={"dtype": "bfloat16"})
    assert (
        r"trained in torch.bfloat16" in caplog.text and "(learning rate 0.001). Give `--dtype float32`" in caplog.text
    )
    caplog.clear()
    trainer.args.deepspeed_plugin = zero(2)
    warn_of_lost_updates(trainer.model, trainer.args)
    assert not caplog.text


def test_the_built_in_run_needs_whole_models(config, monkeypatch):
    check_whole_models(config(2, set_later={"deepspeed_plugin": zero(2)}), "It", environment=DEEPSPEED)
    sharded = config(2, set_later={"deepspeed_plugin": zero(3)})
    with pytest.raises(ValueError, match=r"It needs the whole model.*zero2\.yaml"):
        check_whole_models(sharded, "It", environment=DEEPSPEED)
    with pytest.raises(ValueError, match="It needs the whole model"):
        check_whole_models(config(), "It", environment=FSDP)
    monkeypatch.setattr(run, "warm_start", None)
    with pytest.raises(ValueError, match="The built-in run needs the whole model"):
        run.run_builtin(SimpleNamespace(dataset_name="builtin:needle"), sharded, None)


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(*files)`: a directory with these files and a state."""

    def make(*files, state="{}"):
        directory = tmp_path / "checkpoint-2"
        for file in files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).touch()
        if state is not None:
            (directory / "trainer_state.json").write_text(state)
        return directory

    return make


PLAIN = ("model.safetensors", "optimizer.pt")
SHARDS = [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
ENGINES = {"plain": PLAIN, "FSDP": ("pytorch_model_fsdp.bin", "optimizer.bin"), "DeepSpeed": ("latest", *SHARDS)}
LAUNCHED = {
    "plain": ({}, {}),
    "FSDP": ({}, FSDP),
    "DeepSpeed": ({"deepspeed_plugin": zero(2)}, DEEPSPEED),
}


@pytest.mark.parametrize("saved", ENGINES)
@pytest.mark.parametrize("here", LAUNCHED)
def test_a_run_goes_on_from_its_own_engine_only(config, checkpoint, saved, here):
    directory = checkpoint(*ENGINES[saved])
    later, environment = LAUNCHED[here]
    args = config(2, set_later=later)
    assert checkpoint_engine(directory) == saved
    if saved == here:
        check_resume(directory, args, environment=environment)
        return
    with pytest.raises(ValueError, match=f"saved by a {saved} run and this is a {here} run.*`--model_name_or_path`"):
        check_resume(directory, args, environment=environment)


def test_deepspeed_goes_on_with_as_many_processes(config, checkpoint):
    args = config(4, set_later={"deepspeed_plugin": zero(2)})
    with pytest.raises(ValueError, match="saved by 2 processes and this run has 4.*`--num_processes 2`"):
        check_resume(checkpoint(*ENGINES["DeepSpeed"]), args, environment=DEEPSPEED)


@pytest.mark.parametrize("state", [None, '{"epoch'])
def test_a_checkpoint_that_is_not_whole_is_refused(config, checkpoint, state):
    with pytest.raises(ValueError, match="died while saving it.*`--resume_from_checkpoint true`"):
        check_resume(checkpoint(*PLAIN, state=state), config(), environment={})


def test_what_no_checkpoint_holds_is_not_lost_in_silence(config, checkpoint):
    with pytest.raises(ValueError, match=r"no optimizer state \(`save_only_model`\)"):
        check_resume(checkpoint("model.safetensors"), config(), environment={})
    with pytest.raises(ValueError, match="`sync_ref_model` moves the reference model, and no checkpoint holds it"):
        check_resume(checkpoint(*PLAIN), config(sync_ref_model=True), environment={})


def test_the_state_of_an_earlier_run_does_not_vouch_for_half_a_checkpoint(make_trainer, tmp_path, monkeypatch):
    """The step is saved again, into the directory that an earlier run filled, and the run dies on the way."""
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    state = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    assert state.exists()
    again = make_trainer(**options)
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda directory: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again.train()
    assert (state.parent / "model.safetensors").exists() and not state.exists()


def test_the_trainer_itself_resumes_from_whole_checkpoints_only(make_trainer, tmp_path, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=1, max_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = make_trainer(max_steps=2)
    load, loaded = resumed._load_from_checkpoint, []
    monkeypatch.setattr(resumed, "_load_from_checkpoint", lambda path: (loaded.append(path), load(path)))
    resumed.train(resume_from_checkpoint=True)
    assert loaded == [str(tmp_path / "run" / "checkpoint-1")]
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2]
    with pytest.raises(ValueError, match="died while saving it"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        make_trainer(output_dir=str(tmp_path / "empty")).train(resume_from_checkpoint=True)


def test_batches_that_hold_no_whole_groups_name_the_processes(tmp_path):
    with pytest.raises(ValueError, match=r"1 process\(es\), `per_device_train_batch_size` 3.*whole groups"):
        MGPOConfig(str(tmp_path), per_device_train_batch_size=3, num_generations=2, gradient_accumulation_steps=1)
