import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mgpo_trl.builtin import warm_start as module
from mgpo_trl.builtin.needle import LEVELS
from mgpo_trl.builtin.recipe import RECIPES
from mgpo_trl.builtin.tiny import ImageOnlyQwen2_5_VLProcessor
from mgpo_trl.builtin.warm_start import default_cache_dir, warm_start
from mgpo_trl.mgpo_config import MGPOConfig
from mgpo_trl.prompts import PromptTemplate


def _short(level):
    recipe = RECIPES[level].warm_start
    small = {"scenes": 8, "seeing_batch": 4, "reading_batch": 4, "talking_batch": 4}
    return replace(recipe, **small, warmup_steps=3, seeing_steps=10, talking_steps=2)


@pytest.mark.parametrize("level", LEVELS)
def test_the_loss_falls_and_the_cache_is_used(level, tmp_path, monkeypatch):
    first = warm_start(level, seed=1, cache_dir=tmp_path, recipe=_short(level))
    losses = json.loads((first.model_dir / "warm_start.json").read_text())["losses"]
    assert len(losses) == 12
    assert max(losses[7:10]) < 0.6 * losses[0]
    assert isinstance(AutoProcessor.from_pretrained(first.model_dir), ImageOnlyQwen2_5_VLProcessor)
    assert AutoModelForImageTextToText.from_pretrained(first.model_dir).dtype == torch.float32

    monkeypatch.setattr(module, "_train_into", lambda *_: pytest.fail("trained although it is in the cache"))
    again = warm_start(level, seed=1, cache_dir=tmp_path, recipe=_short(level))
    assert (again.model_dir, again.seconds) == (first.model_dir, first.seconds)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert [path.name for path in tmp_path.iterdir()] == [first.model_dir.name]


def test_the_weights_follow_from_the_seed(tmp_path):
    weights = []
    recipe = replace(_short("needle"), seeing_steps=2, talking_steps=1)
    for name in ("a", "b"):
        torch.manual_seed(len(weights))
        made = warm_start("needle", seed=5, cache_dir=tmp_path / name, recipe=recipe)
        weights.append((made.model_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_what_the_weights_depend_on_names_the_directory(tmp_path, monkeypatch):
    record = '{"seconds": 1}'
    monkeypatch.setattr(module, "_train_into", lambda made, *_: (made / "warm_start.json").write_text(record))
    recipe = _short("needle")
    directories = {
        warm_start("needle", 0, tmp_path, recipe).model_dir,
        warm_start("refer", 0, tmp_path, recipe).model_dir,
        warm_start("needle", 1, tmp_path, recipe).model_dir,
        warm_start("needle", 0, tmp_path, replace(recipe, lr=1e-4)).model_dir,
        warm_start("needle", 0, tmp_path, recipe, PromptTemplate(crop_reply="Look.\n")).model_dir,
    }
    assert len(directories) == 5


def test_an_interrupted_warm_start_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module._Teacher, "talk", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        warm_start("needle", 0, tmp_path, replace(_short("needle"), seeing_steps=1))
    assert not list(tmp_path.iterdir())


def test_the_result_of_a_faster_process_stays(tmp_path):
    made, target = tmp_path / "unfinished", tmp_path / "target"
    for directory in (made, target):
        directory.mkdir()
        (directory / "name").write_text(directory.name)
    module._publish(made, target)
    assert (target / "name").read_text() == "target"


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mgpo_trl"


@pytest.mark.parametrize("level", LEVELS)
def test_the_trainer_accepts_the_recipe(level):
    args = MGPOConfig(**RECIPES[level].rl_options())
    assert args.per_device_train_batch_size == RECIPES[level].rl.prompts * args.num_generations
    assert (args.max_pixels, args.min_pixels, args.min_box_side, args.beta) == (7056, 3136, 14, 0.0)
    assert RECIPES[level].warm_start.scenes == 1500
