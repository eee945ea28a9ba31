"""An out-of-memory error says what ran, with which sample, and what to lower."""

from types import SimpleNamespace

import pytest
import torch

from mgpo_trl.out_of_memory import Load, memory_advice
from mgpo_trl.shared_prefix import SharedPrefixSampler

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"


def failing(function, when=lambda *args: True):
    """`function`, which runs out of memory when `when` says so."""

    def call(*args, **kwargs):
        if when(*args):
            raise torch.OutOfMemoryError(CUDA)
        return function(*args, **kwargs)

    return call


def message_of(trainer):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert CUDA in str(caught.value) and isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


def test_the_advice_names_the_largest_sample_and_every_setting():
    loads = [Load("small", 90, ((84, 84),)), Load("large", 2600, ((1036, 924), (980, 980)))]
    options = SimpleNamespace(
        max_pixels=1003520, token_budgets=[1024, 2048], per_device_train_batch_size=4, num_generations=8,
        steps_per_generation=2,
    )  # fmt: skip
    assert memory_advice("generating round 2", loads, options) == (
        "Out of memory while generating round 2, with 2 rollouts at once. The largest is sample 'large': 2600 tokens, "
        "images of 1036x924 and 980x980 pixels. Lower `max_pixels` (1003520), `round_token_budgets` ([1024, 2048]), "
        "`per_device_train_batch_size` (4) or `num_generations` (8). Generation holds `steps_per_generation` (2) "
        "batches at once."
    )


@pytest.mark.parametrize("share_prefix", [True, False])
def test_in_round_2_the_crop_is_counted(make_trainer, rows, monkeypatch, share_prefix):
    trainer = make_trainer(share_prefix=share_prefix)
    in_round_2 = lambda *args: trainer._round == 2  # noqa: E731
    if share_prefix:
        monkeypatch.setattr(SharedPrefixSampler, "__call__", failing(SharedPrefixSampler.__call__, in_round_2))
    else:
        monkeypatch.setattr(trainer.model, "generate", failing(trainer.model.generate, in_round_2))
    message = message_of(trainer)
    assert message.startswith("Out of memory while generating round 2, with 4 rollouts at once. The largest is sample")
    assert any(repr(row["id"]) in message for row in rows)
    assert "images of 84x84 and 84x84 pixels" in message and "Lower `max_pixels` (7056)" in message


@pytest.mark.parametrize("beta, doing", [(0.01, "scoring the rollouts"), (0.0, "computing the loss")])
@pytest.mark.parametrize("pack_loss", [True, False])
def test_in_the_passes_after_the_rollout(make_trainer, monkeypatch, beta, doing, pack_loss):
    """The reference pass comes first, where there is one."""
    trainer = make_trainer(beta=beta, pack_loss=pack_loss)

    def fail(model, args, kwargs):
        if kwargs.get("fused_lm_head"):  # a pass that scores, not one that generates
            raise torch.OutOfMemoryError(CUDA)

    (trainer.ref_model or trainer.model).register_forward_pre_hook(fail, with_kwargs=True)
    message = message_of(trainer)
    assert message.startswith(f"Out of memory while {doing}, with 4 rollouts at once. The largest is sample")
    assert "`per_device_train_batch_size` (4)" in message
