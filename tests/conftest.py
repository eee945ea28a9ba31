"""Shared by every test: one thread, no network, one tiny model on disk, a few rows."""

import atexit
import gc
import io
import os
import random
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")  # Trackio reads it once, when TRL imports it

import pytest
import torch
from PIL import Image

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """Directory of the 0.8 M-parameter Qwen2.5-VL and its processor; registers the processor for `AutoProcessor`."""
    from mgpo_trl.builtin.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), "refer", seed=0)


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory, tiny_dir):
    """`family_dir(model_type)`: directory of the tiny model of a family; made once."""
    from families import save_family

    made = {"qwen2_5_vl": tiny_dir}

    def directory(model_type):
        if model_type not in made:
            made[model_type] = save_family(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return directory


@pytest.fixture(scope="session")
def rows():
    """Four rows of the built-in task, pictures as PNG bytes."""
    from mgpo_trl.builtin.needle import make_dataset

    return make_dataset("refer", "train", 4, seed=0)


def parity_reward(completions, **kwargs):
    """Every second rollout is right, so that every group has a signal."""
    return [float(number % 2) for number in range(len(completions))]


@pytest.fixture(scope="session")
def quick_collection():
    """Every training ends with a full garbage collection: leave out the half million objects of the libraries."""
    import mgpo_trl.mgpo_trainer  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_trainer(tiny_dir, rows, tmp_path, quick_collection):
    """Build an `MGPOTrainer` on the tiny model; keyword arguments are options of `MGPOConfig`."""
    from mgpo_trl import MGPOConfig, MGPOTrainer

    def make(dataset=rows, reward=parity_reward, *, model=None, trainer_class=MGPOTrainer, kwargs=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_pixels": 84 * 84,
            "min_pixels": 56 * 56,
            "round_token_budgets": [10, 4, 4][: options.get("num_rounds", 2)],
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "gradient_checkpointing": False,
            "beta": 0.0,
            "learning_rate": 1e-3,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        args = MGPOConfig(**{**defaults, **options})
        return trainer_class(str(model or tiny_dir), reward, args, train_dataset=dataset, **(kwargs or {}))

    return make


@pytest.fixture
def script(monkeypatch):
    """Make `trainer.model.generate` return hand-written ids: `script(trainer, round_1, round_2)`, lists by row."""

    def scripted(trainer, *rounds):
        calls = iter(rounds)

        def generate(input_ids, **kwargs):
            turns = next(calls)
            assert len(turns) == len(input_ids)
            length = max(map(len, turns))
            pad = trainer._tokenizer.pad_token_id
            turns = torch.tensor([[*turn, *[pad] * (length - len(turn))] for turn in turns])
            return torch.cat([input_ids, turns], dim=1)

        monkeypatch.setattr(trainer, "_shares_prefix", False)
        monkeypatch.setattr(trainer.model, "generate", generate)

    return scripted


@pytest.fixture(scope="session")
def photos():
    """Four rows whose pictures differ in size and aspect ratio, so that prompts are padded and crops differ."""
    return [photo_row(number, size) for number, size in enumerate([(400, 200), (150, 300), (336, 336), (60, 40)])]


def photo_row(number, size):
    """A row with a picture of noise as PNG bytes."""
    image = Image.frombytes("RGB", size, random.Random(number).randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {
        "id": f"photo-{number}",
        "image": {"bytes": buffer.getvalue(), "path": None},
        "question": f"What is on the {['red', 'blue', 'green', 'grey'][number]} card?",
        "choices": ["vertical lines", "horizontal lines"],
        "answer": "AB"[number % 2],
        "target_boxes": [[0, 0, size[0] // 2, size[1] // 2]],
        "category": None,
    }
