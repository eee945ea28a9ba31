"""
Every file of `ds_configs/` trains what one process trains: the same rollouts, rewards, losses and weights.

Tolerances: losses 1e-6 and weights 2e-6 absolute, gradient norms 2e-5 relative, a few times what was measured. Metrics
that TRL averages over micro-batches (entropy, KL) depend on which rollouts share one, and are left out; the KL is part
of the loss.
"""

import json
import shutil
from itertools import chain

import pytest
from cases import CASES, HELDOUT, save_adapter
from launching import CONFIGS, config_of, launch, launch_two_nodes, results
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from mgpo_trl.conversation import Conversation
from mgpo_trl.records import read_rollouts

pytestmark = pytest.mark.slow
STAGES = {
    "multi_gpu": ("full", "adapter", "four_bit", "lopsided", "preflight", "builtin_run"),
    "fsdp2": ("full", "adapter", "further", "four_bit", "lopsided", "train_script"),
    "zero1": ("full",),
    "zero2": ("full", "adapter", "further", "four_bit", "lopsided", "builtin_run"),
    "zero2_offload": ("adapter",),
    "zero3": ("full", "further", "four_bit", "lopsided", "preflight", "train_script"),
    "zero3_offload": ("adapter",),
    "zero3_two_nodes": ("adapter",),
}
ENGINES = {"MULTI_GPU": "MULTI_CPU", "DEEPSPEED": "DEEPSPEED", "FSDP": "FSDP"}


@pytest.fixture(scope="module")
def model_dir(tiny_dir, tmp_path_factory):
    """The tiny model, with an adapter beside it."""
    directory = shutil.copytree(tiny_dir, tmp_path_factory.mktemp("model") / "tiny")
    save_adapter(directory)
    return directory


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory):
    """What one process plays: `alone(case)` gives its directory and result."""
    played = {}

    def play(case):
        if case not in played:
            directory = tmp_path_factory.mktemp("alone") / case
            played[case] = directory, CASES[case](model_dir, directory)
        return played[case]

    return play


@pytest.fixture(scope="module", params=STAGES)
def stage(request, model_dir, tmp_path_factory):
    """The name of a file, the directory of its launch, and what each of the two processes says."""
    directory = tmp_path_factory.mktemp(request.param)
    start = launch_two_nodes if config_of(request.param)["num_machines"] > 1 else launch
    done = start(request.param, model_dir, directory, *STAGES[request.param])
    assert done.code == 0, done.output
    return request.param, directory, results(directory)


def test_every_file_is_launched():
    assert set(CONFIGS) == set(STAGES)


def test_the_processes_are_those_asked_for_and_shard_what_they_should(stage):
    name, _, ranks = stage
    for result in chain.from_iterable(case.values() for rank in ranks for case in rank.values() if case):
        assert result["processes"] == 2 and result["engine"] == ENGINES[config_of(name)["distributed_type"]]
    for case in set(STAGES[name]) - {"train_script", "preflight", "builtin_run"}:
        for result in ranks[0][case].values():
            assert result["sharded"] == (result["parameters"] if is_sharded(name) else 0)
            assert result["shares"] == (not is_sharded(name))


def is_sharded(name):
    return name.startswith(("zero3", "fsdp2"))


def test_they_play_what_one_process_plays(stage, alone):
    name, _, ranks = stage
    for case in {"full", "adapter", "further", "four_bit"} & set(STAGES[name]):
        for run, wanted in alone(case)[1].items():
            together = [rank[case][run] for rank in ranks]
            played = sorted(chain.from_iterable(result["played"] for result in together), key=lambda p: p["place"])
            assert played == wanted["played"] and len({p["reward"] for p in played}) > 1
            for result in together:
                compare(result["logs"], wanted["logs"], 2e-5 if case != "four_bit" else 1e-2)


def compare(logs, wanted, rel):
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in wanted], abs=1e-6, rel=0)
    assert [log["grad_norm"] for log in logs] == pytest.approx([log["grad_norm"] for log in wanted], rel=rel)
    for name in ("reward", "reward_std", "grounding/valid_ratio", "turn1/length", "turn2/length"):
        assert [log[name] for log in logs] == pytest.approx([log[name] for log in wanted], rel=1e-6), name


def test_a_process_that_holds_the_model_encodes_an_image_once_a_step(stage, alone):
    """
    With an adapter, two views and two crops a process: for both rounds, the reference pass and the policy pass. With
    all weights, a reference pass of two rollouts encodes a view and a crop, though the view stands in it twice.
    """
    name, _, ranks = stage
    if "adapter" in STAGES[name] and not is_sharded(name):
        assert [rank["adapter"]["whole"]["encoded"] for rank in ranks] == [{"policy": 3 * 4}] * 2
        assert alone("adapter")[1]["whole"]["encoded"] == {"policy": 3 * 8}
    if "full" in STAGES[name] and not is_sharded(name):
        assert [rank["full"]["whole"]["encoded"]["reference"] for rank in ranks] == [3 * 2 * 2] * 2


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(stage):
    name, _, ranks = stage
    for case in {"full", "adapter"} & set(STAGES[name]):
        for rank in ranks:
            whole, resumed = rank[case]["whole"], rank[case]["resumed"]
            last = [play for play in whole["played"] if play["place"][0] == 2]
            assert len(resumed["logs"]) == 3 and resumed["played"] == last
            compare(resumed["logs"], whole["logs"], 1e-5)


def test_the_saved_model_is_that_of_one_process(stage, alone):
    name, directory, _ = stage
    for case in {"full", "adapter"} & set(STAGES[name]):
        file = "model.safetensors" if case == "full" else SAFETENSORS_WEIGHTS_NAME
        for part in ("final", "whole/checkpoint-2"):
            ours, theirs = (load_file(path / part / file) for path in (directory / case, alone(case)[0]))
            assert ours.keys() == theirs.keys()
            for weight in ours:
                assert (ours[weight] - theirs[weight]).abs().max() < 2e-6, weight
            assert Conversation.load(directory / case / part).num_rounds == 2


def test_lopsided_processes_do_not_wait_for_each_other(stage):
    """No box and one token on the first process, boxes and whole budgets on the second; sharded ones step together."""
    name, _, ranks = stage
    if "lopsided" not in STAGES[name]:
        return
    for run in ranks[0]["lopsided"]:
        first, second = (rank["lopsided"][run] for rank in ranks)
        assert len(first["logs"]) == 2 and second["forwards"] == [24, 8, 24, 8]
        assert first["forwards"] == ([24, 8, 24, 8] if second["sharded"] else [1, 1, 1, 1])
        for log, other in zip(first["logs"], second["logs"], strict=True):
            assert log["loss"] == other["loss"] and log["grounding/valid_ratio"] == 0.5


def test_the_script_trains_and_saves(stage):
    name, directory, _ = stage
    if "train_script" in STAGES[name]:
        saved = directory / "train_script"
        assert (saved / "model.safetensors").exists()
        record = json.loads((saved / "run.json").read_text())
        assert record["num_rounds"] == 2
        kept = [rollout["id"] for rollout in read_rollouts(saved)]  # by one process, of the groups of both
        assert kept == [f"step-0/group-{group}/sample-{sample}" for group in (0, 1) for sample in (0, 1)]
        assert "# train_script" in (saved / "README.md").read_text()


def test_the_preflight_says_ready(stage):
    name, directory, _ = stage
    if "preflight" in STAGES[name]:
        report = json.loads((directory / "preflight" / "preflight" / "preflight.json").read_text())
        assert report["ready"] and (directory / "preflight" / "preflight" / "boxes.png").exists() != is_sharded(name)


def test_the_built_in_run_plays_its_held_out_scenes_once(stage):
    name, directory, _ = stage
    if "builtin_run" in STAGES[name]:
        saved = directory / "builtin_run"
        assert json.loads((saved / "result.json").read_text())["n"] == HELDOUT
        for part in ("base", "trained"):
            assert len(list(read_rollouts(saved / f"heldout_{part}"))) == HELDOUT
        assert len(list((saved / "cache").rglob("model.safetensors"))) == 1  # one warm start for all processes
