"""
The documents do what they say: page by page, their Python code and their commands run in order, in a directory
prepared as they assume. Commands of `train.py` and `eval.py` run in short variants in this process, on the tiny model.

A block whose first line is `# path/of/a/file` is written to that file (Python code runs as well). A page or a line
that can not run is named below, with the reason.
"""

import re
import sys
from pathlib import Path

import datasets
import pytest
from benchmark_rows import hr_bench_rows, jpeg, mgpo_rows, mme_rows, vstar_rows, with_images, write, write_vstar
from commands import FENCE, ROOT, commands_of, kind_of, output_of, run_short, shorten_builtin, write_rows
from PIL import Image

from mgpo_trl import scripts
from mgpo_trl.conversation import Conversation
from mgpo_trl.data.benchmarks import BENCHMARKS

PAGES = sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = {
    "using.md": "tests/test_using.py",
    "watching.md": "tests/test_watching.py",
    "hub.md": "tests/test_hub.py",  # its server answers the pushes
    "vllm.md": "tests_vllm/test_server.py",  # vLLM has an environment of its own
}
"""Pages that a test of their own runs."""
NOT_RUN = {
    r"^accelerate launch (?!train\.py)": "takes several processes; tests/distributed launches them",
    r"--use_vllm": "vLLM has an environment of its own",
    r"^python -m mgpo_trl\.data\.build_mgpo_train": "reads published sets; tests/test_benchmarks.py has small ones",
    r"from vlmeval\.": "VLMEvalKit can not be installed beside the pinned transformers",
}
"""Commands and code, by a pattern, that are compiled or parsed only (tests/test_docs.py), and why."""
STEP = re.compile(r"^```(\w*)\n(.*?)^```$|`(python eval\.py [^`\n]+)`", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")
CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(6, 6), min_box_side=14)
SETS = {
    "vstar": "data/vstar",
    "vstar-lmms": "data/vstar_lmms.parquet",
    "hrbench-4k": "data/hr_bench_4k.parquet",
    "hrbench-8k": "data/hr_bench_8k.parquet",
    "mme-realworld": "data/mme.parquet",
    "mme-realworld-lite": "data/mme.parquet",
    "mgpo-eval": "data/mgpo",
    "pixmo-count": "data/pixmo_count",
    "pixmo-points": "data/pixmo_points",
}
"""Published sets, and where small rows in their formats lie."""


def steps_of(text):
    """Blocks and inline commands of a page in order, as (language, text)."""
    for language, block, inline in STEP.findall(text):
        yield ("bash", inline) if inline else (language, block)


def why_not(text):
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, text, re.MULTILINE)), None)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Small rows in the formats of the published sets, written once."""
    folder = tmp_path_factory.mktemp("published")
    write_vstar(folder / "vstar")
    mirror = [{name: value for name, value in row.items() if name != "image"} for row in vstar_rows()]
    with_images(mirror).to_parquet(folder / "vstar_lmms.parquet")
    for size in ("4k", "8k"):
        write(folder / f"hr_bench_{size}", hr_bench_rows(1), "parquet")
    write(folder / "mme", mme_rows(), "parquet")
    with_images(mgpo_rows()).save_to_disk(folder / "mgpo")
    for name, points in (
        ("pixmo_points", [{"x": 25.0, "y": 50.0}]),
        ("pixmo_count", {"x": [9.0], "y": [9.0]}),
    ):
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "images" / "ab12.jpg").write_bytes(jpeg(90, (200, 100)))
        row = {"image_url": "https://x/y", "image_sha256": "ab12", "label": "things", "count": 1, "points": points}
        for split in ("train", "test"):
            datasets.Dataset.from_list([row] * 4).to_parquet(folder / name / f"{split}.parquet")
    return folder


@pytest.fixture
def workplace(tmp_path, tmp_path_factory, published, tiny_dir, rows, monkeypatch, quick_collection):
    """The directory that the pages assume: the repository's files, a trained model, a photograph, rows."""
    for name in ("train.py", "eval.py", "configs", "ds_configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    for path in tiny_dir.iterdir():
        (tmp_path / "outputs" / "run" / path.name).symlink_to(path)
    CONVERSATION.save(tmp_path / "outputs" / "run")
    Image.new("RGB", (1600, 1200), (9, 90, 200)).save(tmp_path / "street.jpg")
    for name in ("train", "test"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    for path in published.iterdir():
        (tmp_path / "data" / path.name).symlink_to(path)
    shorten_builtin(monkeypatch, tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("mgpo_trl.data.benchmarks.BENCHMARKS", dict(BENCHMARKS))  # a page may add one
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):  # modules that a page wrote end with it
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_runs_from_top_to_bottom(page, workplace, tiny_dir):
    if page.name in ELSEWHERE:
        assert (ROOT / ELSEWHERE[page.name]).is_file(), f"{page.name} is said to run in {ELSEWHERE[page.name]}"
        pytest.skip(f"runs in {ELSEWHERE[page.name]}")
    names = {"__name__": "__main__"}
    for number, (language, text) in enumerate(steps_of(page.read_text(encoding="utf-8"))):
        if found := FILE.match(text):
            (workplace / found[1]).parent.mkdir(parents=True, exist_ok=True)
            (workplace / found[1]).write_text(text)
        if language == "python" and not why_not(text):
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)  # noqa: S102
        for place, words in enumerate(commands_of(text) if language == "bash" else ()):
            if not why_not(" ".join(words)):
                run(words, tiny_dir, f"outputs/of_step_{number}_{place}")


def run(words, tiny_dir, directory):
    """One command, and what it leaves behind."""
    assert kind_of(words) in ("train", "eval", "builtin"), f"{words} is of no known kind: add it to NOT_RUN, with why"
    words = [stand_in(word) for word in words]
    if kind_of(words) == "eval" and not {"--output_dir", "--rescore"} & set(words):
        words += ["--output_dir", directory]
    try:
        run_short(words, {}, tiny_dir)
    except SystemExit as ended:  # of a preflight
        assert not ended.code, words
    assert left_behind(words).is_file(), words


def stand_in(word):
    """What is at hand in place of a placeholder or a published set."""
    name = word.partition(":")[0]
    return {"MODEL": "outputs/run"}.get(word, f"{name}:{SETS[name]}" if name in SETS else word)


def left_behind(words):
    kind = {"eval": "report.json", "train": "run.json", "builtin": "result.json"}[kind_of(words)]
    for option, other in (("--compare", "compare.json"), ("--preflight", "preflight/preflight.json")):
        kind = other if option in words else kind
    if "--protocol" in words and len(words[words.index("--protocol") + 1 :]) > 1:
        kind = "protocols.json"
    return Path(output_of(words), kind)


def test_no_exception_is_stale():
    """Each names something that the pages have; pages are listed that may come."""
    everything = "\n".join(path.read_text(encoding="utf-8") for path in PAGES).replace("\\\n", " ")
    expected = {pattern for pattern in NOT_RUN if "vllm" not in pattern and "launch" not in pattern}
    assert not [pattern for pattern in expected if not re.search(pattern, everything, re.MULTILINE)]


def test_a_page_that_does_not_run_is_seen(workplace, tiny_dir, tmp_path):
    """The check itself: a command of no known kind, code that fails, a command that writes nothing."""
    page = tmp_path / "page.md"
    for text, error in (
        ("```bash\nrm -rf outputs\n```\n", "no known kind"),
        ("```python\nassert 1 == 2\n```\n", None),
        ("```bash\npython eval.py --model outputs/nowhere --dataset data/test.jsonl\n```\n", "nowhere"),
    ):
        page.write_text(text)
        with pytest.raises((AssertionError, ValueError), match=error):
            test_a_page_runs_from_top_to_bottom(page, workplace, tiny_dir)


# what the pages list


def table(name, heading):
    """Rows of the first table below a heading, as lists of cells without backticks."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def shown(value):
    return ", ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize("heading", ["The rounds", "The script"])
def test_every_option_is_listed_with_its_default(heading):
    from mgpo_trl.round_options import RoundOptions

    options = vars({"The rounds": RoundOptions, "The script": scripts.MGPOScriptArguments}[heading]())
    listed = {name.strip("`"): default.strip("`") for name, default, _ in table("configs.md", heading)}
    assert listed == {name: shown(value) for name, value in options.items()}


def test_every_part_of_the_prompts_is_listed():
    from dataclasses import fields

    from mgpo_trl.prompts import PromptTemplate

    listed = [
        name for parts, *_ in table("extending.md", "Prompts of your own") for name in re.findall(r"`(\w+)`", parts)
    ]
    assert listed == [field.name for field in fields(PromptTemplate)]


def test_every_box_status_is_listed():
    from mgpo_trl.boxes import BoxStatus

    listed = [status.strip("`") for status, _ in table("concepts.md", "What became of the box")]
    assert listed == [status.value for status in BoxStatus]


def test_every_column_of_a_row_is_listed():
    from mgpo_trl.data.schema import COLUMNS, REQUIRED

    rows = table("data.md", "A row")
    assert {name.strip("`") for name, *_ in rows} == set(COLUMNS)
    assert {name.strip("`") for name, need, _ in rows if need == "required"} == set(REQUIRED)


def pattern_of(metric):
    """`turnN/length` stands for every round, `NAME` for every reward or status."""
    return re.escape(metric).replace("turnN", r"turn\d").replace("NAME", r"\w+")


def test_every_logged_figure_is_listed_and_no_other(make_trainer, script, rows):
    from scripted import box_text, ids_of

    # all boxes usable, so that there is a crop area
    trainer = make_trainer(beta=0.01, kwargs={"eval_dataset": rows}, eval_strategy="steps", eval_steps=1)
    box = ids_of(trainer, box_text(2, (0, 0, 56, 56)))
    answer = ids_of(trainer, "The card shows vertical lines. \\boxed{A}")
    script(trainer, *[[box] * 4, [answer] * 4] * 3)
    trainer.train()
    logged = {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    logged -= {"runtime", "samples_per_second", "steps_per_second"}  # of the evaluation itself
    cells = [
        name for names, _ in table("concepts.md", "Every logged figure") for name in re.findall(r"`([^`]+)`", names)
    ]
    listed = {name: re.compile(pattern_of(name)) for name in cells}
    assert not [name for name in logged if not any(pattern.fullmatch(name) for pattern in listed.values())]
    assert not [name for name, pattern in listed.items() if not any(pattern.fullmatch(one) for one in logged)]


def anchor_of(heading):
    """As the page shows it: lower case, hyphens for spaces, no punctuation."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text(encoding="utf-8")), re.MULTILINE)
        assert anchor in [anchor_of(heading) for heading in headings], f"{target}#{anchor}"


def test_the_figure_is_drawn_by_its_script(tmp_path, monkeypatch):
    """The committed picture is what the script draws today."""
    from PIL import ImageChops

    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw_rollout

    draw_rollout.main(str(tmp_path / "rollout.png"))
    drawn, kept = (
        Image.open(path).convert("RGB") for path in (tmp_path / "rollout.png", ROOT / "docs" / "rollout.png")
    )
    assert drawn.size == kept.size
    difference = ImageChops.difference(drawn, kept).convert("L").point(lambda value: 255 * (value > 32))
    assert sum(difference.histogram()[1:]) < 0.001 * drawn.width * drawn.height
