"""`eval.py` from the command line to the report, on a random tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from commands import ROOT, environment, load_script
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from mgpo_trl import image_loading, images
from mgpo_trl.boxes import BoxStatus, format_box
from mgpo_trl.builtin.needle import make_dataset
from mgpo_trl.conversation import Conversation
from mgpo_trl.evaluation import runner
from mgpo_trl.generation import ModelGenerator
from mgpo_trl.geometry import original_to_view
from mgpo_trl.image_loading import open_and_fit
from mgpo_trl.images import open_image
from mgpo_trl.prompts import PromptTemplate
from mgpo_trl.records import RecordError, read_rollouts, read_run
from mgpo_trl.rollout import Sampled

LIMIT = 12
PIXELS = ["--max_pixels", "84x84", "--min_pixels", "56x56"]
OF_THE_RUN = ("commit", "dirty")  # of the repository, which may change between two runs


def evaluate(*arguments):
    load_script("eval").main([str(argument) for argument in arguments])


def needle(tiny_dir, output_dir, *more, num_rounds=2, budget=10, limit=LIMIT, batch_size=4):
    budgets = [str(budget)] * num_rounds
    return [
        "--model", str(tiny_dir), "--dataset", "builtin:needle", "--limit", str(limit), "--device", "cpu", *PIXELS,
        "--output_dir", str(output_dir), "--batch_size", str(batch_size), "--num_rounds", str(num_rounds),
        "--token_budgets", *budgets, *map(str, more),
    ]  # fmt: skip


def report_of(directory):
    return json.loads((directory / "report.json").read_text())


def same_figures(one, other):
    drop = dict.fromkeys(OF_THE_RUN)
    return {**one, **drop} == {**other, **drop}


@pytest.fixture(scope="module", params=[1, 2])
def finished(request, tiny_dir, tmp_path_factory):
    """An uninterrupted evaluation, with one round and with two."""
    directory = tmp_path_factory.mktemp(f"eval{request.param}")
    evaluate(*needle(tiny_dir, directory, num_rounds=request.param))
    return request.param, directory


@pytest.fixture(scope="module")
def two_rounds(tiny_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    evaluate(*needle(tiny_dir, directory))
    return directory


# what it leaves behind


def test_the_report_has_the_keys_of_the_issue(finished):
    num_rounds, directory = finished
    report = report_of(directory)
    assert {
        "accuracy", "n", "by_category", "valid_ratio", "status", "crop_area", "coverage", "hit_rate", "max_pixels",
        "min_pixels", "num_rounds", "decoding", "bad_rows", "prompts_fingerprint", "commit",
    } <= set(report)  # fmt: skip
    assert (report["n"], report["num_rounds"], report["max_pixels"]) == (LIMIT, num_rounds, 84 * 84)
    assert set(report["accuracy"]) == {"strict", "flexible", "stderr"}
    assert set(report["accuracy"]["stderr"]) == {"strict", "flexible"}
    assert sum(entry["n"] for entry in report["by_category"].values()) == LIMIT
    assert report["decoding"] == {"mode": "greedy"} and report["bad_rows"] == []
    if num_rounds == 1:
        assert report["valid_ratio"] is None and report["hit_rate"] is None and report["status"] == {}
    else:
        assert 0 <= report["valid_ratio"] <= 1 and 0 <= report["hit_rate"] <= 1
        assert set(report["status"]) == {status.value for status in BoxStatus}
        assert sum(report["status"].values()) == LIMIT
    assert (directory / "report.md").read_text().startswith("# ")


def test_the_run_record_says_what_was_asked(finished, tiny_dir):
    num_rounds, directory = finished
    run = read_run(directory)
    assert (run["seed"], run["num_rounds"], run["max_pixels"], run["n_expected"]) == (42, num_rounds, 84 * 84, LIMIT)
    assert run["prompts_fingerprint"] == PromptTemplate().fingerprint and run["versions"]["torch"]
    assert run["config"]["model"] == str(tiny_dir) and run["config"]["conversation"]["token_budgets"][-1] == 10


def test_every_row_is_in_the_rollouts_once_and_in_order(finished):
    num_rounds, directory = finished
    records = list(read_rollouts(directory))
    expected = [row["id"] for row in make_dataset("needle", "heldout", LIMIT, seed=42)]
    assert [record["id"] for record in records] == expected
    assert all(len(record["turns"]) == num_rounds and record["view_size"] == [84, 84] for record in records)


def test_the_record_stands_before_the_first_rollout(tiny_dir, tmp_path, monkeypatch):
    seen = []
    original = ModelGenerator.__call__

    def watch(self, contexts):
        seen.append(((tmp_path / "run.json").is_file(), len(list(read_rollouts(tmp_path)))))
        return original(self, contexts)

    monkeypatch.setattr(ModelGenerator, "__call__", watch)
    evaluate(*needle(tiny_dir, tmp_path, limit=8))
    assert seen == [(True, 0), (True, 0), (True, 4), (True, 4)]  # and rollouts are appended batch by batch


def test_the_report_counts_what_the_turns_say(tiny_dir, tmp_path, monkeypatch):
    """Hand-written turns: a third finds the card, a third looks elsewhere, a third has no box; half are right."""
    rows = list(make_dataset("needle", "heldout", LIMIT, seed=42))

    def speak(self, contexts):
        numbers = [next(index) for _ in contexts]
        texts = [turn_text(rows[number], number, contexts[0].round) for number in numbers]
        return [Sampled([*self.chat.tokenizer(text)["input_ids"], self.chat.end_of_turn_id]) for text in texts]

    def turn_text(row, number, of_round):
        if of_round == 2:
            return f"\\boxed{{{row['answer']}}}" if number % 2 else "The answer is " + row["answer"] + "."
        box = tuple(round(value) for value in original_to_view(row["target_boxes"][0], (336, 336), (84, 84)))
        x, y = (0 if corner >= 28 else 56 for corner in box[:2])
        elsewhere = (x, y, x + 28, y + 28)
        return [format_box(box, (84, 84), "absolute"), format_box(elsewhere, (84, 84), "absolute"), "no"][number % 3]

    order = [*range(0, 4), *range(0, 4), *range(4, 8), *range(4, 8), *range(8, 12), *range(8, 12)]
    index = iter(order)
    monkeypatch.setattr(ModelGenerator, "__call__", speak)
    evaluate(*needle(tiny_dir, tmp_path, "--min_box_side", 14))
    report = report_of(tmp_path)
    assert report["accuracy"]["strict"] == 0.5 and report["accuracy"]["flexible"] == 1.0
    assert report["accuracy"]["stderr"]["strict"] == pytest.approx((0.25 / LIMIT) ** 0.5)
    assert report["valid_ratio"] == pytest.approx(8 / 12) and report["hit_rate"] == pytest.approx(4 / 12)
    assert report["coverage"] == pytest.approx(4 / 12, abs=0.01)
    assert (report["status"]["ok"], report["status"]["no_json"]) == (8, 4)


def test_rescore_gives_the_same_report_without_torch(finished):
    _, directory = finished
    before = (directory / "report.json").read_bytes()
    (directory / "report.json").unlink()
    blocked = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['eval.py', '--rescore', {str(directory)!r}]; "
        f"runpy.run_path({str(ROOT / 'eval.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert (directory / "report.json").read_bytes() == before
    assert done.stdout.strip() == (directory / "report.md").read_text().strip()


def test_rescore_reads_the_rollouts(two_rounds, tmp_path):
    """The report follows from the rollouts: an answer changed by hand changes it."""
    records = list(read_rollouts(two_rounds))
    assert report_of(two_rounds)["accuracy"]["strict"] == 0.0
    records[0]["turns"][-1]["text"] = f"\\boxed{{{records[0]['answer']}}}"
    (tmp_path / "run.json").write_bytes((two_rounds / "run.json").read_bytes())
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluate("--rescore", tmp_path)
    assert report_of(tmp_path)["accuracy"]["strict"] == pytest.approx(1 / LIMIT)


# interrupted and continued


def test_an_error_in_the_middle_loses_and_doubles_nothing(two_rounds, tiny_dir, tmp_path, monkeypatch):
    original, calls = ModelGenerator.__call__, []

    def fail_in_the_second_batch(self, contexts):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, contexts)

    monkeypatch.setattr(ModelGenerator, "__call__", fail_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*needle(tiny_dir, tmp_path))
    monkeypatch.setattr(ModelGenerator, "__call__", original)
    path = tmp_path / "rollouts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 and not (tmp_path / "report.json").exists()
    path.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # the machine died in the middle of a line
    evaluate(*needle(tiny_dir, tmp_path))
    assert list(read_rollouts(tmp_path)) == list(read_rollouts(two_rounds))
    assert same_figures(report_of(tmp_path), report_of(two_rounds))
    assert len(read_run(tmp_path)["resumed"]) == 1


@pytest.mark.slow
def test_sigkill_loses_and_doubles_nothing(tiny_dir, tmp_path):
    options = {"budget": 48, "batch_size": 1}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, str(ROOT / "eval.py"), *needle(tiny_dir, killed, **options)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    kill_after_lines(process, killed / "rollouts.jsonl", 3)
    kept = list(read_rollouts(killed))
    assert 3 <= len(kept) < LIMIT and not (killed / "report.json").exists()
    evaluate(*needle(tiny_dir, killed, **options))
    evaluate(*needle(tiny_dir, whole, **options))
    after = list(read_rollouts(killed))
    assert after[: len(kept)] == kept and after == list(read_rollouts(whole))
    assert same_figures(report_of(killed), report_of(whole))


def kill_after_lines(process, path, count, timeout=240):
    """SIGKILL a process as soon as a file has that many lines."""
    deadline = time.monotonic() + timeout
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline, "the run wrote nothing"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_finished_evaluation_plays_nothing_again(two_rounds, tiny_dir, monkeypatch):
    before = (two_rounds / "rollouts.jsonl").read_bytes()
    monkeypatch.setattr(ModelGenerator, "__call__", lambda self, contexts: pytest.fail("sampled again"))
    evaluate(*needle(tiny_dir, two_rounds))
    assert (two_rounds / "rollouts.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "change, named",
    [
        (["--num_rounds", "1", "--token_budgets", "10"], "num_rounds"),
        (["--seed", "3"], "seed"),
        (["--temperature", "1.0"], "decoding"),
        (["--max_pixels", "112x112"], "max_pixels"),
        (["--limit", "6"], "limit"),
    ],
)
def test_another_configuration_in_the_same_directory_is_refused(change, named, two_rounds, tiny_dir, monkeypatch):
    before = (two_rounds / "rollouts.jsonl").read_bytes(), read_run(two_rounds)
    monkeypatch.setattr(runner, "load_for_inference", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(RecordError, match=f"another configuration: .*{named}.*another directory"):
        evaluate(*needle(tiny_dir, two_rounds), *change)
    assert ((two_rounds / "rollouts.jsonl").read_bytes(), read_run(two_rounds)) == before


def test_a_start_that_failed_before_any_rollout_does_not_bind_the_directory(tiny_dir, tmp_path):
    with pytest.raises(Exception, match="float99"):
        evaluate(*needle(tiny_dir, tmp_path, "--dtype", "float99", limit=2))
    assert (tmp_path / "run.json").exists()
    evaluate(*needle(tiny_dir, tmp_path, limit=2))
    assert report_of(tmp_path)["n"] == 2 and read_run(tmp_path)["config"]["dtype"] == "auto"


def test_sampling_is_seeded(my_file, tiny_dir, tmp_path):
    """On a file of one's own, where the seed does not also draw the scenes."""
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = needle(tiny_dir, tmp_path / name, "--temperature", 1, "--seed", seed, "--skip_bad_rows", "true")
        arguments[arguments.index("builtin:needle")] = str(my_file)
        evaluate(*arguments)
        texts.append([turn["text"] for record in read_rollouts(tmp_path / name) for turn in record["turns"]])
    assert texts[0] == texts[1] != texts[2]
    assert report_of(tmp_path / "a")["decoding"] == {"mode": "sampled", "temperature": 1.0, "top_p": 1.0}


# models and settings


def test_the_conversation_of_the_model_is_used_and_can_be_overridden(tiny_dir, tmp_path):
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for file in tiny_dir.iterdir():
        (model_dir / file.name).symlink_to(file)
    prompts = PromptTemplate(direct_choices="{question}{choices} Say it.")
    Conversation(1, 84 * 84, 56 * 56, (3,), min_box_side=14, prompts=prompts).save(model_dir)
    arguments = ["--model", model_dir, "--dataset", "builtin:needle", "--limit", 2, "--device", "cpu"]
    evaluate(*arguments, "--output_dir", tmp_path / "own")
    run, report = read_run(tmp_path / "own"), report_of(tmp_path / "own")
    assert (report["num_rounds"], report["max_pixels"], report["turns"][0]["tokens"]) == (1, 84 * 84, 3)
    assert run["prompts_fingerprint"] == prompts.fingerprint == report["prompts_fingerprint"]
    evaluate(*arguments, "--output_dir", tmp_path / "two", "--num_rounds", 2, "--min_pixels", 28 * 28)
    run = read_run(tmp_path / "two")
    assert (run["num_rounds"], run["min_pixels"], run["max_pixels"]) == (2, 28 * 28, 84 * 84)
    assert run["config"]["conversation"]["token_budgets"] == [3, 3]
    assert run["config"]["conversation"]["min_box_side"] == 14


def test_an_adapter_counts_once_however_it_is_named(two_rounds, tiny_dir, tmp_path):
    """`--model BASE --adapter A` and `--model A` are the same model, and not the base."""
    adapter = tmp_path / "adapter"
    base = AutoModelForImageTextToText.from_pretrained(tiny_dir)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(adapter)
    AutoProcessor.from_pretrained(tiny_dir).save_pretrained(adapter)
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    AutoProcessor.from_pretrained(tiny_dir).save_pretrained(merged)
    runs = {
        "merged": needle(merged, tmp_path / "m"),
        "both": needle(tiny_dir, tmp_path / "b", "--adapter", adapter),
        "adapter": needle(adapter, tmp_path / "a"),
    }
    texts = {"base": [record["turns"] for record in read_rollouts(two_rounds)]}
    for name, arguments in runs.items():
        evaluate(*arguments)
        texts[name] = [record["turns"] for record in read_rollouts(arguments[arguments.index("--output_dir") + 1])]
    assert texts["both"] == texts["adapter"] == texts["merged"] != texts["base"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--token_budgets", "5"], r"`token_budgets` must be 2 numbers >= 1, one for each round, got \[5\]"),
        (["--token_budgets", "5", "0"], "`token_budgets` must be 2 numbers >= 1"),
        (["--num_rounds", "0"], "`num_rounds` must be >= 1, got 0"),
        (["--max_pixels", "28x28"], r"min_pixels.*3136.*max_pixels.*784"),
        (["--max_pixels", "big"], "must look like 1003520"),
        (["--temperature", "-1"], "`--temperature` must be >= 0"),
        (["--batch_size", "0"], "`--batch_size` must be >= 1"),
        (["--split", "dev"], "no split 'dev'"),
        (["--prompts_file", "nowhere.yaml"], "nowhere.yaml"),
        (["--zoom", "2"], "--zoom"),
    ],
)
def test_a_bad_option_stops_before_the_model_loads(change, message, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_for_inference", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(*needle(tiny_dir, tmp_path / "out"), *change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_model_and_dataset_are_asked_for(missing, tiny_dir):
    given = {"model": str(tiny_dir), "dataset": "builtin:needle"}
    given.pop(missing)
    with pytest.raises(ValueError, match=f"`--{missing}` is missing. Give it, or `--rescore DIR`"):
        evaluate(*(part for name, value in given.items() for part in (f"--{name}", value)))


# a person's own file


@pytest.fixture
def my_file(tmp_path, rows):
    """Four good rows, and between them a missing image, a row without answer, and an image that is cut off."""
    lines = []
    for row in rows:
        (tmp_path / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        lines.append({**{name: row[name] for name in ("question", "choices", "answer", "target_boxes", "category")},
                      "image": row["image"]["path"]})  # fmt: skip
    (tmp_path / "cut.png").write_bytes(rows[0]["image"]["bytes"][:2000])
    bad = [{**lines[0], "image": "gone.png"}, {**lines[0], "answer": None}, {**lines[0], "image": "cut.png"}]
    lines[1:1] = bad
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_bad_rows_are_skipped_counted_and_listed(my_file, tiny_dir, tmp_path):
    arguments = needle(tiny_dir, tmp_path / "out", "--skip_bad_rows", "true")
    arguments[arguments.index("builtin:needle")] = str(my_file)
    evaluate(*arguments)
    report, run = report_of(tmp_path / "out"), read_run(tmp_path / "out")
    assert report["n"] == 4 and report["by_category"] and report["hit_rate"] is not None
    assert [(bad["row"], bad["field"]) for bad in report["bad_rows"]] == [(1, "image"), (2, "answer"), (3, "image")]
    assert run["bad_rows"] == report["bad_rows"] and "gone.png" in report["bad_rows"][0]["reason"]
    assert [record["id"] for record in read_rollouts(tmp_path / "out")] == ["0", "4", "5", "6"]
    assert "3 bad rows" in (tmp_path / "out" / "report.md").read_text()


def test_without_skip_bad_rows_the_first_bad_row_stops_the_evaluation(my_file, tiny_dir, tmp_path):
    arguments = needle(tiny_dir, tmp_path / "out")
    arguments[arguments.index("builtin:needle")] = str(my_file)
    with pytest.raises(ValueError, match="row 1.*image.*gone.png"):
        evaluate(*arguments)
    assert not (tmp_path / "out").exists()


# protocols


PROTOCOLS = ["direct", "mgpo", "no-crop", "oracle-crop", "crop-only"]


@pytest.fixture(scope="module")
def protocols(tiny_dir, tmp_path_factory):
    """Five protocols on the real tiny model; a box comes by luck only, so most fall back."""
    directory = tmp_path_factory.mktemp("protocols")
    evaluate(*needle(tiny_dir, directory, "--protocol", *PROTOCOLS))
    return directory


def test_protocols_share_their_first_turn(protocols):
    texts = {name: [r["turns"][0]["text"] for r in read_rollouts(protocols / name)] for name in PROTOCOLS}
    assert len(texts["mgpo"]) == LIMIT and texts["direct"] != texts["mgpo"]
    assert texts["mgpo"] == texts["no-crop"] == texts["oracle-crop"] == texts["crop-only"]
    for name in PROTOCOLS:
        run = read_run(protocols / name)
        assert (run["protocol"], run["num_rounds"]) == (name, 1 if name == "direct" else 2)
        assert {record["protocol"] for record in read_rollouts(protocols / name)} == {name}
        assert (protocols / name / "report.html").is_file() and report_of(protocols / name)["protocol"] == name
    oracle = [record["turns"][0]["box"] for record in read_rollouts(protocols / "oracle-crop")]
    assert all(box["shown_px"] is not None for box in oracle)
    joint = json.loads((protocols / "protocols.json").read_text())
    assert set(joint["protocols"]) == set(PROTOCOLS) and joint["crop_utility"]["mgpo - no-crop"]["n"] == LIMIT
    assert "max_pixels 7,056" in (protocols / "protocols.md").read_text()


def test_one_protocol_alone_gives_the_same(protocols, two_rounds):
    texts = [[turn["text"] for turn in record["turns"]] for record in read_rollouts(two_rounds)]
    assert texts == [[turn["text"] for turn in record["turns"]] for record in read_rollouts(protocols / "mgpo")]


def test_protocols_are_continued_after_a_kill(protocols, tiny_dir, tmp_path):
    """Half of one protocol is missing, and another has nothing yet."""
    for name in PROTOCOLS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes((protocols / name / "run.json").read_bytes())
        lines = (protocols / name / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
        keep = {"mgpo": 6, "no-crop": 0}.get(name, LIMIT)
        (tmp_path / name / "rollouts.jsonl").write_bytes(b"".join(lines[:keep]))
    evaluate(*needle(tiny_dir, tmp_path, "--protocol", *PROTOCOLS))
    for name in PROTOCOLS:
        records = list(read_rollouts(tmp_path / name))
        assert records == list(read_rollouts(protocols / name))


def test_samples_of_a_question(tiny_dir, tmp_path):
    evaluate(*needle(tiny_dir, tmp_path, "--num_samples", 3, "--temperature", 1.0, limit=4))
    report = report_of(tmp_path)
    assert (report["n"], report["n_questions"], report["num_samples"]) == (12, 4, 3)
    assert "Avg@3" in (tmp_path / "report.md").read_text().splitlines()[0]
    texts = [record["turns"][0]["text"] for record in read_rollouts(tmp_path)]
    assert len(set(texts)) > 6
    with pytest.raises(ValueError, match="needs a `--temperature` above 0"):
        evaluate(*needle(tiny_dir, tmp_path, "--num_samples", 3))


def test_draft_views_and_shuffled_choices_are_conditions(tiny_dir, tmp_path):
    evaluate(*needle(tiny_dir, tmp_path, "--view_decoding", "draft", "--shuffle_choices", 4, limit=4))
    first = (tmp_path / "report.md").read_text().splitlines()[0]
    assert "views decoded as draft" in first and "choices shuffled, seed 4" in first
    with pytest.raises(RecordError, match="config.shuffle_choices"):
        evaluate(*needle(tiny_dir, tmp_path, "--view_decoding", "draft", limit=4))


def test_the_oracle_needs_boxes(tiny_dir, tmp_path):
    rows = [{**row, "target_boxes": None} for row in make_dataset("needle", "heldout", 2, 0)]
    folder = tmp_path / "set"
    folder.mkdir()
    for row in rows:
        (folder / f"{row['id']}.png").write_bytes(row.pop("image")["bytes"])
        row["image"] = f"{row['id']}.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = needle(tiny_dir, tmp_path / "out", "--protocol", "oracle-crop")
    arguments[arguments.index("builtin:needle")] = str(folder / "rows.jsonl")
    with pytest.raises(ValueError, match="oracle-crop needs `target_boxes`"):
        evaluate(*arguments)


@pytest.mark.parametrize("tokens", [640, 1280, 4096, 16384])
def test_every_pixel_cap_stands_in_the_title(tiny_dir, tmp_path, tokens):
    arguments = needle(tiny_dir, tmp_path, limit=1)
    arguments[arguments.index("84x84")] = f"{tokens}x28x28"
    evaluate(*arguments)
    assert f"= {tokens}x28x28" in (tmp_path / "report.md").read_text().splitlines()[0]


# images


def test_image_threads_change_nothing_and_no_original_outlives_its_batch(two_rounds, tiny_dir, tmp_path, monkeypatch):
    references, most = [], []

    def watched(*args):
        image, view = open_and_fit(*args)
        references.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in references))
        return image, view

    monkeypatch.setattr(image_loading, "open_and_fit", watched)
    evaluate(*needle(tiny_dir, tmp_path, "--image_threads", 0))
    for name in ("rollouts.jsonl", "pictures.jsonl"):
        assert (tmp_path / name).read_bytes() == (two_rounds / name).read_bytes()
    assert len(most) == LIMIT and max(most) == 4  # one batch, whatever the protocol and the pictures keep


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_direct_answer_to_a_draft_view_never_decodes_the_original(tiny_dir, rows, tmp_path, monkeypatch, num_rounds):
    for number, row in enumerate(rows):
        open_image(row["image"], "scene").save(tmp_path / f"{number}.jpg", quality=95)
    lines = [{**{name: row[name] for name in ("id", "question", "choices", "answer")}, "image": f"{number}.jpg"}
             for number, row in enumerate(rows)]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    decoded = []
    monkeypatch.setattr(images, "open_image", lambda *args: decoded.append(args[1]) or open_image(*args))
    box = format_box((5, 5, 60, 50), (84, 84), "absolute")

    def speak(self, contexts):
        said = box if contexts[0].round < num_rounds else "\\boxed{A}"
        return [Sampled([*self.chat.tokenizer(said)["input_ids"], self.chat.end_of_turn_id]) for _ in contexts]

    monkeypatch.setattr(ModelGenerator, "__call__", speak)
    arguments = needle(tiny_dir, tmp_path / "out", "--view_decoding", "draft", num_rounds=num_rounds)
    arguments[arguments.index("builtin:needle")] = str(tmp_path / "mine.jsonl")
    evaluate(*arguments)
    assert report_of(tmp_path / "out")["n"] == 4
    assert sorted(decoded) == (sorted(row["id"] for row in rows) if num_rounds == 2 else [])
