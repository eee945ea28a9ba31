"""The command `mgpo`, in this process with the tiny model: what it prints, writes and refuses."""

import base64
import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from commands import ROOT, environment
from PIL import Image
from test_html_report import make_records, write_results
from watched import write_watched

from mgpo_trl import GroundedVQA
from mgpo_trl.answer_picture import REGION
from mgpo_trl.cli import loading, main, terminal
from mgpo_trl.conversation import Conversation
from mgpo_trl.rollout import Sampled

CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)


@pytest.fixture(scope="module")
def directory(tiny_dir):
    CONVERSATION.save(tiny_dir)
    yield tiny_dir
    (tiny_dir / "conversation.json").unlink()


@pytest.fixture
def image(rows, tmp_path, monkeypatch):
    """`scene.png` in the current directory, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scene.png").write_bytes(rows[0]["image"]["bytes"])
    return "scene.png"


@pytest.fixture
def writes(monkeypatch):
    """Let the model write these turns, by number of the round."""

    def written(turns):
        def load(model, args):
            vqa = load_model(model, args)
            chat = vqa.template.chat
            ids = {number: [*chat.tokenizer(text)["input_ids"], chat.end_of_turn_id] for number, text in turns.items()}
            vqa.generate = lambda contexts: [Sampled(ids[contexts[0].round]) for _ in contexts]
            return vqa

        monkeypatch.setattr("mgpo_trl.cli.ask.load_model", load)

    load_model = loading.load_model
    return written


def run(*arguments):
    return main([str(argument) for argument in arguments])


# ask


def test_ask_prints_the_answer_and_writes_the_picture(directory, image, writes, capsys):
    writes({1: '[{"bbox_2d": [10, 10, 40, 50]}]', 2: "Two\nlines: \\boxed{B}"})
    options = ["--choices", "one", "two", "--device", "cpu"]
    assert run("ask", image, "How many?", "--model", directory, *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Answer   (B) two",
        "Status   ok",
        "Box      (40, 40, 160, 200) of 336x336 pixels",
        'Round 1  [{"bbox_2d": [10, 10, 40, 50]}]',
        "Round 2  Two",
        "         lines: \\boxed{B}",
        "Picture  answer.png",
    ]
    picture = Image.open("answer.png").convert("RGB")
    assert REGION in {colour for _, colour in picture.getcolors(1 << 24)}


def test_ask_as_json_is_one_object_with_what_the_model_says(directory, image, capsys, monkeypatch):
    monkeypatch.setenv("MGPO_MODEL", str(directory))
    (Path("answer.png")).write_bytes(b"somebody's")
    assert run("ask", image, "What is on the red card?", "--json", "--box", 31, 17, 203, 150, "--device", "cpu") == 0
    record = json.loads(capsys.readouterr().out)
    said = GroundedVQA.from_pretrained(str(directory), device="cpu")(
        image, "What is on the red card?", box=(31, 17, 203, 150)
    )
    assert record["turns"] == said.turns and record["answer"] == said.answer and record["choices"] is None
    assert (record["status"], record["box"], record["image_size"]) == ("by_hand", [31, 17, 203, 150], [336, 336])
    assert record["picture"] == "answer-2.png" and Image.open("answer-2.png").size[0] > 900
    assert Path("answer.png").read_bytes() == b"somebody's"  # nothing of a person's is lost


def test_ask_with_one_round(directory, image, capsys):
    assert (
        run("ask", image, "What?", "--model", directory, "--num_rounds", 1, "--out", "x.jpg", "--device", "cpu") == 0
    )
    assert "Status   answered directly\nBox      none\n" in capsys.readouterr().out and Path("x.jpg").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.png", "What?", "--model", "x"], "nowhere.png: there is no image file"),
        (["scene.png", "What?"], "No model was named. Give `--model DIR`, or set MGPO_MODEL"),
        (["scene.png", "What?", "--model", "x", "--choices", "one"], "must hold 2 to 26 texts"),
        (["scene.png", "What?", "--model", "x", "--out", "a.txt"], "`--out` must end in .png"),
        (["scene.png", "What?", "--model", "x", "--out", "no/a.png"], "There is no directory 'no'"),
        (["scene.png", "What?", "--model", "x", "--out", "./scene.png"], "`--out` is the image itself"),
        (["scene.png", "What?", "--model", "DIR", "--box", "0", "0", "999", "5"], "is not inside the image of"),
        (["scene.png", "What?", "--model", "DIR", "--num_rounds", "0"], "`num_rounds` must be >= 1"),
        (["scene.png", "What?", "--model", "./nowhere"], "nowhere"),
    ],
)
def test_ask_refuses_with_one_sentence(arguments, message, directory, image, capsys, monkeypatch):
    monkeypatch.delenv("MGPO_MODEL", raising=False)
    arguments = [str(directory) if one == "DIR" else one for one in arguments]
    assert run("ask", *arguments, "--device", "cpu") == 1
    said = capsys.readouterr()
    assert said.out == "" and "mgpo ask: " in said.err and message in said.err and "Traceback" not in said.err
    assert not Path("answer.png").exists()


# pictures and text in terminals


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "variables, protocol",
    [
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "xterm-256color"}, "iterm2"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, None),
        ({"KITTY_WINDOW_ID": "1", "TERM": "screen-256color"}, None),
        ({}, None),
    ],
)
def test_the_protocol_of_a_terminal(variables, protocol):
    assert terminal.picture_protocol(variables) == protocol
    stream, pipe = Terminal(), io.StringIO()
    assert terminal.show_inline(Image.new("RGB", (9, 9)), stream, variables) == (protocol is not None)
    assert bool(stream.getvalue()) == (protocol is not None)
    assert not terminal.show_inline(Image.new("RGB", (9, 9)), pipe, variables) and pipe.getvalue() == ""


def test_the_picture_comes_whole_through_either_protocol():
    noise = Image.effect_noise((90, 90), 60).convert("RGB")
    for variables, read in (({"TERM": "xterm-kitty"}, read_kitty), ({"TERM_PROGRAM": "WezTerm"}, read_iterm2)):
        stream = Terminal()
        terminal.show_inline(noise, stream, variables)
        assert Image.open(io.BytesIO(read(stream.getvalue()))).tobytes() == noise.tobytes()


def read_kitty(text):
    """The file in the sequences, as https://sw.kovidgoyal.net/kitty/graphics-protocol describes them."""
    parts = [part.removeprefix("\x1b_G").split(";") for part in text.rstrip("\n").split("\x1b\\") if part]
    assert parts[0][0] == "a=T,f=100,m=1" and [keys for keys, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
    assert len(parts) > 2 and all(len(data) <= 4096 for _, data in parts)
    return base64.b64decode("".join(data for _, data in parts))


def read_iterm2(text):
    """The file in the sequence, as https://iterm2.com/documentation-images.html describes it."""
    keys, data = text.removeprefix("\x1b]1337;File=").removesuffix("\a\n").split(":")
    assert f"size={len(base64.b64decode(data))}" in keys.split(";") and "inline=1" in keys.split(";")
    return base64.b64decode(data)


def test_what_a_model_writes_does_not_steer_the_terminal():
    assert terminal.printable("a\x1b]0;title\a\n\tb\x9b") == "a\ufffd]0;title\ufffd\n\tb\ufffd"


# view


@pytest.fixture
def opened(monkeypatch):
    urls = []
    monkeypatch.setattr(webbrowser, "open", lambda url: urls.append(url) or True)
    return urls


def test_view_opens_the_report_and_writes_it_where_it_is_missing_or_old(tmp_path, opened, capsys):
    page = write_results(tmp_path, make_records(3))
    first = page.read_text()
    page.write_text("mine")
    assert run("view", tmp_path) == 0
    assert opened == [page.as_uri()] and page.read_text() == "mine"  # as new as the records: left alone
    page.unlink()
    assert run("view", tmp_path, "--no_browser") == 0
    assert page.read_text() == first and len(opened) == 1
    assert capsys.readouterr().out.splitlines() == [str(page)] * 2
    page.write_text("old")
    newer = page.stat().st_mtime + 10
    os.utime(tmp_path / "rollouts.jsonl", (newer, newer))
    run("view", tmp_path)
    assert page.read_text() == first


def test_view_without_a_browser_says_where_the_page_is(tmp_path, monkeypatch, capsys):
    page = write_results(tmp_path, make_records(1))
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert run("view", tmp_path) == 1
    said = capsys.readouterr()
    assert said.out == f"{page}\n" and "No browser was found" in said.err


def test_view_names_the_results_below(tmp_path, opened, capsys):
    write_results(tmp_path / "mgpo", make_records(1))
    (tmp_path / "other").mkdir()
    assert run("view", tmp_path) == 1
    assert (
        f"holds no result of an evaluation or a training. Give one of ['{tmp_path / 'mgpo'}']."
        in capsys.readouterr().err
    )
    assert run("view", tmp_path / "other") == run("view", tmp_path / "nowhere") == 1
    said = capsys.readouterr().err
    assert "Give a directory with run.json and rollouts.jsonl." in said and "There is no directory" in said
    assert not opened


def test_view_opens_the_page_of_a_training_as_its_rollouts_are_now(tmp_path, opened):
    write_watched(tmp_path, [0, 10])
    assert run("view", tmp_path) == 0
    page = tmp_path / "rollouts.html"
    assert opened == [page.as_uri()] and "step-10/group-1/sample-2" in page.read_text()
    write_watched(tmp_path, [20])
    run("view", tmp_path)
    assert "step-20/group-1/sample-2" in page.read_text()


def test_view_of_a_training_names_the_evaluations_in_it(tmp_path, opened, capsys):
    write_watched(tmp_path, [0])
    write_results(tmp_path / "heldout base", make_records(1))
    run("view", tmp_path, "--no_browser")
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'rollouts.html'}\n"
    assert said.err == f"Below it, too: mgpo view '{tmp_path / 'heldout base'}'\n"


# merge


def test_merge_hands_its_options_on(monkeypatch, tmp_path, capsys):
    calls = []
    module = ModuleType("mgpo_trl.merging")
    module.merge_adapter = lambda *args, **options: calls.append((args, options)) or Path(args[1])
    monkeypatch.setitem(sys.modules, "mgpo_trl.merging", module)
    assert run("merge", "adapter", "merged", "--dtype", "float32", "--base_model", "base") == 0
    assert calls == [(("adapter", "merged"), {"dtype": "float32", "base_model": "base"})]
    assert capsys.readouterr().out == "merged\n"


@pytest.mark.skipif(not find_spec("mgpo_trl.merging"), reason="mgpo_trl.merging is not there yet")
def test_a_merged_model_answers_as_its_adapter_does(directory, image, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(directory)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained("adapter")
    CONVERSATION.save("adapter")
    assert run("merge", "adapter", "merged", "--base_model", directory) == 0
    assert capsys.readouterr().out == "merged\n" and Conversation.load("merged") == CONVERSATION
    turns = []
    for model in ("adapter", "merged"):
        assert run("ask", image, "What?", "--model", model, "--json", "--device", "cpu") == 0
        turns.append(json.loads(capsys.readouterr().out)["turns"])
    assert turns[0] == turns[1]
    assert run("merge", "adapter", "merged") == 1 and "is not empty" in capsys.readouterr().err


# demo


def test_demo_without_gradio_says_what_to_install(directory, monkeypatch, capsys):
    monkeypatch.setattr("mgpo_trl.cli.demo.find_spec", lambda name: None)
    assert run("demo", directory) == 1
    assert "pip install 'gradio>=6.31,<7'" in capsys.readouterr().err


# the command itself


def test_the_command_is_installed_by_its_name():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["mgpo"].split(":")
    assert getattr(importlib.import_module(module), name) is main


def test_help_needs_no_torch_and_names_every_subcommand():
    code = "import sys; from mgpo_trl.cli import main\ntry: main(sys.argv[1:])\n"
    code += "finally: assert 'torch' not in sys.modules"
    for arguments, wanted in (
        (["--help"], {"ask", "view", "demo", "merge"}),
        (["ask", "--help"], {"--model", "--choices", "--box", "--out", "--json", "--device", "--num_rounds"}),
        (["demo", "--help"], {"--host", "--port", "--examples"}),
    ):
        variables = environment(PYTHONPATH=str(ROOT / "src"))
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=variables)
        assert done.returncode == 0 and not [word for word in wanted if word not in done.stdout], done.stderr
