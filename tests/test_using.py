"""The commands and the code of docs/using.md run, in its order, on the tiny model."""

import json
from importlib.util import find_spec

import pytest
from commands import ROOT
from PIL import Image
from test_docs import lines_of, without_redirection
from test_html_report import make_records, write_results
from test_readme import FENCE
from test_vllm_client import Server
from watched import write_watched

from mgpo_trl.cli import main
from mgpo_trl.conversation import Conversation

DOCUMENT = ROOT / "docs" / "using.md"
CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)
GOOD, LETTER = '[{"bbox_2d": [10, 10, 40, 50]}]', r"It is \boxed{B}."


@pytest.fixture
def workplace(tiny_dir, rows, tmp_path, monkeypatch):
    """The paths that the document names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    Image.new("RGB", (1600, 1200), (9, 90, 200)).save("street.jpg")
    (tmp_path / "outputs").mkdir()
    for name in ("run", "merged"):
        (tmp_path / "outputs" / name).mkdir()
        for path in tiny_dir.iterdir():
            (tmp_path / "outputs" / name / path.name).symlink_to(path)
        CONVERSATION.save(tmp_path / "outputs" / name)
    write_results(tmp_path / "outputs" / "eval", make_records(2))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(
        '{"image": "../street.jpg", "question": "What?", "answer": "Alma"}\n'
    )
    return tmp_path


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def run_command(words, capsys):
    """One line of the document; what it prints."""
    assert main(without_redirection(words)[1:]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def commands(name):
    return [words for words in lines_of(DOCUMENT) if words[:2] == ["mgpo", name]]


def test_asking(workplace, capsys):
    first, second, third = (run_command(words, capsys) for words in commands("ask"))
    assert "Picture  answer.png" in first and (workplace / "answer.png").is_file()
    assert "Status   by_hand\nBox      (900, 600, 1500, 1100) of 1600x1200 pixels" in second
    assert (workplace / "sign.png").is_file()
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in json.loads(third)) and json.loads(third)["picture"] == "answer-2.png"


def test_viewing(workplace, capsys):
    write_watched(workplace / "outputs" / "run", [0])
    pages = [run_command(words, capsys) for words in commands("view")]
    assert pages == [f"{workplace / 'outputs' / name}\n" for name in ("eval/report.html", "run/rollouts.html")]


@pytest.mark.skipif(not find_spec("gradio"), reason="Gradio is not installed")
def test_the_page(workplace, capsys, monkeypatch):
    import gradio

    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: page.close(verbose=False))
    addresses = [run_command(words, capsys) for words in commands("demo")]
    assert addresses[0].startswith("http://127.0.0.1:") and ":8080" in addresses[1]


@pytest.mark.skipif(not find_spec("mgpo_trl.merging"), reason="mgpo_trl.merging is not there yet")
def test_merging(workplace, tiny_dir, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained("outputs/qwen2_5_vl_3b_lora")
    for path in (workplace / "outputs" / "merged").iterdir():
        path.unlink()
    (words,) = commands("merge")
    assert run_command(words, capsys) == "outputs/merged\n" and list((workplace / "outputs" / "merged").iterdir())


def test_serving(workplace, server, capsys):
    from test_vllm_client import client

    (words,) = [words for words in lines_of(DOCUMENT) if words[0] == "python"]
    assert (workplace / words[1]).is_file()
    server.turns = [GOOD, LETTER]
    assert client.main([*words[2:], "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Answer: B"


def test_the_python_code_runs(workplace, server, capsys):
    server.turns = [GOOD, LETTER]
    for language, block in FENCE.findall(DOCUMENT.read_text(encoding="utf-8")):
        if language == "python":
            exec(block.replace("http://localhost:8000/v1", server.url), {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "by_hand" in printed[1] and printed[2].endswith(LETTER)
    assert (workplace / "door.png").is_file()
