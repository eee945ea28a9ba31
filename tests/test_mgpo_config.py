import math

import pytest
import torch
from trl import GRPOConfig, ModelConfig, TrlParser

from mgpo_trl import MGPOConfig
from mgpo_trl.processing import parse_pixels


def test_the_papers_values_are_the_defaults():
    args = MGPOConfig("out")
    assert (args.num_rounds, args.beta, args.learning_rate, args.num_generations) == (2, 0.01, 1e-6, 8)
    assert (args.temperature, str(args.lr_scheduler_type.value)) == (1.0, "constant")
    assert (args.max_pixels, args.min_pixels) == (1280 * 28 * 28, 256 * 28 * 28) == (1_003_520, 200_704)
    assert (args.min_box_side, args.max_box_aspect) == (28, 100)
    assert args.token_budgets == [8192, 8192]
    assert args.turn_loss_weights is None and args.coordinates == "auto" and args.zoom_from == "crop"


def test_every_other_default_is_trls():
    ours, theirs = MGPOConfig("out", use_cpu=True, bf16=False), GRPOConfig("out", use_cpu=True, bf16=False)
    differs = {name for name, value in theirs.to_dict().items() if ours.to_dict()[name] != value}
    assert differs == {"beta", "max_completion_length", "lr_scheduler_type"}


@pytest.mark.parametrize(
    "options, budgets",
    [
        ({"max_completion_length": 16}, [16, 16]),
        ({"max_completion_length": 16, "num_rounds": 3}, [16, 16, 16]),
        ({"round_token_budgets": [12, 4]}, [12, 4]),
        ({"num_rounds": 1, "round_token_budgets": [7]}, [7]),
    ],
)
def test_budgets_of_the_rounds(options, budgets):
    assert MGPOConfig("out", **options).token_budgets == budgets


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_rounds": 0}, "`num_rounds` must be >= 1, got 0. Use 1 for single-round GRPO."),
        ({"max_completion_length": 0}, r"Every round needs a budget of at least one token, got \[0, 0\]. Raise"),
        ({"max_completion_length": None}, r"Every round needs a budget of at least one token, got \[None, None\]"),
        ({"round_token_budgets": [8, 0]}, r"Every round needs a budget of at least one token, got \[8, 0\]. Raise"),
        ({"round_token_budgets": [8]}, r"`round_token_budgets` must have one value for each of the 2 rounds"),
        ({"round_token_budgets": [1.5, 2]}, r"at least one token, got \[1.5, 2\]"),
        ({"turn_loss_weights": [1.0]}, r"`turn_loss_weights` must have one value for each of the 2 rounds"),
        ({"turn_loss_weights": [0.0, 0.0]}, r"finite, >= 0 and not all zero, got \[0.0, 0.0\]"),
        ({"turn_loss_weights": [-1.0, 1.0]}, r"finite, >= 0 and not all zero, got \[-1.0, 1.0\]"),
        ({"turn_loss_weights": [math.nan, 1.0]}, r"finite, >= 0 and not all zero, got \[nan, 1.0\]"),
        ({"max_pixels": 7056}, r"`min_pixels` \(200704\) is above `max_pixels` \(7056\). Lower it or raise the cap."),
        ({"max_pixels": "big"}, "A pixel cap must look like 1003520 or 1280x28x28, got 'big'"),
        ({"min_pixels": 0}, "A pixel cap must be positive, got 0"),
        ({"coordinates": "px"}, r"`coordinates` must be one of \['auto', 'absolute', 'relative_1000'\], got 'px'"),
        ({"zoom_from": "view"}, r"`zoom_from` must be one of \['crop', 'original'\], got 'view'"),
        ({"min_box_side": -1}, "`min_box_side` must be >= 0, got -1"),
        ({"max_box_aspect": 1.0}, "`max_box_aspect` must be above 1, got 1.0"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False, got True: .* Leave it out"),
        ({"chat_template_kwargs": {"a": 1}}, r"`chat_template_kwargs` has no effect on the rounds, got {'a': 1}. Put"),
        ({"num_generations": 3}, r"\(8\) must be divisible by num_generations \(3\)"),
        ({"num_generations": 1}, "at least 2 generations per prompt"),
    ],
)
def test_a_bad_value_stops_with_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MGPOConfig("out", **options)
    assert "\n" not in str(error.value)


def test_without_an_accelerator_training_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: False)
    args = MGPOConfig("out")
    assert args.use_cpu and args.bf16 is False
    assert MGPOConfig("out", bf16=True).bf16 is True


def test_with_an_accelerator_nothing_is_forced(monkeypatch):
    monkeypatch.setattr(GRPOConfig, "__post_init__", lambda self: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *args, **kwargs: True)
    args = MGPOConfig("out", num_rounds=1, save_strategy="no")
    assert args.use_cpu is False and args.bf16 is None


def parse(*arguments):
    return TrlParser((MGPOConfig, ModelConfig)).parse_args_and_config(list(arguments))[0]


def test_a_pixel_cap_on_the_command_line_is_a_number_or_a_product():
    assert parse("--output_dir", "out").max_pixels == 1_003_520
    assert parse("--output_dir", "out", "--max_pixels", "640x28x28").max_pixels == 501_760
    args = parse("--output_dir", "out", "--max_pixels", "7056", "--min_pixels", "3136")
    assert (args.max_pixels, args.min_pixels) == (7056, 3136)


def test_lists_and_choices_on_the_command_line(capsys):
    args = parse("--output_dir", "out", "--round_token_budgets", "12", "4", "--turn_loss_weights", "0", "1.5")
    assert (args.round_token_budgets, args.turn_loss_weights) == ([12, 4], [0.0, 1.5])
    with pytest.raises(SystemExit):
        parse("--output_dir", "out", "--coordinates", "pixels")
    assert "invalid choice: 'pixels'" in capsys.readouterr().err


@pytest.mark.parametrize("written, pixels", [("7056", 7056), ("84x84", 7056), ("'84x84'", 7056), ("9x28x28", 7056)])
def test_a_recipe_in_yaml_and_the_command_line_over_it(tmp_path, written, pixels):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: out\nmax_pixels: {written}\nmin_pixels: 3136\nround_token_budgets: [12, 4]\nbeta: 0.0\n"
    )
    args = parse("--config", str(recipe))
    assert (args.max_pixels, args.round_token_budgets, args.beta) == (pixels, [12, 4], 0.0)
    args = parse("--config", str(recipe), "--max_pixels", "16x28x28", "--beta", "0.02")
    assert (args.max_pixels, args.beta) == (12_544, 0.02)


@pytest.mark.parametrize(
    "value, pixels", [(7056, 7056), ("7056", 7056), ("1280x28x28", 1_003_520), (" 84 X 84 ", 7056), ("9*28*28", 7056)]
)
def test_parse_pixels(value, pixels):
    assert parse_pixels(value) == pixels


@pytest.mark.parametrize("value", ["", "x", "28x", "x28", "1e6", "-5", -5, 1.5, None, "28 28", "0x28", 0, True])
def test_parse_pixels_refuses(value):
    with pytest.raises(ValueError, match="A pixel cap must"):
        parse_pixels(value)
