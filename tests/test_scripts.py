import json
import subprocess
import sys

import pytest
import yaml
from commands import ROOT, environment, load_script
from peft import get_peft_model
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    PreTrainedModel,
    SmolVLMConfig,
)
from transformers.trainer_utils import get_last_checkpoint

from mgpo_trl import MGPOConfig, scripts
from mgpo_trl.adapters import lora_config
from mgpo_trl.builtin.recipe import RECIPES
from mgpo_trl.builtin.tiny import build_tiny
from mgpo_trl.data import DataError
from mgpo_trl.memory import GIB
from mgpo_trl.processing import parse_pixels
from mgpo_trl.rewards import accuracy_reward, format_reward

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe_memory  # noqa: E402

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPE_FILES = [path for path in CONFIGS if path.name != "builtin.yaml"]


def named(path):
    return path.stem


def parse(*arguments):
    return scripts.parse_training([str(argument) for argument in arguments])


# recipes


def test_there_are_recipes():
    wanted = {f"qwen2_5_vl_{size}_{kind}" for size in ("3b", "7b") for kind in ("lora", "full", "qlora_24gb")}
    assert {path.stem for path in RECIPE_FILES} >= wanted
    assert {path.stem for path in RECIPE_FILES} == set(recipe_memory.MACHINES)


@pytest.mark.parametrize("name", recipe_memory.MACHINES)
def test_the_memory_table_is_the_estimate_and_every_recipe_fits_its_machine(name):
    machine = recipe_memory.MACHINES[name]
    assert recipe_memory.row(name, machine) in (ROOT / "configs" / "README.md").read_text()
    assert recipe_memory.estimate(name, machine)[0].peak < 0.95 * machine.gib * GIB


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_every_value_of_a_recipe_arrives(path):
    """Each key belongs to one of the three groups of options, and the parsed value is the one that is written."""
    parsed = parse("--config", path)
    assert isinstance(parsed[1], MGPOConfig)
    for key, written in yaml.safe_load(path.read_text()).items():
        holders = [options for options in parsed if key in type(options).__dataclass_fields__]
        assert holders, key
        for options in holders:
            value = getattr(options, key)
            expected = parse_pixels(written) if key in ("max_pixels", "min_pixels") else written
            assert getattr(value, "value", value) == expected and type(value) is not type(None), key


@pytest.mark.parametrize("path", RECIPE_FILES, ids=named)
def test_recipes_keep_the_papers_values(path):
    _, args, model_args = parse("--config", path)
    rounds = 1 if path.stem.startswith("counting") else 2
    assert (args.num_rounds, args.beta, args.num_generations) == (rounds, 0.01, 8)
    assert args.max_pixels == 1280 * (32 if "qwen3" in path.stem else 28) ** 2  # 1280 image tokens
    assert (args.temperature, args.lr_scheduler_type.value) == (1.0, "constant")
    if "full" in path.stem:
        assert args.learning_rate == 1e-6 and not model_args.use_peft and args.token_budgets[-1] == 8192
        eight_gpus = 8 * args.per_device_train_batch_size
        assert eight_gpus * args.steps_per_generation == 512 * args.num_generations
        assert eight_gpus * args.gradient_accumulation_steps == 128 * args.num_generations


@pytest.mark.parametrize("path", [path for path in RECIPE_FILES if "full" in path.stem], ids=named)
def test_a_colocated_vllm_has_room_for_the_longest_conversation_and_little_more(path):
    """Unset, it would ask for a cache of the 128,000 tokens that the model knows, and not start."""
    _, args, _ = parse("--config", path)
    images = args.num_rounds * args.max_pixels // 28**2
    assert args.use_vllm and images + sum(args.token_budgets) + 1024 < args.vllm_max_model_length < 20_000


@pytest.mark.parametrize("path", [path for path in RECIPE_FILES if "lora" in path.stem], ids=named)
def test_lora_goes_on_the_language_layers_and_not_on_the_vision_tower(path):
    script_args, _, model_args = parse("--config", path)
    assert model_args.load_in_4bit == ("qlora" in path.stem) == model_args.use_bnb_nested_quant
    model, _ = build_tiny()
    adapted = get_peft_model(model, lora_config(model_args, script_args.lora_on)).targeted_module_names
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapted) == len(names) * model.config.text_config.num_hidden_layers
    assert {name.rpartition(".")[2] for name in adapted} == set(names)
    assert not [name for name in adapted if "visual" in name or "language_model" not in name]
    visual = [name for name, _ in model.named_modules() if "visual" in name and name.endswith(names)]
    assert visual  # the tower has layers of the same names, so the exclusion is what keeps them out


# command line over YAML over recipe over defaults


def test_which_source_wins(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: builtin:needle\nlearning_rate: 5.0e-4\nmax_steps: 7\nlogging_steps: 3\n")
    recipe = RECIPES["needle"].rl_options()
    _, args, _ = parse("--config", config, "--max_steps", 2)
    assert args.max_steps == 2  # command line
    assert args.learning_rate == 5e-4 != recipe["learning_rate"]  # YAML
    assert args.logging_steps == 3 != recipe["logging_steps"]
    assert args.num_generations == recipe["num_generations"] == 16 != MGPOConfig("out").num_generations  # recipe
    assert (args.num_rounds, args.zoom_from) == (2, "crop")  # defaults


def test_the_recipe_is_for_the_builtin_task_only():
    _, args, _ = parse("--dataset_name", "my.jsonl", "--model_name_or_path", "m", "--output_dir", "out")
    defaults = MGPOConfig("out")
    for name in RECIPES["refer"].rl_options():
        if name not in ("output_dir", "bf16"):
            assert getattr(args, name) == getattr(defaults, name), name
    assert args.max_pixels != RECIPES["refer"].rl_options()["max_pixels"]


@pytest.mark.parametrize("level", sorted(RECIPES))
def test_no_arguments_and_the_named_level_use_its_recipe(level):
    arguments = [] if level == "refer" else ["--dataset_name", f"builtin:{level}"]
    script_args, args, model_args = parse(*arguments)
    assert script_args.dataset_name == f"builtin:{level}" and scripts.is_builtin_run(script_args, model_args)
    for name, value in RECIPES[level].rl_options().items():
        parsed = getattr(args, name)
        assert getattr(parsed, "value", parsed) == ([] if name == "report_to" else value), name


def test_a_builtin_dataset_with_a_model_is_an_ordinary_run():
    script_args, args, model_args = parse("--dataset_name", "builtin:needle", "--model_name_or_path", "m")
    assert not scripts.is_builtin_run(script_args, model_args) and args.max_pixels == 84 * 84


def test_no_arguments_start_the_builtin_run(monkeypatch):
    import mgpo_trl.builtin.run as run

    calls = []
    monkeypatch.setattr(run, "run_builtin", lambda *parsed: calls.append(parsed))
    load_script("train").main([])
    ((script_args, args, model_args),) = calls
    assert script_args.dataset_name == "builtin:refer" and model_args.model_name_or_path is None
    assert args.output_dir == "outputs/builtin"


@pytest.mark.parametrize(
    "arguments, pixels, budgets",
    [
        (["--max_pixels", "1280x28x28", "--round_token_budgets", "5", "6"], 1_003_520, [5, 6]),
        (["--max_pixels", "1003520", "--max_completion_length", "9"], 1_003_520, [9, 9]),
    ],
)
def test_values_of_the_command_line_have_their_types(arguments, pixels, budgets):
    _, args, _ = parse("--dataset_name", "my.jsonl", *arguments)
    assert (args.max_pixels, args.token_budgets) == (pixels, budgets)


@pytest.mark.parametrize("where", ["command line", "YAML"])
def test_an_unknown_option_is_an_error_that_names_it(tmp_path, where):
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: my.jsonl\n" + ("num_round: 2\n" if where == "YAML" else ""))
    arguments = [] if where == "YAML" else ["--zoom_twice", "true"]
    with pytest.raises(ValueError, match="num_round" if where == "YAML" else "zoom_twice"):
        parse("--config", config, *arguments)


def test_a_level_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"no built-in dataset 'builtin:haystack'. Use \['builtin:needle'"):
        parse("--dataset_name", "builtin:haystack")


# rewards, resume, columns


def test_rewards_by_name():
    assert scripts.resolve_rewards(["format_reward", "accuracy_reward"]) == [format_reward, accuracy_reward]
    assert scripts.resolve_rewards(["mgpo_trl.rewards.format_reward"]) == [format_reward]


def test_a_reward_of_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "brevity_of_this_test.py").write_text("def short(completions, **kwargs):\n    return [0.25]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    (reward,) = scripts.resolve_rewards(["brevity_of_this_test.short"])
    assert reward([]) == [0.25]


@pytest.mark.parametrize("name", ["acuracy_reward", "mgpo_trl.rewards.none", "no_such_module.reward", "", "json."])
def test_a_reward_that_does_not_exist_is_named(name):
    with pytest.raises(
        ValueError, match=f"Reward function '{name}' was not found.*accuracy_reward.*dotted import path"
    ):
        scripts.resolve_rewards([name])


@pytest.mark.parametrize(
    "wanted, expected",
    [
        *((text, "run/checkpoint-20") for text in ("true", "True", "latest", "last", "yes", True)),
        *((text, None) for text in (None, "false", "False", "none", "no")),
        ("run/checkpoint-9", "run/checkpoint-9"),
    ],
)
def test_resume_point(wanted, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step, state in ((9, "{}"), (20, "{}"), (100, None), (110, '{"epoch')):  # the last two: killed while saving
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoint-{step}/optimizer.pt").touch()
        if state is not None:
            (tmp_path / f"run/checkpoint-{step}/trainer_state.json").write_text(state)
    args = MGPOConfig("run", resume_from_checkpoint=wanted)
    assert scripts.resume_point(args) == expected


@pytest.mark.parametrize("output_dir", ["", "run"])
def test_nothing_to_resume_from(output_dir, tmp_path):
    args = MGPOConfig(str(tmp_path / output_dir), resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="no checkpoint in .* Leave `--resume_from_checkpoint` out"):
        scripts.resume_point(args)


def test_columns():
    assert scripts.parse_columns(None) is None
    assert scripts.parse_columns('{"question": "text"}') == {"question": "text"}
    for wrong in ("question=text", '["question"]', '{"question": 1}', '{"question"', "null"):
        with pytest.raises(ValueError, match="`columns` must be a JSON object such as") as caught:
            scripts.parse_columns(wrong)
        assert repr(wrong) in str(caught.value)


def test_columns_and_limit_reach_the_rows(tmp_path, rows):
    for row in rows:
        (tmp_path / row["image"]["path"]).write_bytes(row["image"]["bytes"])
    lines = [{"file": row["image"]["path"], "text": row["question"], "gold": "x"} for row in rows]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = json.dumps({"image": "file", "question": "text", "answer": "gold"})
    loaded = scripts.open_rows(str(data), columns=names, limit=3)
    assert [row["question"] for row in loaded.dataset] == [row["question"] for row in rows][:3]


def test_training_sets(tmp_path):
    batch = ("--per_device_eval_batch_size", 16)
    script_args, args, _ = parse("--limit", 3, "--eval_strategy", "steps", "--dataset_test_split", "heldout", *batch)
    train, evaluation = scripts.open_training_sets(script_args, args)
    assert len(train.dataset) == 3 and len(evaluation.dataset) == 512
    assert train.dataset[0]["id"].startswith("refer-train") and evaluation.dataset[0]["id"].startswith("refer-heldout")
    args.eval_strategy = "no"
    assert scripts.open_training_sets(script_args, args)[1] is None


# bad configuration stops before the model loads


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(refuse))


@pytest.fixture
def my_data(tmp_path, rows):
    """A JSONL file with two good rows."""
    for row in rows:
        (tmp_path / row["image"]["path"]).write_bytes(row["image"]["bytes"])
    lines = [
        {
            "image": row["image"]["path"],
            "question": row["question"],
            "choices": row["choices"],
            "answer": row["answer"],
        }
        for row in rows
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_arguments(tiny_dir, data, tmp_path):
    options = {
        "model_name_or_path": tiny_dir,
        "dataset_name": data,
        "output_dir": tmp_path / "out",
        "max_pixels": 84 * 84,
        "min_pixels": 56 * 56,
        "max_completion_length": 4,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "report_to": "none",
    }
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def test_the_good_configuration_does_load_the_model(tiny_dir, my_data, tmp_path, no_weights):
    """Else the cases below would say nothing."""
    with pytest.raises(AssertionError, match="the weights were loaded"):
        load_script("train").main(train_arguments(tiny_dir, my_data, tmp_path))


BAD = {
    "no rounds": (["--num_rounds", "0"], "`num_rounds` must be >= 1, got 0"),
    "no answer budget": (["--round_token_budgets", "4", "0"], r"at least one token, got \[4, 0\]"),
    "one budget for two rounds": (["--round_token_budgets", "8"], "one value for each of the 2 rounds"),
    "pixels": (["--max_pixels", "many"], "must look like 1003520 or 1280x28x28, got 'many'"),
    "pixels upside down": (["--max_pixels", "784"], r"`min_pixels` \(3136\) is above `max_pixels` \(784\)"),
    "generations": (["--num_generations", "4"], "divisible by"),
    "reward": (["--reward_funcs", "acuracy_reward"], "'acuracy_reward' was not found"),
    "columns": (["--columns", "question=text"], "must be a JSON object"),
    "no file": (["--dataset_name", "nowhere/rows.jsonl"], "nowhere/rows.jsonl"),
    "column": (["--columns", '{"question": "prompt"}'], "prompt"),
    "prompts": (["--prompts_file", "nowhere.yaml"], "nowhere.yaml"),
    "turn weights": (["--turn_loss_weights", "0", "0"], "not all zero"),
    "split": (["--dataset_train_split", "dev"], "no split `dev`"),
    "checkpoint": (["--resume_from_checkpoint", "nowhere/checkpoint-5"], "nowhere/checkpoint-5"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_configuration_stops_before_the_model_loads(case, tiny_dir, my_data, tmp_path, no_weights):
    arguments, message = BAD[case]
    with pytest.raises(Exception, match=message) as caught:
        load_script("train").main([*train_arguments(tiny_dir, my_data, tmp_path), *arguments])
    assert isinstance(caught.value, (ValueError, OSError)), caught.value


def test_a_fractional_number_of_rounds_in_yaml_is_refused(tiny_dir, my_data, tmp_path, no_weights):
    """argparse converts texts only: numbers of a YAML file come as they are."""
    config = tmp_path / "run.yaml"
    config.write_text("num_rounds: 2.5\n")
    with pytest.raises(ValueError, match="`num_rounds`.*2.5"):
        load_script("train").main([*train_arguments(tiny_dir, my_data, tmp_path), "--config", str(config)])


def test_a_value_outside_the_choices_is_refused_on_the_command_line_and_in_yaml(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--dataset_name", "my.jsonl", "--coordinates", "pixels")
    assert "invalid choice: 'pixels'" in capsys.readouterr().err
    config = tmp_path / "run.yaml"
    config.write_text("dataset_name: my.jsonl\ncoordinates: pixels\n")
    with pytest.raises(ValueError, match="`coordinates` must be one of .*got 'pixels'"):
        parse("--config", config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": "gone.png"}, "row 1.*image.*gone.png"),
        ({"answer": None}, "row 1.*answer"),
        ({"answer": "a fifth thing"}, "row 1.*answer.*fifth thing"),
    ],
)
def test_a_bad_row_stops_before_the_model_loads(change, message, tiny_dir, my_data, tmp_path, no_weights):
    rows = [json.loads(line) for line in my_data.read_text().splitlines()]
    rows[1] |= change
    my_data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load_script("train").main(train_arguments(tiny_dir, my_data, tmp_path))


@pytest.mark.parametrize("kind", [Gemma3Config, InternVLConfig, SmolVLMConfig, Idefics3Config, LlamaConfig])
def test_another_family_stops_before_the_weights_load(kind, my_data, tmp_path, no_weights):
    """From its configuration alone: there is nothing else in the directory."""
    kind().save_pretrained(tmp_path / "model")
    arguments = train_arguments(tmp_path / "model", my_data, tmp_path)
    message = f"Models of type '{kind.model_type}' are not supported.*'qwen2_5_vl', 'qwen3_vl'"
    with pytest.raises(ValueError, match=message):
        load_script("train").main(arguments)


def test_a_directory_without_an_image_processor_stops_before_the_weights_load(
    tiny_dir, my_data, tmp_path, no_weights, monkeypatch
):
    """`AutoProcessor` silently returns the tokenizer where it does not know the processor's class."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(ValueError, match="without an image processor: not a vision-language model"):
        load_script("train").main(train_arguments(tiny_dir, my_data, tmp_path))


def test_a_model_that_is_nowhere_is_named(my_data, tmp_path):
    with pytest.raises(ValueError, match="There is no model 'outputs/gone': no directory here with a `config.json`"):
        load_script("train").main(train_arguments("outputs/gone", my_data, tmp_path))
    arguments = ["--model", "outputs/gone", "--dataset", "builtin:refer", "--output_dir", str(tmp_path / "eval")]
    with pytest.raises(ValueError, match="There is no model 'outputs/gone'"):
        load_script("eval").main(arguments)


@pytest.mark.parametrize("words", [["--config", "gone.yaml"], ["--config=gone.yaml"], ["--config"]])
@pytest.mark.parametrize("script", ["train", "eval"])
def test_a_configuration_file_that_is_nowhere_is_named(script, words):
    with pytest.raises(ValueError, match="There is no file '(gone.yaml)?' for `--config`"):
        load_script(script).main(words)


def test_rows_to_evaluate_on_that_are_nowhere_are_asked_for(my_data):
    script_args, args, _ = parse("--dataset_name", my_data, "--eval_strategy", "steps")
    with pytest.raises(DataError, match="has no split `test`.*`--eval_dataset_name` and `--dataset_test_split`"):
        scripts.open_training_sets(script_args, args)


def test_a_missing_model_name_is_asked_for(my_data, tmp_path):
    arguments = train_arguments("", my_data, tmp_path)[2:]
    with pytest.raises(ValueError, match="No model was named. Give `--model_name_or_path`"):
        load_script("train").main(arguments)


def test_the_record_is_written_before_the_model_loads(tiny_dir, my_data, tmp_path, no_weights):
    with pytest.raises(AssertionError, match="the weights were loaded"):
        load_script("train").main([*train_arguments(tiny_dir, my_data, tmp_path), "--seed", "5"])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["seed"], run["max_pixels"], run["num_rounds"]) == (5, 84 * 84, 2)
    assert run["config"]["script"]["dataset_name"] == str(my_data)
    assert run["config"]["model"]["model_name_or_path"] == str(tiny_dir)
    assert get_last_checkpoint(tmp_path / "out") is None


# help


@pytest.mark.parametrize("script", ["train", "eval"])
def test_help_needs_no_torch(script):
    """Help is asked for often; importing torch and TRL's trainer takes ten seconds."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script) + '.py'!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.stderr.write('torch' if 'torch' in sys.modules else 'no torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)
    assert "--num_rounds" in done.stdout and "--max_pixels" in done.stdout
    assert done.stderr.endswith("no torch"), done.stderr[-2000:]
