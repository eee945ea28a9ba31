"""The card of a model, from the files in its directory; `test_hub.py` pushes it."""

import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from mgpo_trl.conversation import Conversation
from mgpo_trl.images import LateImage
from mgpo_trl.model_card import draw_rollouts, is_ours, keep_reports, pick_rollouts, record_run, write_card
from mgpo_trl.model_card.facts import dataset_id, is_hub_id
from mgpo_trl.model_card.text import WRITTEN_BY

RUN = {
    "command": ["train.py", "--config", "my run.yaml", "--hub_token=<masked>"], "python": "3.11.7", "processes": 8,
    "commit": "0123456789abcdef", "versions": {"trl": "1.16.0", "deepspeed": None},
    "config": {
        "training": {"num_rounds": 2, "beta": 0.0, "max_steps": 30, "num_train_epochs": 3.0, "bf16": False,
                     "learning_rate": 1e-5, "turn_loss_weights": [1, 4]},
        "script": {"dataset_name": "lab/doors:hard", "reward_funcs": ["accuracy_reward"]},
        "model": {"model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct", "use_peft": False, "lora_r": 16},
    },
}  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    """A model's directory without its weights."""
    Conversation(coordinates="absolute").save(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    log = [{"step": step, "reward": step / 100, "turn1/kl": float("nan"), "loss": 0.1} for step in range(1, 31)]
    state = {"global_step": 30, "log_history": [*log, {"train_runtime": 3.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def card_of(directory, **known):
    return write_card(directory, **known).read_text(encoding="utf-8")


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_everything_that_the_files_say(directory):
    (directory / "rollouts.png").write_bytes(b"")
    card = card_of(directory, name="zoom", repo_id="me/zoom", license={"license": "apache-2.0"}, tags=["doors"])
    assert metadata(card) == {
        "base_model": "Qwen/Qwen2.5-VL-3B-Instruct", "datasets": ["lab/doors"], "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "image-text-to-text", "tags": ["trl", "mgpo", "grounding", "doors"],
    }  # fmt: skip
    for line in (
        "# zoom",
        WRITTEN_BY,
        "trained from [Qwen/Qwen2.5-VL-3B-Instruct](https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct) with **MGPO**",
        "](https://huggingface.co/papers/2507.05920)",
        "Only right and wrong answers were rewarded",
        "](rollouts.png)",
        'GroundedVQA.from_pretrained("me/zoom")',
        "| pixel budget of every image | 200,704 to 1,003,520 |",
        "| coordinates of boxes | `absolute` |",
        "| tokens of each turn | at most 8192, at most 8192 |",
        "Trained on [lab/doors](https://huggingface.co/datasets/lab/doors). Optimizer steps: 30.",
        "The command, on 8 processes:",
        "python train.py --config 'my run.yaml' '--hub_token=<masked>'",
        "| `beta` | `0.0` |",
        "| `turn_loss_weights` | `1 4` |",
        "| while training | first 10 of 30 log lines | last 10 |",
        "| `reward` | 0.055 ± 0.010 | 0.255 ± 0.010 |",  # of 0.01 .. 0.10: sqrt(0.0916...) / sqrt(10)
        "| `turn1/kl` | - | - |",
        "python 3.11.7, trl 1.16.0; commit `0123456789ab`.",
        "eprint  = {arXiv:2507.05920}",
    ):
        assert line in card, line
    for absent in ("num_train_epochs", "lora_r", "bf16", "deepspeed", "## Results", "2402.03300", "GRPO"):
        assert absent not in card, absent


def test_a_section_without_its_file_is_left_out(tmp_path):
    card = card_of(tmp_path)
    headings = re.findall(r"^#.*", card, re.MULTILINE)
    assert headings == [f"# {tmp_path.name}", "## Quick start", "## Citation"]
    assert f'from_pretrained("{tmp_path}")' in card and "a base model that is not known" in card


def test_other_rewards_and_one_round_are_not_praised_for_what_they_are_not(directory):
    run = {**RUN, "config": {**RUN["config"], "script": {"reward_funcs": ["accuracy_reward", "format_reward"]}}}
    (directory / "run.json").write_text(json.dumps(run))
    assert "never a box" not in card_of(directory) and "It looks more than once" in card_of(directory)
    Conversation().with_rounds(1).save(directory)
    assert "It answers in one round" in card_of(directory) and "more than once" not in card_of(directory)


def test_an_adapter(directory):
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/mine"}))
    card = card_of(directory)
    assert "A LoRA adapter on the local model `mine`" in card and "base_model" not in metadata(card)
    assert 'base_model="path/to/the/base/model")' in card and metadata(card)["library_name"] == "peft"


def test_the_base_models_license(directory):
    own = {"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE"}
    card = card_of(directory, license=own)
    assert metadata(card)["license_name"] == "qwen-research"
    assert "That of the base model: [qwen-research](https://example.org/LICENSE)." in card
    assert "See that of the base model, [Qwen/Qwen2.5-VL-3B-Instruct]" in card_of(directory)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("lab/doors", "lab/doors"),
        ("lab/doors:hard", "lab/doors"),
        ("data/train.jsonl", None),
        ("../doors", None),
        ("builtin:refer", None),
        ("vstar:copies/vstar", "craigwu/vstar_bench"),
        (None, None),
    ],
)
def test_what_is_a_dataset_of_the_hub(spec, expected):
    assert dataset_id(spec) == expected


def test_what_lies_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("outputs/run") and is_hub_id("Qwen/Qwen2.5-VL-3B-Instruct")
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    assert not is_hub_id("outputs/run") and not is_hub_id("/models/mine") and not is_hub_id(None)


def test_reports_are_kept_with_the_model(directory, tmp_path_factory):
    report = {
        "dataset": "vstar",
        "n": 191,
        "accuracy": {"strict": 0.5, "stderr": {"strict": None}},
        "protocol": "mgpo",
    }
    elsewhere = tmp_path_factory.mktemp("vstar") / "mgpo"
    for place in (elsewhere, directory / "eval", directory / "heldout_base"):
        place.mkdir()
        (place / "report.json").write_text(json.dumps({**report, "dataset": place.parent.name[:5]}))
    keep_reports(directory, [elsewhere, directory / "eval"])
    kept = directory / "evaluations" / f"{elsewhere.parent.name}-mgpo.json"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    card = card_of(directory)
    assert "| vstar, mgpo | 191 | 0.500 | - | - | - | - | - |" in card and card.count(", mgpo | 191") == 2
    with pytest.raises(ValueError, match="There is no `report.json`"):
        keep_reports(directory, [directory])


def test_figures_of_an_earlier_model_do_not_count(directory):
    """They lie in the same directory, from before this training began."""
    report = {"dataset": "vstar", "n": 191, "accuracy": {"strict": 0.5, "stderr": {"strict": None}}}
    kept = directory / "evaluations"
    kept.mkdir()
    (kept / "old.json").write_text(json.dumps(report))
    (directory / "rollouts.png").write_bytes(b"")
    for time, shown in (("2020-01-01T00:00:00+00:00", True), ("2100-01-01T00:00:00+00:00", False)):
        (directory / "run.json").write_text(json.dumps({**RUN, "time": time}))
        card = card_of(directory)
        assert ("## Results" in card) is shown and ("rollouts.png" in card) is shown


def test_the_built_in_tasks_figures(directory):
    part = {"accuracy": 0.5, "hit_rate": None, "valid_ratio": 1.0}
    part |= {f"{name}_stderr": None if value is None else 0.022 for name, value in part.items()}
    result = {"level": "refer", "n": 512, "decoding": "sampled", "seed": 1, "base": part, "trained": part}
    (directory / "result.json").write_text(json.dumps(result))
    card = card_of(directory, base_model=str(directory))
    assert "| accuracy | 0.500 ± 0.022 | 0.500 ± 0.022 |" in card and "| hit rate | - | - |" in card
    assert (
        "the small Qwen2.5-VL of the built-in task" in card and "n = 512, ± standard error, sampled, seed 1." in card
    )
    assert 'load_builtin("builtin:refer", limit=1)' in card and "photo.jpg" not in card


def test_the_command_behind_python_m(directory):
    module = "/opt/site-packages/mgpo_trl/builtin/__main__.py"
    (directory / "run.json").write_text(json.dumps({**RUN, "command": [module, "--level", "needle"]}))
    assert "\npython -m mgpo_trl.builtin --level needle\n" in card_of(directory)


def test_whose_card_it_is(tmp_path):
    assert is_ours(tmp_path)
    card = card_of(tmp_path)
    assert is_ours(tmp_path)
    (tmp_path / "README.md").write_text(card.replace(WRITTEN_BY, ""))
    assert not is_ours(tmp_path)


def test_a_trainer_built_in_python_leaves_a_record(tmp_path, monkeypatch):
    args = SimpleNamespace(to_dict=lambda: {"beta": 0.01, "hub_token": "hf_x"}, seed=3, world_size=2)

    def command(*words):
        monkeypatch.setattr(sys, "argv", list(words))
        record_run(tmp_path, args, Conversation(), "lab/base")
        return json.loads((tmp_path / "run.json").read_text())

    record = command("mine.py")
    assert record["config"]["model"] == {"model_name_or_path": "lab/base"} and record["processes"] == 2
    assert record["config"]["training"]["hub_token"] == "<masked>"
    (tmp_path / "run.json").write_text(json.dumps({**record, "note": "of train.py"}))
    assert command("mine.py")["note"] == "of train.py", "the record of this command stays"
    assert "note" not in command("other.py"), "the record of another command would be a lie"


def rollout(identity, answer, image=None):
    turn = {"round": 1, "text": r"\boxed{A}", "box": None, "num_tokens": 3, "truncated": False}
    record = {
        "question": "What?", "choices": None, "answer": answer, "turns": [turn], "target_boxes": None,
        "view_size": [28, 28],
    }  # fmt: skip
    image = Image.new("RGB", (60, 40)) if image is None else image
    return SimpleNamespace(id=identity, answer=answer, image=image, to_record=lambda: record)


def test_one_rollout_of_each_question_is_drawn(tmp_path):
    rollouts = [rollout(name, None if name == "b" else "A") for name in "aabbccddeeff"]
    picked = pick_rollouts(rollouts)
    assert [one.id for one in picked] == ["a", "c", "d", "e"] and picked[0] is rollouts[0]
    draw_rollouts(picked, tmp_path, "step 3")
    assert Image.open(tmp_path / "rollouts.png").width > 4 * 216


def test_a_picture_that_is_decoded_late_is_drawn(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    draw_rollouts([rollout("a", "A", LateImage(str(tmp_path / "a.jpg"), "a"))], tmp_path, "step 3")
    assert (tmp_path / "rollouts.png").is_file()


def test_what_can_not_be_drawn_costs_the_picture_alone(tmp_path, caplog):
    broken = rollout("a", "A")
    broken.image = "gone"
    draw_rollouts([broken], tmp_path, "step 3")
    assert "The model card goes without a picture" in caplog.text and not list(tmp_path.iterdir())


def test_the_trainer_writes_it(make_trainer, tmp_path):
    """Beside a model that is saved, without a Hub, and with every checkpoint."""
    trainer = make_trainer(save_strategy="steps", save_steps=1, hub_token="hf_secret")
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "MGPO" in card and "2507.05920" in card and "](rollouts.png)" in card and "Optimizer steps: 1." in card
    saved = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert saved == [] and trainer.args.hub_token == "hf_secret", "a pushed file would hold the token"
    trainer.create_model_card(dataset_name="lab/doors", tags="doors")
    data = metadata((tmp_path / "run" / "README.md").read_text())
    assert data["datasets"] == ["lab/doors"] and data["tags"][-1] == "doors"


def test_no_picture_where_none_is_wanted(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rollouts.png").write_bytes(b"of an earlier run")
    trainer = make_trainer(card_picture=False)
    trainer.train()
    trainer.create_model_card()
    assert not (tmp_path / "run" / "rollouts.png").exists() and trainer._pictured == []


def test_a_card_that_can_not_be_written_does_not_stop_a_training(make_trainer, tmp_path, caplog):
    other = tmp_path / "run" / "notes"
    other.mkdir(parents=True)
    (other / "report.json").write_text("[]")  # of something else
    os.utime(other / "report.json", (2**32, 2**32))  # newer than the training, so that the card reads it
    make_trainer(save_strategy="steps", save_steps=1).train()
    assert "The model card in" in caplog.text and "was not written" in caplog.text
    assert (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_saved_model_names_its_coordinates(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save_model()
    assert Conversation.load(tmp_path / "run").coordinates == "absolute"
