"""Harnesses of others get the answers of `GroundedVQA`, and their options stay out of the first round."""

import json
import logging
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType

import pytest
from commands import ROOT, environment
from datasets import Image as ImageFeature
from test_readme import FENCE

from mgpo_trl import GroundedVQA
from mgpo_trl.conversation import Conversation
from mgpo_trl.images import open_image
from mgpo_trl.integrations.questions import Splitter
from mgpo_trl.integrations.vlmevalkit import MGPOForVLMEvalKit

CONVERSATION = Conversation(max_pixels=84 * 84, min_pixels=56 * 56, token_budgets=(10, 8), min_box_side=14)
NO_LMMS_EVAL = "lmms-eval is not installed: its model class is not tested"


@pytest.fixture(scope="module")
def directory(tiny_dir):
    CONVERSATION.save(tiny_dir)
    yield tiny_dir
    (tiny_dir / "conversation.json").unlink()


@pytest.fixture(scope="module")
def vqa(directory):
    return GroundedVQA.from_pretrained(str(directory), device="cpu", batch_size=2)


@pytest.fixture
def asked(rows):
    """Image, question and choices of each row."""
    return [(open_image(row["image"], "a"), row["question"], row["choices"]) for row in rows]


def expected(vqa, asked):
    answers = [vqa(*one) for one in asked]
    return [answer.answer or answer.text for answer in answers]


def lettered(question, choices, last="Answer the option letter directly."):
    options = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    return "\n".join([question, *options, last])


# what a harness asks


LETTERS_ONLY = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the "
)
PROMPTS = {
    "lmms-eval, V* Bench": (
        "What color is the dog?\nA. red\nB. dark blue\nAnswer with the option's letter from the given choices "
        "directly."
    ),
    "lmms-eval, HR-Bench": "What color is the dog?\nA. red\nB. dark blue\nAnswer the option letter directly.",
    "both, MME-RealWorld": (
        "What color is the dog? The choices are listed below:\n(A) red\n(B) dark blue\n" + LETTERS_ONLY + "letter (A, "
        "B, C, D, or E) of the correct option.\nThe best answer is: "
    ),
    "VLMEvalKit, multiple choice": (
        "Question: What color is the dog?\nOptions:\nA. red\nB. dark blue\nPlease select the correct answer from the "
        "options above. \n"
    ),
    "with a placeholder": "<image>\nWhat color is the dog?\n(A) red\n(B) dark blue",
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_options_are_split_off_the_prompts_of_known_harnesses(name, caplog):
    splitter = Splitter()
    found = splitter.question("image", PROMPTS[name])
    assert (found.image, found.question, found.choices) == ("image", "What color is the dog?", ["red", "dark blue"])
    assert (splitter.split, splitter.whole) == (1, 0) and not caplog.records


def test_a_hint_stays_with_its_question():
    text = "Hint: It is a pet.\nQuestion: What color?\nOptions:\nA. red\nB. blue\nPlease select the correct answer."
    assert Splitter().question("image", text).question == "Hint: It is a pet.\nWhat color?"


def test_prompts_without_options_are_asked_as_they_are_and_counted(caplog):
    splitter = Splitter()
    texts = ["Question: How many dogs?", "Pick one: (A) red (B) blue", PROMPTS["lmms-eval, HR-Bench"]]
    asked = [splitter.question("image", text) for text in texts]
    assert [one.question for one in asked] == [*texts[:2], "What color is the dog?"]
    assert [one.choices for one in asked[:2]] == [None, None]
    (record,) = caplog.records  # once, with the first of them
    assert "No lettered options in 'Question: How many dogs?'" in record.getMessage()
    assert splitter.summary == ("1 questions with their choices withheld from round 1, 2 prompts asked as they are.")


# VLMEvalKit


def infer(model, questions, images, dataset):
    """What VLMEvalKit's `infer_data` does with a model: image files and a prompt in, one text a row out."""
    model.set_dump_image(lambda line: [line])
    assert not getattr(model, "is_api", False)
    answers = []
    for image, text in zip(images, questions, strict=True):
        assert not model.use_custom_prompt(dataset)
        parts = [{"type": "image", "value": path} for path in model.dump_image(image, dataset)]
        answers.append(model.generate(message=[*parts, {"type": "text", "value": text}], dataset=dataset))
    return answers


def test_vlmevalkit(directory, vqa, rows, asked, tmp_path):
    paths = []
    for number, row in enumerate(rows):
        paths.append(str(tmp_path / f"{number}.png"))
        (tmp_path / f"{number}.png").write_bytes(row["image"]["bytes"])
    model = MGPOForVLMEvalKit(str(directory), device="cpu")
    prompts = [f"Question: {question}\nOptions:\n{lettered('', choices).strip()}" for _, question, choices in asked]
    assert infer(model, prompts, paths, "HRBench4K") == expected(vqa, asked)
    assert (model.splitter.split, model.splitter.whole) == (len(rows), 0)
    with pytest.raises(ValueError, match="one image, and the message has 2"):
        model.generate([{"type": "image", "value": paths[0]}] * 2 + [{"type": "text", "value": "What?"}])


def snippet(number):
    """The Python snippets of the document on harnesses."""
    text = (ROOT / "docs" / "harnesses.md").read_text(encoding="utf-8")
    return [block for language, block in FENCE.findall(text) if language == "python"][number]


def test_the_documented_start_of_vlmevalkit(directory, monkeypatch):
    models, package = ModuleType("vlmeval.config"), ModuleType("vlmeval")
    models.supported_VLM = {}
    monkeypatch.setitem(sys.modules, "vlmeval", package)
    monkeypatch.setitem(sys.modules, "vlmeval.config", models)
    exec(snippet(0).replace("outputs/run", str(directory)), {"__name__": "run_mgpo"})  # noqa: S102
    assert isinstance(models.supported_VLM["mgpo"](device="cpu"), MGPOForVLMEvalKit)


# lmms-eval


def test_the_entry_point_is_declared():
    (found,) = entry_points(group="lmms_eval.models", name="mgpo")
    assert found.value == "mgpo_trl.integrations.lmms_eval:manifest"


def test_lmms_eval_finds_the_class_and_gets_the_answers(directory, vqa, asked, caplog):
    """Against the real class and the real registry."""
    pytest.importorskip("lmms_eval", reason=NO_LMMS_EVAL)
    from lmms_eval.models import get_model

    model = get_model("mgpo").create_from_arg_string(
        f"pretrained={directory},num_rounds=2", {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    )
    model.task_dict = {"needle": {"test": [{"images": [image]} for image, _, _ in asked]}}
    requests = [
        request(number, lettered(question, choices), lambda doc: doc["images"])
        for number, (_, question, choices) in enumerate(asked)
    ]
    with caplog.at_level(logging.WARNING):
        assert model.generate_until(requests) == expected(vqa, asked)
    assert f"{len(asked)} questions with their choices withheld" in caplog.text
    with pytest.raises(ValueError, match="row 1 of needle has 2"):
        model.generate_until([request(1, "What?", lambda doc: doc["images"] * 2)])
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="mgpo"):
            getattr(model, name)([])


def request(number, context, doc_to_visual):
    from lmms_eval.api.instance import Instance

    arguments = (context, {"max_new_tokens": 16}, doc_to_visual, number, "needle", "test")
    return Instance("generate_until", arguments, number, {"task": "needle", "doc_id": number, "repeats": 1})


def test_lmms_eval_refuses_options_that_it_does_not_take(directory):
    pytest.importorskip("lmms_eval", reason=NO_LMMS_EVAL)
    from lmms_eval.models import get_model

    with pytest.raises(ValueError, match=r"takes no \['max_pixels'\]. Pixel caps and prompts come with the model"):
        get_model("mgpo")(str(directory), max_pixels=3)


TASK = """
task: needle
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.images
doc_to_text: !function functions.prompt
doc_to_target: answer
process_results: !function functions.score
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
generation_kwargs: {max_new_tokens: 16}
"""
FUNCTIONS = """
def images(doc):
    return [doc["image"].convert("RGB")]

def prompt(doc, lmms_eval_specific_kwargs=None):
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"])]
    return "\\n".join([doc["question"], *lines, "Answer the option letter directly."])

def score(doc, results):
    return {"acc": float(results[0] == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("lmms_eval"), reason=NO_LMMS_EVAL)
@pytest.mark.skipif(
    not (find_spec("sacrebleu") and find_spec("tenacity")),
    reason="lmms-eval is installed without its dependencies, which running a task needs: pip install lmms-eval",
)
@pytest.mark.parametrize("launcher", [["-m"], ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]])
def test_a_task_of_lmms_eval_runs_from_the_command_line(launcher, directory, vqa, rows, asked, tmp_path):
    """In one process and in two."""
    rows.cast_column("image", ImageFeature()).to_parquet(tmp_path / "test.parquet")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "needle.yaml").write_text(TASK.replace("DATA", str(tmp_path / "test.parquet")))
    (tasks / "functions.py").write_text(FUNCTIONS)
    command = [sys.executable, *launcher, "lmms_eval", "--model", "mgpo", "--model_args", f"pretrained={directory}"]
    command += ["--tasks", "needle", "--include_path", str(tasks), "--batch_size", "2", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    variables = environment(ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_needle.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    wanted = expected(vqa, asked)
    assert [one["filtered_resps"] for one in found] == wanted
    assert [one["acc"] for one in found] == [
        float(answer == row["answer"]) for answer, row in zip(wanted, rows, strict=True)
    ]
