"""What the documents say can be typed: options exist, files exist, Python snippets compile and name what there is."""

import re

import pytest
from accelerate.commands.launch import launch_command_parser
from commands import ROOT
from test_readme import FENCE, commands_of
from trl import TrlParser

from mgpo_trl import scripts
from mgpo_trl.data.benchmarks import BENCHMARKS
from mgpo_trl.evaluation.arguments import EvalArguments

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


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in lines_of(path):
        if words[:2] == ["python", "eval.py"]:
            (args,) = TrlParser((EvalArguments,)).parse_args_and_config(words[2:])
            assert args.rescore or args.compare or args.dataset.split(":")[0] in BENCHMARKS, words
        elif words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            assert launched.training_script == "train.py" and (launched.config_file or "train.py") in FILES, words
            scripts.parse_training(launched.training_script_args)
        elif words[:2] == ["python", "-m"]:
            assert (ROOT / "src" / (words[2].replace(".", "/") + ".py")).is_file(), words
        else:
            assert words[0] == "python" and (ROOT / words[1]).is_file(), words


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
