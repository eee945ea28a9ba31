"""What the README says is so: its commands run in a short variant, its links and files exist, its tree is complete."""

import json
import os
import re
import shutil
import subprocess

import pytest
from commands import (
    FENCE,
    ROOT,
    SMALL_BATCH,
    arguments_of,
    commands_of,
    environment,
    kind_of,
    load_script,
    output_of,
    run_short,
    shorten_builtin,
    write_rows,
)
from PIL import Image

from mgpo_trl import scripts
from mgpo_trl.builtin import warm_start as warming
from mgpo_trl.builtin.recipe import RECIPES
from mgpo_trl.prompts import PromptTemplate

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "mgpo_trl"
NOT_LISTED = {
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}


def blocks(*languages):
    return [text for language, text in FENCE.findall(README) if language in languages]


COMMANDS = [words for text in blocks("bash", "sh", "shell", "console") for words in commands_of(text)]


def test_the_first_two_commands_are_train_and_test():
    assert COMMANDS[:2] == [["make", "train"], ["make", "test"]]


def test_every_command_is_one_that_is_run_below():
    assert {"make", "train", "eval", "builtin"} == {kind_of(words) for words in COMMANDS}, COMMANDS


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@@\w*|TODO|XXX", README)


# the commands run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory like the repository, where commands leave their outputs."""
    directory = tmp_path_factory.mktemp("readme")
    for name in ("train.py", "eval.py", "configs", "Makefile", "pyproject.toml", "constraints.txt"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def planned(directory, *arguments):
    """The lines that make would run, also where these tests run under make themselves."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("words", [w for w in COMMANDS if kind_of(w) == "make"], ids=" ".join)
def test_make_targets_exist(words, workplace):
    """Make plans the target, and the set-up with it where nothing is installed: torch before everything else."""
    lines = planned(workplace, *arguments_of(words))
    installs = [line for line in lines if "pip install" in line]
    assert installs and installs[0].endswith(" torch") and all("constraints.txt" in line for line in installs)
    wanted = {"train": "accelerate launch .*train.py", "test": "python -m pytest"}[words[1]]
    assert re.search(wanted, lines[-1])


@pytest.mark.slow
def test_make_train_runs(workplace, tmp_path):
    """The line of the Makefile as a person's shell runs it; only the warm start is short, through a filled cache."""
    cache = tmp_path / "cache"
    fill_cache(cache)
    (workplace / ".venv").mkdir()
    (workplace / ".venv" / ".ready").touch()
    short = "--max_steps 2 --limit 8 --max_completion_length 2 --per_device_train_batch_size 16"
    short += " --reward_funcs commands.every_second_is_right"
    (line,) = planned(workplace, "train", f"ARGS={short}")
    assert line.startswith(".venv/bin/accelerate launch ")
    variables = environment(XDG_CACHE_HOME=str(cache), PYTHONPATH=f"{ROOT / 'src'}:{ROOT / 'tests'}")
    done = subprocess.run(
        line.removeprefix(".venv/bin/"), shell=True, cwd=workplace, env=variables, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert said.count("Training a small model on the built-in task") == 1
    result = json.loads((workplace / "outputs/builtin/result.json").read_text())
    assert {"level", "decoding", "base", "trained", "n", "seed", "seconds", "commit"} <= set(result)
    assert result["n"] == 512 and result["level"] == "refer"
    for part in ("base", "trained"):
        assert {"accuracy", "accuracy_stderr", "hit_rate", "valid_ratio"} <= set(result[part])
    assert {"warm_start", "train", "total"} <= set(result["seconds"])
    assert result["seconds"]["warm_start_cached"], "the filled cache was not found, and the real warm start ran"
    assert (workplace / "outputs/builtin/before_after.png").read_bytes().startswith(b"\x89PNG")
    for word in ("accuracy", "hit rate", "valid boxes", "+-"):  # the figures with their standard errors
        assert word in said


def fill_cache(cache):
    """Put a model where the warm start of the default run looks for its result."""
    seed = scripts.parse_training([])[1].seed
    with pytest.MonkeyPatch.context() as patch:
        short = shorten_builtin(patch, cache)["refer"].warm_start
        made = warming.warm_start("refer", seed, recipe=short).model_dir
    full = RECIPES["refer"].warm_start
    name = f"refer-seed{seed}-{warming._fingerprint('refer', seed, full, PromptTemplate())}"
    shutil.move(made, made.parent / name)


@pytest.fixture(scope="module")
def short_task(workplace, tmp_path_factory):
    """The workplace as current directory, with a short built-in task."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_builtin(patch, tmp_path_factory.mktemp("cache"))
        patch.chdir(workplace)
        yield


@pytest.fixture(scope="module")
def my_data(workplace, rows):
    """`data/train.jsonl` and `data/test.jsonl`, as the README asks for them."""
    for name in ("train", "test"):
        write_rows(workplace / "data" / f"{name}.jsonl", rows)
    write_vstar(workplace / "data" / "vstar")


def write_vstar(folder):
    """Two questions in the format of V*."""
    (folder / "direct_attributes").mkdir(parents=True)
    lines = []
    for number in range(2):
        name = f"direct_attributes/sa_{number}.jpg"
        Image.new("RGB", (336, 336), (90 * number, 90, 0)).save(folder / name)
        facts = {"options": ["red", "blue"], "bbox": [[20, 20, 90, 60]]}
        (folder / name).with_suffix(".json").write_text(json.dumps(facts))
        text = "What is it?\n(A) red\n(B) blue"
        row = {"image": name, "text": text, "category": "direct_attributes", "label": "A", "question_id": number}
        lines.append(json.dumps(row) + "\n")
    (folder / "test_questions.jsonl").write_text("".join(lines))


def test_the_commands_run_one_after_the_other(short_task, my_data, tiny_dir, workplace):
    """In the order of the README, each on what those before it left behind; `make train` in this process."""
    load_script("train").main(SMALL_BATCH)
    for words in COMMANDS:
        if kind_of(words) == "make":
            continue
        run_short(words, {"outputs/run": str(tiny_dir), "vstar": "vstar:data/vstar"}, tiny_dir)
        directory = output_of(words)
        leaves = {"eval": "report.json", "train": "run.json", "builtin": "result.json"}[kind_of(words)]
        for option, other in (("--compare", "compare.json"), ("--protocol", "protocols.json")):
            leaves = other if option in words else leaves
        assert (workplace / directory / leaves).is_file(), words


@pytest.mark.parametrize("number", range(len(blocks("json"))))
def test_example_rows_are_rows(number):
    from mgpo_trl.data import normalise_row

    for index, line in enumerate(blocks("json")[number].strip().splitlines()):
        row = normalise_row(json.loads(line), index=index, check_images=False)
        assert row["answer"]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_example_code_names_what_exists(number):
    """It compiles, and every import and keyword of ours is real; the weights it names are not downloaded."""
    code = blocks("python")[number]
    compile(code, "README.md", "exec")
    imports = "\n".join(line for line in code.splitlines() if line.startswith(("import ", "from ")))
    exec(imports, {})  # noqa: S102
    options = re.search(r"MGPOConfig\((.*)\)", code)
    if options:
        from mgpo_trl import MGPOConfig

        assert eval(f"MGPOConfig({options.group(1)})", {"MGPOConfig": MGPOConfig}).num_rounds  # noqa: S307


# files


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not re.match(r"https?:|mailto:", link)]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_files_named_in_the_text_exist():
    prose = FENCE.sub("", README)
    named = set(re.findall(r"`((?:configs|docs|src|tests|ds_configs)/[\w./-]*|[\w-]+\.(?:py|toml|txt|yaml))`", prose))
    written = {"run.json", "rollouts.jsonl"}  # by the commands
    assert not [name for name in named - written if not (ROOT / name).exists()]


def tree():
    """The paths of the file tree, with the number of lines that name each."""
    (text,) = [block for block in blocks("", "text") if "mgpo_trl/" in block]
    found, parent = [], ""
    for line in text.rstrip().splitlines():
        indent, name, about = re.match(r"( *)(\S+)\s*(.*)", line).groups()
        if not indent:
            parent = name if not about or name == "src/mgpo_trl/" else ""
        found.append((parent if indent else "") + name)
        assert about or name == parent, f"{name} has no words beside it"
    return found


def tracked(directory):
    """Files and directories of the repository right below a directory."""
    listed = subprocess.run(["git", "ls-files", "."], cwd=directory, capture_output=True, text=True, check=True)
    files = [line.split("/") for line in listed.stdout.splitlines()]
    return {parts[0] + ("/" if len(parts) > 1 else "") for parts in files}


@pytest.mark.skipif(not os.path.isdir(ROOT / ".git"), reason="needs the repository")
def test_the_tree_has_one_line_for_each_file():
    named = tree()
    assert len(named) == len(set(named))
    assert not [name for name in named if not (ROOT / name).exists()]
    modules = {f"src/mgpo_trl/{name}" for name in tracked(SOURCE) if name != "__init__.py"}
    top = {name for name in tracked(ROOT) if not name.startswith(".") and name not in NOT_LISTED and name != "src/"}
    missing = (modules | top) - set(named)
    assert not missing
