"""The loss has terms at the model's tokens only: its gradient with respect to log-probabilities, by position."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

from mgpo_trl.boxes import format_box

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
ADVANTAGES = torch.tensor([1.0, -0.5, 0.75, -1.25])


@pytest.fixture(scope="module")
def shared():
    """One trainer and its batch for the whole module; tests set loss type and weights on it."""
    return {}


@pytest.fixture
def scripted(make_trainer, script, photos, shared, monkeypatch):
    """(trainer, batch): a box, no box, a cut box, a cut answer; images of two sizes."""
    if not shared:
        trainer = make_trainer(Dataset.from_list(photos), beta=0.01)
        end, encode = [trainer._tokenizer.eos_token_id], lambda text: trainer._tokenizer(text)["input_ids"]
        box = encode(format_box((4, 4, 50, 50), (112, 56), "absolute", "card"))
        grounding = [box + end, encode("no") + end, [*box, box[0], box[0]], box[:5] + end]
        answers = [encode("\\boxed{A}") + end, encode("B") + end, end, encode("\\boxed") * 3]
        assert len(grounding[2]) == max(map(len, grounding)) and len(answers[3]) == max(map(len, answers))
        script(trainer, grounding, answers)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._generate_and_score_completions([dict(row) for row in photos[:2] for _ in range(2)])
        shared.update(trainer=trainer, batch=batch)
    monkeypatch.setattr(shared["trainer"].args, "turn_loss_weights", None)
    return shared["trainer"], {**shared["batch"], "advantages": ADVANTAGES}


def gradient(trainer, batch, monkeypatch, loss_type, *, beta=0.0, weights=None, compute=None, **attributes):
    """d loss / d log-probabilities of shape (B, C), through the trainer's own loss or through `compute`."""
    generator = torch.Generator().manual_seed(0)
    shape = batch["completion_ids"].shape
    logps = (-torch.rand(shape, generator=generator) - 0.1).requires_grad_()
    entropies = torch.rand(shape, generator=generator)
    old = logps.detach() + 0.1 * torch.randn(shape, generator=generator)
    ref = logps.detach() + 0.1 * torch.randn(shape, generator=generator)
    if loss_type == "luspo":
        attributes["importance_sampling_level"] = "sequence"
    for name, value in {"loss_type": loss_type, "beta": beta, **attributes}.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(trainer.args, "turn_loss_weights", weights)
    monkeypatch.setattr(trainer, "_packs", False)  # the padded pass, whose log-probabilities are replaced
    fake = lambda *args, **kwargs: (logps, entropies, None)  # noqa: E731
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", fake)
    items = trainer._token_weights(batch["turn_ids"]).sum()
    inputs = {**batch, "old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": items}
    (compute or type(trainer)._compute_loss)(trainer, trainer.model, inputs).backward()
    return logps.grad


def only_turns(numbers):
    """GRPO's own loss, told that nothing but these turns were sampled."""

    def compute(trainer, model, inputs):
        mask = torch.isin(inputs["turn_ids"], torch.tensor(numbers)).float()
        inputs = {**inputs, "tool_mask": mask, "num_items_in_batch": mask.sum()}
        return GRPOTrainer._compute_loss(trainer, model, inputs)

    return compute


def test_the_batch_has_every_kind_of_position(scripted):
    _, batch = scripted
    turn_ids, mask, ids = batch["turn_ids"], batch["completion_mask"], batch["completion_ids"]
    assert (mask == 0).any() and ((turn_ids == 0) & (mask == 1) & (batch["tool_mask"] == 0)).any()
    for number in (1, 2):
        assert (turn_ids == number).any(1).all()
    first_reply = (turn_ids[2] == 0).nonzero()[0].item()
    assert ids[2, first_reply] == 2 and turn_ids[2, first_reply - 1] == 1  # the appended end of turn


@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_only_sampled_tokens_have_a_gradient(scripted, monkeypatch, loss_type, beta):
    trainer, batch = scripted
    grad = gradient(trainer, batch, monkeypatch, loss_type, beta=beta, epsilon_low=9.0, epsilon_high=9.0)
    sampled = batch["turn_ids"] > 0
    assert (grad[~sampled] == 0).all()
    assert (grad[sampled] != 0).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_equal_weights_are_no_weights(scripted, monkeypatch, loss_type):
    trainer, batch = scripted
    plain = gradient(trainer, batch, monkeypatch, loss_type, beta=0.01)
    assert torch.equal(plain, gradient(trainer, batch, monkeypatch, loss_type, beta=0.01, weights=[1.0, 1.0]))
    assert torch.equal(plain, gradient(trainer, batch, monkeypatch, loss_type, beta=0.01, compute=only_turns([1, 2])))


@pytest.mark.parametrize("beta", [0.0, 0.01])
@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_hot_weights_train_that_turn_alone(scripted, monkeypatch, loss_type, turn, beta):
    trainer, batch = scripted
    weights = [float(turn == 1), float(turn == 2)]
    grad = gradient(trainer, batch, monkeypatch, loss_type, beta=beta, weights=weights)
    assert (grad[batch["turn_ids"] != turn] == 0).all() and (grad[batch["turn_ids"] == turn] != 0).any()
    alone = gradient(trainer, batch, monkeypatch, loss_type, beta=beta, compute=only_turns([turn]))
    assert torch.equal(grad, alone)


def test_weights_make_a_weighted_mean(scripted, monkeypatch):
    trainer, batch = scripted
    plain = gradient(trainer, batch, monkeypatch, "dapo")
    weighed = gradient(trainer, batch, monkeypatch, "dapo", weights=[0.5, 2.0])
    counts = [(batch["turn_ids"] == number).sum() for number in (1, 2)]
    scale = (counts[0] + counts[1]) / (0.5 * counts[0] + 2.0 * counts[1])
    for number, weight in ((1, 0.5), (2, 2.0)):
        mine = batch["turn_ids"] == number
        torch.testing.assert_close(weighed[mine], plain[mine] * weight * scale)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_weights_of_any_size_make_the_same_mean(scripted, monkeypatch, loss_type):
    """TRL divides by no sum of weights below 1; here all the weights of the batch add up to less."""
    trainer, batch = scripted
    size = 2.0**-12
    for weights in ([1.0, 1.0], [1.0, 4.0], [0.0, 1.0]):
        small = [size * weight for weight in weights]
        assert sum(small) * batch["turn_ids"].numel() < 1
        plain = gradient(trainer, batch, monkeypatch, loss_type, beta=0.01, weights=weights)
        weighed = gradient(trainer, batch, monkeypatch, loss_type, beta=0.01, weights=small)
        torch.testing.assert_close(weighed, plain * size if loss_type == "dr_grpo" else plain)


def test_a_rollout_of_low_weight_alone_is_a_mean_too(scripted, monkeypatch):
    """Its answer was cut and left the loss; the grounding turn has the lower weight."""
    trainer, batch = scripted
    cut = {**batch, "turn_ids": torch.where(batch["turn_ids"] == 2, 0, batch["turn_ids"])}
    one = gradient(trainer, cut, monkeypatch, "grpo", weights=[2.0**-10, 1.0])
    torch.testing.assert_close(one, gradient(trainer, cut, monkeypatch, "grpo"))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.25]])
def test_weights_do_not_choose_the_high_entropy_tokens(scripted, monkeypatch, weights):
    trainer, batch = scripted
    options = {"top_entropy_quantile": 0.5, "epsilon_low": 9.0, "epsilon_high": 9.0}
    for loss_type in ("dapo", "dr_grpo"):
        plain = gradient(trainer, batch, monkeypatch, loss_type, **options)
        weighed = gradient(trainer, batch, monkeypatch, loss_type, weights=weights, **options)
        assert torch.equal(weighed != 0, plain != 0)


def test_weights_do_not_enter_the_ratio_of_the_sequence_in_vespo(scripted, monkeypatch):
    trainer, batch = scripted
    plain = gradient(trainer, batch, monkeypatch, "vespo")
    weighed = gradient(trainer, batch, monkeypatch, "vespo", weights=[1.0, 4.0])
    ratio = (weighed / plain).nan_to_num()
    one, two = (batch["turn_ids"] == number for number in (1, 2))
    torch.testing.assert_close(ratio[two], ratio[one].mean().expand(int(two.sum())) * 4)


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_high_entropy_tokens_are_sought_among_sampled_ones(scripted, monkeypatch, quantile):
    trainer, batch = scripted
    sampled = batch["turn_ids"] > 0
    grad = gradient(
        trainer, batch, monkeypatch, "dapo", top_entropy_quantile=quantile, epsilon_low=9.0, epsilon_high=9.0
    )
    assert (grad[~sampled] == 0).all()
    assert (grad != 0).sum().item() == pytest.approx(quantile * sampled.sum().item(), abs=1.5)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_an_entropy_bonus_acts_on_sampled_tokens_only(scripted, monkeypatch, loss_type):
    trainer, batch = scripted
    entropies = torch.rand(batch["completion_ids"].shape).requires_grad_()
    fake = lambda *args, **kwargs: (torch.zeros_like(entropies), entropies, None)  # noqa: E731
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", fake)
    for name, value in {
        "_packs": False,
        "_entropy_bonus_enabled": True,
        "entropy_coef": 0.1,
        "loss_type": loss_type,
        "beta": 0.0,
    }.items():
        monkeypatch.setattr(trainer, name, value)
    trainer._compute_loss(trainer.model, batch).backward()
    sampled = batch["turn_ids"] > 0
    assert (entropies.grad[~sampled] == 0).all() and (entropies.grad[sampled] < 0).all()


def test_a_batch_of_cut_answers_gives_no_gradient_and_no_nan(scripted, monkeypatch):
    trainer, batch = scripted
    nothing = {**batch, "turn_ids": torch.zeros_like(batch["turn_ids"])}
    for loss_type in LOSSES:
        grad = gradient(trainer, nothing, monkeypatch, loss_type, beta=0.01)
        assert (grad == 0).all(), loss_type
