"""The memory estimate: counted parts equal the real thing on a small model, and options move the right parts."""

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText
from trl import ModelConfig

from mgpo_trl import MGPOConfig
from mgpo_trl.adapters import target_modules
from mgpo_trl.layouts import LAYOUTS, layout_config
from mgpo_trl.memory import GIB, MemoryEstimate, MemoryOptions, estimate_memory, estimate_run, launch, warn_of_memory
from mgpo_trl.memory.simulate import LiveBytes, attend_through_probe, language_pass
from mgpo_trl.memory.weights import count_weights, optimizer_bytes, quantized_bytes
from mgpo_trl.scripts import configuration_of

QWEN_3B, QWEN_7B = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"


def lora(rank=8):
    return LoraConfig(r=rank, target_modules=target_modules(["language"]), task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def config_7b():
    return layout_config(QWEN_7B)


# What is counted


@pytest.mark.parametrize("name, parameters", [(QWEN_3B, 3_754_622_976), (QWEN_7B, 8_292_166_656)])
def test_layouts_have_the_published_number_of_parameters(name, parameters):
    assert count_weights(layout_config(name), MemoryOptions()).trained == parameters


def test_every_layout_is_of_a_supported_family_and_others_are_named():
    assert {layout_config(name).model_type for name in LAYOUTS} <= set(FAMILIES)
    with pytest.raises(ValueError, match="There is no layout of 'nobody/none'. Known"):
        layout_config("nobody/none")


@pytest.mark.parametrize("double", [False, True])
def test_quantised_bytes_equal_those_of_bitsandbytes(double):
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compress_statistics=double, quant_type="nf4")
    layer = layer.to("cpu")  # quantises
    state = layer.weight.quant_state
    tensors = [layer.weight.data, state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert quantized_bytes(256 * 512, MemoryOptions(bits=4, double_quant=double)) == real


def test_weights_gradients_and_optimizer_equal_those_of_a_real_step(tiny_dir):
    config = AutoConfig.from_pretrained(tiny_dir)
    counted = count_weights(config, MemoryOptions(lora=lora(), dtype="float32"))
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny_dir, dtype=torch.float32), lora())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # noqa: E731
    assert counted.adapter == counted.gradients == size(trained)
    assert counted.base == size(parameter for parameter in model.parameters() if not parameter.requires_grad)
    assert counted.optimizer == size(states)


def test_a_saved_adapter_is_counted_as_it_is_trained(tiny_dir, tmp_path):
    """Saved adapters say that they are for inference; going on from one trains it, beside a frozen copy of it."""
    config, args = AutoConfig.from_pretrained(tiny_dir), MGPOConfig(str(tmp_path / "run"), report_to="none")
    get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny_dir), lora()).save_pretrained(tmp_path / "adapter")
    _, saved = configuration_of(str(tiny_dir), str(tmp_path / "adapter"), args, ModelConfig())
    new = estimate_run(config, args, ModelConfig(), lora=lora()).parts
    further = estimate_run(config, args, ModelConfig(), lora=saved).parts
    assert further == new and further["adapter"] > 0 < further["optimizer"]
    assert further["reference"] == further["adapter"]
    args.beta = 0.0
    assert estimate_run(config, args, ModelConfig(), lora=saved).parts["reference"] == 0


def test_the_tower_is_trained_where_an_adapter_lies_on_it(tiny_dir):
    config = AutoConfig.from_pretrained(tiny_dir)

    def vision(*targets):
        adapter = LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM")
        return estimate_memory(config, MemoryOptions(lora=adapter, checkpointing=False)).parts["vision activations"]

    assert vision("q_proj", "up_proj") > 2 * vision("q_proj")  # of the tower, too: its attention has no `q_proj`


def test_optimizers():
    weights = torch.nn.Parameter(torch.empty(8192, dtype=torch.bfloat16))
    by_name = {name: optimizer_bytes(weights, MemoryOptions(optimizer=name)) for name in ("adamw_torch", "sgd")}
    assert by_name == {"adamw_torch": 2 * 2 * 8192 + 4, "sgd": 0}
    assert optimizer_bytes(weights, MemoryOptions(optimizer="paged_adamw_8bit")) == 2 * (8192 + 4 * 32)
    assert optimizer_bytes(weights, MemoryOptions(zero_stage=2)) == 12 * 8192


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_simulated_pass_holds_what_a_real_one_holds(tiny_dir, checkpointing):
    """Real tensors with torch's own attention against meta tensors with ours, on the language layers."""
    config = AutoConfig.from_pretrained(tiny_dir)

    def real():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def simulated(shape):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape, dtype=torch.float32)
        attend_through_probe(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        return model

    model = real()
    text, hidden = model.model.language_model, torch.randn(2, 300, config.text_config.hidden_size, requires_grad=True)
    positions = torch.arange(300).expand(3, 2, -1)
    with LiveBytes([*model.parameters(), *model.buffers(), hidden]) as live:
        output = text(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state
        held = live.current + hidden.numel() * 4
        output.sum().backward()
    assert language_pass(config, simulated, 2, 300, train=True).held == pytest.approx(held, rel=0.15)


# What options do


def test_options_move_the_parts_that_they_should(config_7b):
    full = estimate_memory(config_7b, MemoryOptions(reference=True))
    assert full.parts["weights"] == full.parts["reference"] == full.parts["gradients"] == 2 * 8_292_166_656
    sharded = estimate_memory(config_7b, MemoryOptions(reference=True, zero_stage=3, processes=8))
    assert sharded.parts["weights"] == full.parts["weights"] // 8
    assert estimate_memory(config_7b, MemoryOptions(zero_stage=2, processes=8, offload=True)).parts["optimizer"] == 0
    small = estimate_memory(config_7b, MemoryOptions(lora=lora(), bits=4, double_quant=True))
    assert small.parts["weights"] < 0.45 * full.parts["weights"] and small.parts["reference"] == 0
    kept = estimate_memory(config_7b, MemoryOptions(lora=lora(), checkpointing=False)).parts["activations"]
    assert kept > 5 * estimate_memory(config_7b, MemoryOptions(lora=lora())).parts["activations"]
    assert small.generation > MemoryEstimate({**small.parts, "unpacked layer": 0}).generation
    alone = estimate_memory(config_7b, MemoryOptions(lora=lora(), shares_prefix=False))
    assert small.parts["prefill"] < alone.parts["prefill"] / 2
    server = estimate_memory(config_7b, MemoryOptions(lora=lora(), vllm="server"))
    assert server.parts["KV cache"] == server.parts["prefill"] == 0


def test_a_colocated_vllm_takes_its_share_and_may_sleep(config_7b):
    options = {"lora": lora(), "vllm": "colocate", "vllm_share": 0.25}
    with pytest.raises(ValueError, match="`gpu_bytes` must be given"):
        estimate_memory(config_7b, MemoryOptions(**options))
    awake = estimate_memory(config_7b, MemoryOptions(**options), 80 * GIB)
    asleep = estimate_memory(config_7b, MemoryOptions(**options, vllm_sleeps=True), 80 * GIB)
    assert awake.parts["vLLM"] == 20 * GIB and awake.training - asleep.training == 20 * GIB


def test_a_colocated_vllm_needs_room_for_the_weights(config_7b):
    """It would not start, after the model was loaded. Two GPUs that share an engine hold half of them each."""
    options = {"lora": lora(), "vllm": "colocate", "vllm_share": 0.25}
    starved = estimate_memory(config_7b, MemoryOptions(**options), 48 * GIB)
    assert starved.peak < 48 * GIB and not starved.fits(48 * GIB)
    (line,) = starved.advice(48 * GIB)
    assert "share of 12.0 GiB" in line and "weights, 15.4 GiB" in line and "--vllm_gpu_memory_utilization" in line
    assert estimate_memory(config_7b, MemoryOptions(**options, vllm_parallel=2), 48 * GIB).fits(48 * GIB)
    assert (
        len(estimate_memory(config_7b, MemoryOptions(**options), 24 * GIB).advice(24 * GIB)) > 2
    )  # all that is wrong


def test_advice_names_the_largest_parts_and_what_lowers_them(config_7b):
    full = estimate_memory(config_7b, MemoryOptions(reference=True))
    first, *rest = full.advice(24 * GIB)
    assert "does not fit a GPU of 24 GiB" in first and not full.fits(24 * GIB)
    assert any(line.startswith("optimizer takes") and "--use_peft true" in line for line in rest)
    small = estimate_memory(config_7b, MemoryOptions(lora=lora(), bits=4, double_quant=True))
    assert small.fits(24 * GIB) and "fits a GPU of 24 GiB" in small.advice(24 * GIB)[0]
    assert "peak of training" in small.table() and "GiB" in small.table()


# The run at hand


def test_the_run_at_hand(config_7b, tmp_path, caplog, monkeypatch):
    args = MGPOConfig(str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=8, report_to="none")
    model_args = ModelConfig(use_peft=True, load_in_4bit=True, use_bnb_nested_quant=True)
    whole = estimate_run(config_7b, args, model_args)
    assert whole.parts["reference"] == 0 < whole.parts["adapter"]
    assert estimate_run(config_7b, args, model_args, max_pixels=28 * 28 * 64).peak < whole.peak
    assert warn_of_memory(config_7b, args=args, model_args=model_args) is None  # no GPU here
    monkeypatch.setattr(launch, "device_bytes", lambda: 8 * GIB)
    with caplog.at_level("WARNING"):
        assert warn_of_memory(config_7b, args=args, model_args=model_args).parts == whole.parts
    assert "does not fit a GPU of 8 GiB" in caplog.text
    monkeypatch.setattr(launch, "estimate_memory", lambda *args: 1 / 0)
    assert warn_of_memory(config_7b, args=args, model_args=model_args) is None
    assert "Memory was not estimated: ZeroDivisionError" in caplog.text
