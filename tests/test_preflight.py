"""The preflight: it finds the largest sample, measures two real steps, and says what is wrong."""

import json

import pytest
import torch
from commands import load_script
from datasets import Dataset
from PIL import Image
from trl import ModelConfig

from mgpo_trl import MGPOConfig
from mgpo_trl.boxes import parse_box
from mgpo_trl.conversation import Conversation
from mgpo_trl.data import LoadedRows
from mgpo_trl.memory import MemoryEstimate
from mgpo_trl.memory.estimate import CUDA_CONTEXT
from mgpo_trl.preflight import run, run_preflight
from mgpo_trl.preflight.report import PreflightReport
from mgpo_trl.preflight.run import small_arguments
from mgpo_trl.preflight.trainer import PreflightTrainer, longest_turn, peak_bytes
from mgpo_trl.preflight.worst_case import find_worst_case
from mgpo_trl.rollout import Sampled, flatten, run_rounds, start_rollouts
from mgpo_trl.scripts import MGPOScriptArguments

BUDGETS = [48, 6]


@pytest.fixture
def options(tmp_path, tiny_dir, photos, monkeypatch):
    """`options(**changes)`: arguments of a run on four photos of different sizes."""
    rows = Dataset.from_list(photos)
    monkeypatch.setattr(run, "open_training_rows", lambda script_args, args: LoadedRows(rows, [], "photos"))

    def make(model=tiny_dir, gpu_gib=None, **changes):
        settings = {
            "max_pixels": 112 * 112, "min_pixels": 56 * 56, "round_token_budgets": BUDGETS, "num_generations": 4,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "report_to": "none", "min_box_side": 4,
            "learning_rate": 1e-2, "max_steps": 30, "gradient_checkpointing": False, **changes,
        }  # fmt: skip
        args = MGPOConfig(str(tmp_path / "run"), **settings)
        return MGPOScriptArguments(preflight=True, preflight_gpu_gib=gpu_gib), args, ModelConfig(str(model))

    return make


def finding(report, name):
    (found,) = [one for one in report.findings if one.name == name]
    return found


# The dataset


def template_of(processor, model_type="qwen2_5_vl"):
    return Conversation(max_pixels=112 * 112, min_pixels=56 * 56).template(processor, model_type)


@pytest.fixture(scope="module")
def template(tiny_dir):
    from transformers import AutoProcessor

    return template_of(AutoProcessor.from_pretrained(tiny_dir))


def test_the_longest_rollout_is_as_long_as_promised(template, photos):
    worst = find_worst_case(photos, template, BUDGETS, quiet=True)
    rollouts = start_rollouts(photos, template, 2)
    args = MGPOConfig("unused", round_token_budgets=BUDGETS, report_to="none")

    def longest(contexts):
        number = contexts[0].round
        return [Sampled(longest_turn(rollout, number, args, template.chat)) for rollout in rollouts]

    run_rounds(rollouts, longest, template, 2)
    lengths = [len(flatten(rollout).ids) for rollout in rollouts]
    assert worst.rows == 4 and worst.longest.tokens in (max(lengths), max(lengths) + 1)  # + 1: a cut turn is closed
    assert worst.longest.index == lengths.index(max(lengths)) and worst.longest.id == f"photo-{worst.longest.index}"
    assert worst.largest.original == (336, 336) and worst.largest.id == "photo-2"
    assert "336x336 (0.1 MP), seen at" in str(worst.largest)
    assert all(rollout.boxes[0].ok for rollout in rollouts)


def test_turned_files_are_measured_upright_and_broken_ones_named(template, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 200)).save(tmp_path / "turned.jpg", exif=exif)
    turned = {**photos[0], "image": {"bytes": None, "path": str(tmp_path / "turned.jpg")}}
    assert find_worst_case([turned], template, BUDGETS, quiet=True).largest.original == (200, 600)
    broken = {**photos[1], "id": "mine", "image": {"bytes": b"no image", "path": None}}
    with pytest.raises(ValueError, match="Row 'mine': the image .*cannot be read as an image"):
        find_worst_case([photos[0], broken], template, BUDGETS, quiet=True)
    with pytest.raises(ValueError, match="The dataset has no rows"):
        find_worst_case([], template, BUDGETS, quiet=True)


def test_longest_turns_use_up_their_budget_and_name_the_whole_view(template, photos):
    (rollout,) = start_rollouts(photos[:1], template, 2)
    args = MGPOConfig("unused", round_token_budgets=BUDGETS, report_to="none")
    first, last = (longest_turn(rollout, number, args, template.chat) for number in (1, 2))
    assert [len(first), len(last)] == BUDGETS and {first[-1], last[-1]} == {template.chat.end_of_turn_id}
    box = parse_box(template.chat.decode(first), rollout.view.size, "absolute", min_side=4)
    assert box.box_view_px == (0, 0, *rollout.view.size)


# The run


def test_a_run_that_is_ready(options, tmp_path, tiny_dir):
    script_args, args, model_args = options(gpu_gib=24.0)
    before = (tiny_dir / "model.safetensors").read_bytes()
    report = run_preflight(script_args, args, model_args)
    assert not report.problems and report.text().endswith("Ready to start.")
    assert finding(report, "dataset").figures["rows"] == 4
    assert "fits a GPU of 24 GiB" in finding(report, "estimate").text
    steps = finding(report, "steps").figures
    assert steps["rollouts"] == 4 and steps["sampled_tokens"] > 0 and steps["image_tokens"] > 0
    logps = finding(report, "log-probs")
    assert "differs from the sampler" in logps.text and logps.figures["most"] < 1e-4
    time = finding(report, "time").figures
    assert time["steps"] == 30 and time["step_seconds"] > 0 and time["longest_loss_seconds"] > 0
    assert finding(report, "boxes").figures["asked"] == 4
    saved = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text())
    assert saved["ready"] and [one["name"] for one in saved["findings"]] == [one.name for one in report.findings]
    assert Image.open(tmp_path / "run" / "preflight" / "boxes.png").width > 800
    assert (tiny_dir / "model.safetensors").read_bytes() == before
    assert args.max_steps == 30 and not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_model_is_left_as_it_was_and_the_largest_sample_is_played(options, monkeypatch):
    trainers, make = [], PreflightTrainer.__init__

    def recorded(self, *args, **kwargs):
        make(self, *args, **kwargs)
        trainers.append((self, {name: value.clone() for name, value in self.model.named_parameters()}))

    monkeypatch.setattr(PreflightTrainer, "__init__", recorded)
    run_preflight(*options(beta=0.1))
    ((trainer, before),) = trainers
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    assert trainer.state.global_step == 2 and {rollout.id for rollout in trainer._played} == {"photo-2"}
    assert [len(turn.ids) for turn in trainer._played[0].turns] == BUDGETS  # the second step


@pytest.mark.parametrize("rounds", [1, 3])
def test_other_numbers_of_rounds(options, rounds):
    report = run_preflight(*options(num_rounds=rounds, round_token_budgets=[40, 40, 6][-rounds:]))
    assert not report.problems and finding(report, "log-probs").figures["most"] < 1e-4


def test_a_sampler_that_tells_no_log_probabilities_is_compared_with_rollouts_alone(options, family_dir):
    small = {"max_pixels": 128 * 128, "min_pixels": 64 * 64}
    report = run_preflight(*options(family_dir("qwen3_vl"), share_prefix=False, **small))
    logps = finding(report, "log-probs")
    assert "2 rollouts run alone" in logps.text and logps.verdict == "ok" and 0 < logps.figures["most"] < 1e-4


def test_a_4_bit_run_is_looked_at(options, family_dir):
    """TRL keeps an adapter on 4-bit weights in bf16, also where everything else is fp32: that is its precision."""
    script_args, args, model_args = options(
        family_dir("qwen3_vl"), 24.0, beta=0.01, max_pixels=96**2, min_pixels=64**2
    )
    model_args.use_peft = model_args.load_in_4bit = model_args.use_bnb_nested_quant = True
    report = run_preflight(script_args, args, model_args)
    parts = finding(report, "estimate").figures["parts"]
    assert not report.problems and parts["adapter"] > 0 < parts["unpacked layer"] and parts["reference"] == 0
    assert "(bfloat16, limit of the mean 0.1)" in finding(report, "log-probs").text


# What speaks against a start


def test_a_gpu_that_is_too_small(options):
    report = run_preflight(*options(gpu_gib=0.5))
    assert [one.name for one in report.problems] == ["estimate"] and "Not ready: estimate." in report.text()
    assert "does not fit a GPU of 0 GiB" in finding(report, "estimate").text


def test_log_probabilities_that_differ(options, monkeypatch):
    loss = PreflightTrainer._loss_logps
    monkeypatch.setattr(PreflightTrainer, "_loss_logps", lambda self, batch: loss(self, batch) + 0.01)
    report = run_preflight(*options())
    assert [one.name for one in report.problems] == ["log-probs"]


def test_out_of_memory_is_a_finding(options, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PreflightTrainer, "_generate_shared", fail)
    report = run_preflight(*options())
    assert [one.name for one in report.problems] == ["steps"]
    assert "no room" in finding(report, "steps").text and "'photo-2'" in finding(report, "steps").text


def test_a_measured_peak_is_judged_with_the_whole_batch(options, monkeypatch):
    report, measured = PreflightReport(), run.Measured(peak_bytes=int(7 * run.GIB))
    monkeypatch.setattr(run, "device_bytes", lambda: 8 * run.GIB)
    _, args, _ = options()
    small = small_arguments(args, "unused")
    peaks = {id(args): 3 * run.GIB, id(small): 1 * run.GIB}

    class Estimate:
        def __init__(self, args):
            self.peak = peaks[id(args)]

    run._judge_memory(measured, lambda args, size: Estimate(args), args, small, None, report)
    (found,) = report.problems
    assert found.figures == {"measured": 7 * run.GIB, "expected": 9 * run.GIB}


def test_the_memory_is_judged_by_the_gpu_that_is_planned_for(options, monkeypatch):
    report, measured = PreflightReport(), run.Measured(peak_bytes=30 * run.GIB)
    monkeypatch.setattr(run, "device_bytes", lambda: 80 * run.GIB)
    _, args, _ = options()
    estimated = lambda args, size: MemoryEstimate()  # noqa: E731
    run._judge_memory(measured, estimated, args, small_arguments(args, "unused"), 24 * run.GIB, report)
    assert report.problems and "expected 30.0 of 24.0 GiB" in finding(report, "memory").text


def test_the_peak_is_what_the_process_took_from_the_gpu(monkeypatch):
    """As in the estimate, so that measured and estimated bytes can be added up."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 3 * run.GIB)
    assert peak_bytes() == int(3 * run.GIB * 1.06) + CUDA_CONTEXT
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert peak_bytes() is None


def test_turns_that_are_cut_and_masked_are_not_called_unsampled(options):
    report = run_preflight(*options(mask_truncated_completions=True, round_token_budgets=[2, 1]))
    logps = finding(report, "log-probs")
    assert logps.verdict == "PROBLEM" and finding(report, "steps").figures["sampled_tokens"] > 0
    assert "every answer of the first step was cut" in logps.text and "`round_token_budgets`" in logps.text


def test_small_arguments_hold_whole_groups(options, tmp_path):
    _, args, _ = options(num_generations=8, per_device_train_batch_size=2, save_steps=4)
    small = small_arguments(args, tmp_path)
    assert (small.steps_per_generation, small.generation_batch_size, small.max_steps) == (4, 8, 2)
    assert small.save_strategy == "no" and small.learning_rate == 0 and small.report_to == []
    assert (args.steps_per_generation, args.learning_rate, args.save_strategy) == (8, 1e-2, "steps")


# The command


def test_the_command_says_ready_by_its_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "PICTURED_ROWS", 2)
    words = [
        "--preflight",
        "--output_dir",
        str(tmp_path / "out"),
        "--limit",
        "6",
        "--per_device_train_batch_size",
        "8",
    ]
    with pytest.raises(SystemExit) as ended:
        load_script("train").main([*words, "--num_generations", "4", "--preflight_gpu_gib", "12"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "Ready to start." in printed and "The built-in model before its warm start" in printed
    assert (tmp_path / "out" / "preflight" / "boxes.png").is_file()
    assert not (tmp_path / "out" / "result.json").exists()
