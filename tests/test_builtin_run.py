"""The built-in run from end to end with few steps: files, keys and types; the figures themselves need a real run."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, load_script, shorten_builtin
from PIL import Image
from safetensors.torch import load_file

from mgpo_trl.builtin import __main__ as command
from mgpo_trl.builtin import run
from mgpo_trl.builtin.warm_start import warm_start
from mgpo_trl.conversation import Conversation
from mgpo_trl.records import read_rollouts, read_run

HELDOUT = 8
FIGURES = {
    "accuracy": float, "accuracy_stderr": float, "hit_rate": float, "hit_rate_stderr": float, "valid_ratio": float,
    "valid_ratio_stderr": float,
}  # fmt: skip
OF_THE_ISSUE = {"level", "decoding", "base", "trained", "n", "seed", "seconds", "commit"}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A warm start of a few steps, kept in a cache of its own, and eight held-out scenes."""
    with pytest.MonkeyPatch.context() as patch:
        yield shorten_builtin(patch, tmp_path_factory.mktemp("cache"), HELDOUT)


def small_run(output_dir, *more):
    options = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4"]
    options += ["--reward_funcs", "commands.every_second_is_right"]
    return [*options, "--output_dir", str(output_dir), "--seed", "3", "--disable_tqdm", "true", *more]


@pytest.fixture(scope="module")
def two_rounds(short, tmp_path_factory):
    """`train.py` without a dataset: the built-in run of the level `refer`."""
    directory = tmp_path_factory.mktemp("refer") / "out"
    load_script("train").main(small_run(directory))
    return directory


@pytest.fixture(scope="module")
def one_round(short, tmp_path_factory):
    """The one-round baseline of the level `needle`."""
    directory = tmp_path_factory.mktemp("needle") / "out"
    command.main(["--level", "needle", "--num_rounds", "1", *small_run(directory)])
    return directory


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


def head_commit():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


def test_the_result_has_the_keys_and_types_of_the_issue(two_rounds):
    result = result_of(two_rounds)
    assert set(result) == OF_THE_ISSUE | {"num_rounds"}
    assert (result["level"], result["decoding"], result["num_rounds"]) == ("refer", "sampled", 2)
    assert (result["n"], result["seed"]) == (HELDOUT, 3)
    for part in ("base", "trained"):
        assert {name: type(value) for name, value in result[part].items()} == FIGURES
        assert all(0 <= value <= 1 for value in result[part].values())
    assert {"warm_start", "train", "total"} <= set(result["seconds"])
    assert all(result["seconds"][name] > 0 for name in ("warm_start", "train", "total"))
    assert result["seconds"]["total"] >= result["seconds"]["train"]
    assert result["commit"] is None or len(result["commit"]) == 40 == len(head_commit())


def test_the_one_round_baseline_has_the_same_format(one_round, two_rounds):
    one, two = result_of(one_round), result_of(two_rounds)
    assert one.keys() == two.keys() and one["base"].keys() == two["base"].keys()
    assert one["seconds"].keys() == two["seconds"].keys()
    assert (one["level"], one["decoding"], one["num_rounds"], one["n"]) == ("needle", "greedy", 1, HELDOUT)
    for part in ("base", "trained"):
        grounding = [one[part][name] for name in FIGURES if not name.startswith("accuracy")]
        assert grounding == [None] * 4 and type(one[part]["accuracy"]) is float


def test_the_figures_are_those_of_the_reports(two_rounds):
    for part in ("base", "trained"):
        report = json.loads((two_rounds / f"heldout_{part}" / "report.json").read_text())
        figures = result_of(two_rounds)[part]
        assert figures["accuracy"] == report["accuracy"]["strict"] and report["n"] == HELDOUT
        assert (figures["hit_rate"], figures["valid_ratio"]) == (report["hit_rate"], report["valid_ratio"])
        assert len(list(read_rollouts(two_rounds / f"heldout_{part}"))) == HELDOUT
        assert len((two_rounds / f"heldout_{part}" / "pictures.jsonl").read_text().splitlines()) == HELDOUT
        run_record = read_run(two_rounds / f"heldout_{part}")
        assert run_record["decoding"] == {"mode": "sampled", "temperature": 1.0} and run_record["seed"] == 3


@pytest.mark.parametrize("which", ["two_rounds", "one_round"])
def test_the_picture(which, request):
    with Image.open(request.getfixturevalue(which) / "before_after.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_training_starts_from_the_warm_start_and_saves_what_it_learnt(two_rounds, short):
    warm = warm_start("refer", 3, recipe=short["refer"].warm_start)
    assert warm.from_cache
    before, after = (load_file(path / "model.safetensors") for path in (warm.model_dir, two_rounds))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    conversation = Conversation.load(two_rounds)
    assert (conversation.num_rounds, conversation.max_pixels) == (2, 84 * 84)
    record = read_run(two_rounds)
    assert record["config"]["model"]["model_name_or_path"] == str(warm.model_dir) and record["seed"] == 3


def test_the_trained_model_evaluates_as_it_was_trained(two_rounds, tmp_path):
    arguments = ["--model", two_rounds, "--dataset", "builtin:refer", "--output_dir", tmp_path, "--device", "cpu"]
    load_script("eval").main([str(argument) for argument in arguments])
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["n"], report["num_rounds"], report["max_pixels"]) == (HELDOUT, 2, 84 * 84)


def test_it_says_what_it_does_in_one_line(short, monkeypatch, caplog, tmp_path):
    """Without arguments: that the built-in task is trained, before anything slow starts."""
    monkeypatch.setattr(run, "warm_start", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
        load_script("train").main([])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("mgpo_trl")]
    assert len(said) == 1 and "\n" not in said[0]
    assert "built-in task 'refer'" in said[0]


def test_an_output_directory_of_an_earlier_run_is_replaced(one_round, short):
    """The same command twice, as people do: held-out figures of the first run are not counted again."""
    before = Path(one_round / "heldout_base" / "rollouts.jsonl").read_bytes()
    command.main(["--level", "needle", "--num_rounds", "1", *small_run(one_round)])
    assert (one_round / "heldout_base" / "rollouts.jsonl").read_bytes() == before  # same seed, same warm start
    assert result_of(one_round)["n"] == HELDOUT


def test_a_single_step_with_evaluation_runs(short, tmp_path):
    """Fewer steps than the recipe warms up for; evaluation during training takes the held-out scenes."""
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "8"]
    command.main(["--level", "needle", *small_run(tmp_path, "--max_steps", "1", *evaluation)])
    assert result_of(tmp_path)["n"] == HELDOUT
