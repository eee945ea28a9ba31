"""The notebook runs from top to bottom in a short variant, and what is committed are the outputs of one whole run."""

import ast
import json
import re

import pytest
from commands import ROOT, shorten_builtin
from PIL import Image

PATH = ROOT / "notebooks" / "look_twice.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORT = {"STEPS": 2, "QUESTIONS": 2, "GROUP": 2, "HELDOUT": 8}


def source_of(cell):
    return "".join(cell["source"])


def has_parameters(cell):
    return "parameters" in cell["metadata"].get("tags", [])


def run_cell(code, name, names):
    """Run a cell as a notebook does; returns the value of its last expression, which would be shown."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)  # noqa: S102
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)  # noqa: S307


@pytest.fixture
def played(tmp_path, monkeypatch, capsys):
    """Values that the cells show, by the number of the cell, and what they print."""
    shorten_builtin(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(CODE):
        shown.append(run_cell(source_of(cell), f"cell {number}", names))
        if has_parameters(cell):
            assert set(SHORT) <= set(names), "the cell of parameters has lost one"
            names.update(SHORT)
    return shown, capsys.readouterr().out


def test_it_runs_from_top_to_bottom(played, tmp_path):
    shown, printed = played
    images = [value for value in shown if isinstance(value, Image.Image)]
    assert len(images) == 5 and all(value is None or value in images for value in shown)
    for name in ("before", "after"):
        assert f"{name}, n = 8\n" in printed and (tmp_path / f"outputs/notebook/{name}/conversation.json").is_file()
    assert "2 steps took" in printed and re.search(r"step 2/2  reward \d", printed)


def test_a_person_can_run_it_anywhere():
    """No magics, no shell, no network; the parameters come first."""
    assert [has_parameters(cell) for cell in CODE].index(True) == 0
    for cell in CODE:
        ast.parse(source_of(cell))  # magics and shell lines are no Python
        assert not re.search(r"https?:|\bsubprocess\b|os\.system|Qwen/", source_of(cell))


def test_the_outputs_are_those_of_one_whole_run():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert (
        sum("image/png" in output.get("data", {}) or "image/jpeg" in output.get("data", {}) for output in outputs) == 5
    )
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    accuracy = [float(value) for value in re.findall(r"accuracy +([\d.]+)", printed)]
    assert len(accuracy) == 2 and 0.4 < accuracy[0] < 0.7 < 0.9 < accuracy[1]
    assert printed.count("n = 256\n") == 2


def test_the_outputs_are_small_and_name_no_machine():
    assert PATH.stat().st_size < 1_000_000
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"  # progress bars and warnings
            texts = {**output.get("data", {}), "text": output.get("text", "")}
            plain = "".join("".join(value) for kind, value in texts.items() if not kind.startswith("image/"))
            assert not re.search(r"(?<![\w.])/(root|home|work|tmp|Users|usr|opt)/", plain)


def test_its_links_lead_somewhere():
    text = "".join(source_of(cell) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https:")]
    assert links and not [link for link in links if not (PATH.parent / link).exists()]
