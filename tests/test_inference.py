"""`GroundedVQA` asks as evaluation does, and lets a person choose the region."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from commands import environment
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from mgpo_trl import GroundedVQA
from mgpo_trl.boxes import parse_box
from mgpo_trl.conversation import Conversation
from mgpo_trl.evaluation import runner
from mgpo_trl.images import ImageError, open_image
from mgpo_trl.inference import Question
from mgpo_trl.records import read_rollouts
from mgpo_trl.rollout import Sampled, flatten

CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)


@pytest.fixture(scope="module")
def directory(tiny_dir):
    CONVERSATION.save(tiny_dir)
    yield tiny_dir
    (tiny_dir / "conversation.json").unlink()


@pytest.fixture(scope="module")
def vqa(directory):
    return GroundedVQA.from_pretrained(str(directory), device="cpu", batch_size=3)


def test_the_same_answers_as_evaluation(vqa, directory, rows, tmp_path):
    from mgpo_trl.data import load_rows
    from mgpo_trl.evaluation.arguments import EvalArguments

    args = EvalArguments(model=str(directory), dataset="x", output_dir=str(tmp_path), device="cpu", batch_size=3)
    runner.run_evaluation(args, load_rows(rows))
    questions = [Question(row["image"], row["question"], row["choices"]) for row in rows]
    answers = vqa.batch(questions)
    expected = [[turn["text"] for turn in record["turns"]] for record in read_rollouts(tmp_path)]
    assert [[turn.text for turn in answer.rollout.turns] for answer in answers] == expected
    assert [answer.text for answer in answers] == [texts[-1] for texts in expected]


def test_images_in_every_form(vqa, rows, tmp_path):
    data = rows[0]["image"]["bytes"]
    (tmp_path / "a.png").write_bytes(data)
    image = open_image(rows[0]["image"], "a")
    texts = {vqa(one, "What is on the red card?").text for one in (data, str(tmp_path / "a.png"), image)}
    assert len(texts) == 1
    with pytest.raises(ImageError, match="question 0: there is no image file"):
        vqa("/nowhere.png", "What?")
    with pytest.raises(ValueError, match="must hold 2 to 26 texts"):
        vqa(image, "What?", choices=["one"])
    with pytest.raises(ValueError, match="There is no question"):
        vqa(image, " ")


@pytest.mark.parametrize("name", ["nobody/there", "./outputs/nowhere", "/nowhere/at/all"])
def test_a_model_that_is_nowhere_is_named(name):
    with pytest.raises(ValueError, match=f"There is no model '{name}': no directory here"):
        GroundedVQA.from_pretrained(name, device="cpu")


def test_a_directory_has_no_revisions(directory):
    with pytest.raises(ValueError, match="is a directory here"):
        GroundedVQA.from_pretrained(str(directory), revision="try-2", device="cpu")


def test_a_region_by_hand_is_what_comes_back(vqa, rows):
    image = open_image(rows[0]["image"], "a")
    box = (31, 17, 203, 150)
    asked = [Question(image, "What is on the red card?", ["a", "b"], box), Question(image, "What is on the red card?")]
    by_hand, alone = vqa.batch(asked)
    assert (by_hand.box, by_hand.status) == (box, "by_hand")
    assert by_hand.crop.tobytes() == vqa.template.chat.fit(image.crop(box)).tobytes()
    written = parse_box(by_hand.rollout.turns[0].text, by_hand.rollout.view.size, "absolute", min_side=14)
    assert written.box_view_px == (7, 4, 51, 38)  # the region in the 84x84 view, rounded outwards
    assert by_hand.rollout.turns[0].given and not alone.rollout.turns[0].given
    assert by_hand.turns == [turn.text for turn in by_hand.rollout.turns] and by_hand.turns[-1] == by_hand.text
    assert alone.text == vqa(image, "What is on the red card?").text  # the other question is asked as ever
    for bad in [(0, 0, 400, 10), (5, 5, 5, 9)]:
        with pytest.raises(ValueError, match="is not inside the image of"):
            vqa(image, "What?", box=bad)
    direct = GroundedVQA(vqa.generate.model, vqa.template.chat.processor, CONVERSATION.with_rounds(1))
    with pytest.raises(ValueError, match="needs two rounds"):
        direct(image, "What?", box=box)


def test_a_region_by_hand_is_not_the_models_word(vqa, rows):
    """Its tokens carry turn id 0, and its record says so."""
    answer = vqa(rows[0]["image"]["bytes"], "What?", box=(31, 17, 203, 150))
    flat, (written, sampled) = flatten(answer.rollout), answer.rollout.turns
    assert flat.turn_ids == [0] * (len(written.ids) + len(written.reply_ids)) + [2] * len(sampled.ids)
    assert flat.completion_ids[: len(written.ids)] == written.ids and not written.truncated
    assert [turn.get("given") for turn in answer.rollout.to_record()["turns"]] == [True, None]


def test_a_region_thinner_than_a_pixel_of_the_view_is_still_named(vqa, rows):
    answer = vqa(rows[0]["image"]["bytes"], "What?", box=(41, 40, 42, 240))
    assert answer.box == (41, 40, 42, 240) and answer.crop.size == vqa.template.chat.fitted_size((1, 200))
    assert '"bbox_2d": [10, 10, 11, 60]' in answer.turns[0]
    with pytest.raises(ValueError, match=r"The region \(41, 40, 42, 241\) is more than 200 times as long"):
        vqa(rows[0]["image"]["bytes"], "What?", box=(41, 40, 42, 241))


def test_later_rounds_are_the_models_own(vqa, rows, monkeypatch):
    conversation = dataclasses.replace(CONVERSATION, zoom_from="original").with_rounds(3)
    three = GroundedVQA(vqa.generate.model, vqa.template.chat.processor, conversation)
    write(three, monkeypatch, {2: '[{"bbox_2d": [10, 10, 40, 50]}]', 3: r"\boxed{2}"})
    answer = three(rows[0]["image"]["bytes"], "How many?", box=(31, 17, 203, 150))
    assert [turn.shown_px for turn in answer.rollout.turns] == [(31, 17, 203, 150), (40, 40, 160, 200), None]
    assert (answer.answer, answer.box, answer.status) == ("2", (40, 40, 160, 200), "ok")


def write(vqa, monkeypatch, turns):
    """Let the model write these turns, by number of the round."""
    chat = vqa.template.chat
    ids = {number: [*chat.tokenizer(text)["input_ids"], chat.end_of_turn_id] for number, text in turns.items()}
    monkeypatch.setattr(vqa, "generate", lambda contexts: [Sampled(ids[contexts[0].round]) for _ in contexts])


def test_what_an_answer_holds(vqa, rows, monkeypatch):
    write(vqa, monkeypatch, {1: '[{"bbox_2d": [10, 10, 40, 50]}]', 2: r"It is \boxed{B}."})
    answer = vqa(rows[0]["image"]["bytes"], "What?", ["one", "two"])
    assert (answer.answer, answer.box, answer.status) == ("B", (40, 40, 160, 200), "ok")
    assert answer.crop is answer.rollout.turns[0].reply_image and answer.text == r"It is \boxed{B}."
    assert (answer.words, answer.no_crop) == ("(B) two", "") and answer.picture().width > 900
    write(vqa, monkeypatch, {1: "nothing", 2: r"It is \boxed{B}."})
    answer = vqa(rows[0]["image"]["bytes"], "What?")
    assert (answer.answer, answer.box, answer.status, answer.crop) == ("B", None, "no_json", None)
    assert (answer.words, answer.no_crop) == ("B", "no crop: no json")
    write(vqa, monkeypatch, {1: "nothing", 2: "It is B."})
    assert vqa(rows[0]["image"]["bytes"], "What?").words == "no boxed answer"


ASK = """
import sys
from mgpo_trl import GroundedVQA
for path in sys.argv[2:]:
    vqa = GroundedVQA.from_pretrained(path, device="cpu")
    print("said", path, vqa.conversation.max_pixels, vqa(sys.argv[1], "What is on the red card?").turns)
"""


def test_a_new_process_finds_models_and_adapters_in_directories_and_on_the_hub(vqa, directory, rows, tmp_path):
    """Nothing is registered beforehand, and the Hub is the local cache of one."""
    image, adapter = tmp_path / "a.png", tmp_path / "adapter"
    image.write_bytes(rows[0]["image"]["bytes"])
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForImageTextToText.from_pretrained(directory), lora).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "someone/tiny"}))
    dataclasses.replace(CONVERSATION, max_pixels=112 * 112).save(adapter)
    for name, source in (("tiny", directory), ("adapter", adapter)):
        cached = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(source, cached / "snapshots" / "1")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("1")
    paths = [str(directory), str(adapter), "someone/tiny", "someone/adapter"]
    command, variables = [sys.executable, "-c", ASK, str(image), *paths], environment(HF_HOME=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if line.startswith("said ")]
    assert said[0] == said[2] == f"7056 {vqa(str(image), 'What is on the red card?').turns}"
    assert said[1] == said[3] and said[1].startswith("12544 ")
