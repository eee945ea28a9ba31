"""What the documents say can be typed: options exist, files exist, Python snippets compile and name what there is."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from commands import FENCE, ROOT, commands_of
from transformers.trainer_utils import HubStrategy
from trl import TrlParser

from mgpo_trl import MGPOConfig, scripts
from mgpo_trl.adapters import quantization_config
from mgpo_trl.cli import build_parser
from mgpo_trl.data.benchmarks import BENCHMARKS
from mgpo_trl.evaluation.arguments import EvalArguments
from mgpo_trl.launch_checks import check_launch, check_quantized

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe_memory  # noqa: E402

FILES = {"train.py", *(str(path.relative_to(ROOT)) for path in (ROOT / "ds_configs").glob("*.yaml"))}
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "LOG.md"])


def named(path):
    return path.name


def lines_of(path):
    """Every command of a document: fenced ones, and those in tables between backticks."""
    text = path.read_text(encoding="utf-8")
    fenced = [words for language, block in FENCE.findall(text) if language == "bash" for words in commands_of(block)]
    inline = [commands_of(code)[0] for code in re.findall(r"`(python eval\.py [^`]+)`", text)]
    return fenced + inline


def without_redirection(words):
    return words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in lines_of(path):
        if words[:2] == ["python", "eval.py"]:
            (args,) = TrlParser((EvalArguments,)).parse_args_and_config(words[2:])
            own = args.dataset is not None and args.dataset.startswith("data/")  # rows that the page speaks of
            assert args.rescore or args.compare or own or args.dataset.split(":")[0] in BENCHMARKS, words
        elif words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            assert launched.training_script == "train.py" and (launched.config_file or "train.py") in FILES, words
            scripts.parse_training(launched.training_script_args)
        elif words[0] == "mgpo":
            build_parser().parse_args(without_redirection(words[1:]))
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / "src" / (words[2].replace(".", "/") + ".py")).is_file(), words
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_more_gpus_keep_the_batch_of_a_recipe(path, monkeypatch):
    """Rollouts of an update, and updates that share one sampling; and the launch passes its checks."""
    monkeypatch.chdir(ROOT)
    launches = [words[2:] for words in lines_of(path) if words[:2] == ["accelerate", "launch"] and "--config" in words]
    for launched in map(launch_command_parser().parse_args, launches):
        options = launched.training_script_args
        recipe = options[options.index("--config") + 1]
        machine = recipe_memory.MACHINES.get(Path(recipe).stem, recipe_memory.Machine(1, 0))
        file = yaml.safe_load(Path(launched.config_file).read_text()) if launched.config_file else {}
        processes = launched.num_processes or file.get("num_processes", 1)
        assert batch_of(options, processes, monkeypatch) == batch_of(["--config", recipe], machine.gpus, monkeypatch)


def batch_of(options, processes, monkeypatch):
    monkeypatch.setattr(MGPOConfig, "world_size", processes)
    _, args, model_args = scripts.parse_training(options)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: name)  # as if vLLM were there
        check_launch(args, environment={})
    check_quantized(quantization_config(model_args), args, environment={})
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return rollouts, max(1, args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https:") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_python_snippets_compile(path):
    for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
        if language == "python":
            compile(block, path.name, "exec")


def test_every_file_for_a_launcher_has_a_command_and_a_row():
    path = ROOT / "docs" / "distributed.md"
    commands = {word for words in lines_of(path) for word in words}
    files = FILES - {"train.py"}
    assert files and files <= commands
    assert [file for file in files if f"| `{file.removeprefix('ds_configs/')}` |" not in path.read_text()] == []


def test_every_published_set_has_a_card():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in BENCHMARKS if f"`{name}`" not in text and f"--dataset {name}" not in text] == []


def test_pushing_is_told_as_it_is(tmp_path):
    """Its options and strategies exist, its private files stand in `.gitignore`, its commands parse."""
    from mgpo_trl import push
    from mgpo_trl.hub import leave_out_private

    text = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    help_text = TrlParser((scripts.MGPOScriptArguments, MGPOConfig)).format_help()
    named = set(re.findall(r"`(--(?:hub_|card_)\w+)", text))
    assert len(named) >= 7 and [option for option in named if option not in help_text] == []
    assert set(re.findall(r"^- `(\w+)`", text, re.MULTILINE)) == {strategy.value for strategy in HubStrategy}
    leave_out_private(tmp_path)
    assert all(
        name in (tmp_path / ".gitignore").read_text() for name in ("rollouts.jsonl", "pictures.jsonl", "completions/")
    )
    pushes = [words for words in lines_of(ROOT / "docs" / "hub.md") if words[2:3] == ["mgpo_trl.push"]]
    assert len(pushes) == 3
    for words in pushes:
        with pytest.raises(ValueError, match="There is no model in 'outputs/run'"):
            push.main(words[3:])
