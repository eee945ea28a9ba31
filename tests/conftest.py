"""Shared by every test: one thread, no network, one tiny model on disk, a few rows."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """Directory of the 0.8 M-parameter Qwen2.5-VL and its processor; registers the processor for `AutoProcessor`."""
    from mgpo_trl.builtin.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"), "refer", seed=0)


@pytest.fixture(scope="session")
def rows():
    """Four rows of the built-in task, pictures as PNG bytes."""
    from mgpo_trl.builtin.needle import make_dataset

    return make_dataset("refer", "train", 4, seed=0)
