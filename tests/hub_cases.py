"""
What `test_hub.py` asks of pushes, run in one process of its own: `HF_ENDPOINT` must be set before `huggingface_hub` is
imported, and importing the trainer is slow. Each `case_*` gets an empty Hub and an empty directory.

Run as a script, it prints one JSON line for each case: its name, and its traceback or `null`.
"""

import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import load_script, shorten_builtin
from hub_stub import HubStub, Repository, hub_stub

OWNER = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]}


class Bench:
    """What a case works with."""

    def __init__(self, stub: HubStub, directory: Path, base: Path, data: Path):
        self.stub, self.directory, self.base, self.data = stub, directory, base, data
        self.output = directory / "zoom"

    def train(self, *arguments, model=None):
        """`train.py` for a step or two."""
        options = {
            "model_name_or_path": model or self.base, "dataset_name": self.data, "output_dir": self.output,
            "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "dtype": "float32", "bf16": "false", "report_to": "none", "max_pixels": "84x84", "min_pixels": "56x56",
            "round_token_budgets": "12 6", "min_box_side": 14, "save_strategy": "no", "learning_rate": 1e-3,
            "gradient_checkpointing": "false", "push_to_hub": "true", "hub_strategy": "end", "disable_tqdm": "true",
            "reward_funcs": "commands.every_second_is_right", "logging_steps": 1,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
        words += map(str, arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *words])
            load_script("train").main(words)

    def with_base(self, repo_id="someone/tiny", card="---\nlicense: apache-2.0\n---\n"):
        """Put the base model on the Hub."""
        files = {path.name: path.read_bytes() for path in self.base.iterdir()}
        self.stub.repositories[repo_id] = Repository(branches={"main": {**files, "README.md": card.encode()}})
        return repo_id

    @property
    def card(self):
        return self.stub.files("me/zoom")["README.md"].decode()


def args_of(directory, **changes):
    """The options that `prepare_push` reads."""
    options = {
        "push_to_hub": True, "output_dir": str(directory / "zoom"), "hub_model_id": None, "hub_token": None,
        "hub_private_repo": None, "hub_revision": None, "process_index": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**options, **changes})


@contextmanager
def refused(*said):
    from mgpo_trl.hub import PushError

    with pytest.raises(PushError) as caught:
        yield caught
    for words in said:
        assert words in str(caught.value), str(caught.value)


@contextmanager
def warnings():
    """Texts of the warnings that we log meanwhile."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("mgpo_trl").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("mgpo_trl").removeHandler(handler)


def answers_of(path, rows, **options):
    """What a model says, turn by turn, and where it looked."""
    from mgpo_trl import GroundedVQA
    from mgpo_trl.inference import Question

    vqa = GroundedVQA.from_pretrained(str(path), device="cpu", **options)
    said = vqa.batch([Question(row["image"], row["question"], row["choices"]) for row in rows])
    return vqa, [(one.answer, one.box, one.status, one.turns) for one in said]


def rows_for(level="refer", n=4):
    from mgpo_trl.builtin.needle import make_dataset

    return make_dataset(level, "heldout", n, seed=3)


# before training


def case_without_a_token(bench):
    from mgpo_trl.hub import prepare_push

    os.environ.pop("HF_TOKEN")
    with refused("there is none", "hf auth login", "HF_TOKEN", "/settings/tokens", "push later"):
        prepare_push(args_of(bench.directory))
    bench.output.mkdir()
    for name in ("config.json", "conversation.json"):
        (bench.output / name).write_text("{}")
    with refused("there is none") as told:
        push_again(bench)
    assert "--push_to_hub" not in str(told.value), "it is not a training that was asked for"
    assert bench.stub.requests == []
    prepare_push(args_of(bench.directory, push_to_hub=False))
    prepare_push(args_of(bench.directory, hub_token="hf_writer"))
    assert list(bench.stub.repositories) == ["me/zoom"]


def case_a_wrong_token_stops_train_py_before_the_model_loads(bench):
    os.environ["HF_TOKEN"] = "hf_wrong"
    with refused("does not accept the token (401)", "hf auth login", "HF_TOKEN"):
        bench.train(model="nobody/nothing")
    assert bench.stub.requests == ["GET /api/whoami-v2"] and not bench.output.exists()


def case_a_trainer_built_in_python_is_checked_too(bench):
    from mgpo_trl import MGPOConfig, MGPOTrainer

    os.environ["HF_TOKEN"] = "hf_wrong"
    with refused("does not accept the token"):
        MGPOTrainer("nobody/nothing", args=MGPOConfig(str(bench.output), push_to_hub=True))


def case_offline(bench):
    from huggingface_hub import constants

    from mgpo_trl.hub import prepare_push

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with refused("HF_HUB_OFFLINE is set", "Unset it"):
            prepare_push(args_of(bench.directory))


def case_tokens_that_may_not_write(bench):
    from mgpo_trl.hub import prepare_push

    scope = {"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}
    other = {"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.write"]}
    one_repo = {"entity": {"type": "model", "name": "me/zoom"}, "permissions": ["repo.write"]}
    for number, (token, name, said) in enumerate(
        [
            ({"role": "read"}, "zoom", "may only read"),
            (
                {"role": "fineGrained", "fineGrained": {"scoped": [scope, other]}},
                "zoom",
                "has no `repo.write` for 'me'",
            ),
            ({"role": "fineGrained", "fineGrained": {"scoped": [one_repo]}}, "other", "has no `repo.write`"),
            ({"role": "write"}, "stranger/zoom", "belongs to 'stranger', and the token to 'me'"),
            ({"role": "write"}, "club/zoom", "may only read in the organisation 'club'"),
        ]
    ):
        bench.stub.users[f"hf_{number}"] = {**OWNER, "auth": {"accessToken": token}}
        with refused(said):
            prepare_push(args_of(bench.directory, hub_token=f"hf_{number}", hub_model_id=name))
    assert bench.stub.repositories == {}
    prepare_push(args_of(bench.directory, hub_token="hf_1", hub_model_id="lab/zoom"))  # there it may
    prepare_push(args_of(bench.directory, hub_token="hf_2"))
    assert list(bench.stub.repositories) == ["lab/zoom", "me/zoom"]


def case_a_hub_that_can_not_be_asked(bench):
    from mgpo_trl.hub import prepare_push

    bench.stub.users["hf_again"] = bench.stub.users["hf_writer"]
    bench.stub.fail("whoami", 503, times=1)
    with refused("could not be asked", bench.stub.url, "Check the network"):
        prepare_push(args_of(bench.directory, hub_token="hf_again"))
    bench.stub.fail("whoami", 429, times=1)  # says nothing of the token
    with warnings() as said:
        prepare_push(args_of(bench.directory, hub_token="hf_again"))
    assert "asked too often" in said[0] and "me/zoom" in bench.stub.repositories


def case_the_repository(bench):
    from mgpo_trl.hub import prepare_push

    args = args_of(bench.directory, hub_private_repo=True, hub_revision="try-2")
    prepare_push(args)
    assert args.hub_model_id == "me/zoom" and bench.stub.repositories["me/zoom"].private
    assert set(bench.stub.repositories["me/zoom"].branches) == {"main", "try-2"}
    prepare_push(args)  # it is there already, and as asked for
    bench.stub.repositories["me/open"] = Repository()
    with refused("is there and public", "/me/open/settings"):
        prepare_push(args_of(bench.directory, hub_model_id="me/open", hub_private_repo=True))
    prepare_push(args_of(bench.directory, hub_model_id="me/open"))
    with refused("The repository 'my zoom!' can not be opened", "--hub_model_id"):
        prepare_push(args_of(bench.directory, output_dir=str(bench.directory / "my zoom!")))


# round trips


def case_a_full_model_answers_as_it_does_here(bench):
    bench.train("--hub_model_id", "zoom", "--hub_token", "hf_writer", "--min_box_side", "20")
    files = bench.stub.files("me/zoom")
    assert {"model.safetensors", "config.json", "conversation.json", "README.md", "rollouts.png"} <= set(files)
    assert {"tokenizer.json", "chat_template.jinja", "run.json", "trainer_state.json"} <= set(files)
    assert not [name for name, data in files.items() if b"hf_writer" in data], "the token was pushed"
    assert len(bench.stub.repositories["me/zoom"].commits) == 1
    kept = json.loads(files["conversation.json"])
    assert (kept["num_rounds"], kept["max_pixels"], kept["min_pixels"]) == (2, 84 * 84, 56 * 56)
    assert (kept["coordinates"], kept["min_box_side"], kept["token_budgets"]) == ("absolute", 20, [12, 6])
    assert kept["prompts"]["grounding"] and kept["protocol_version"] and kept["max_box_aspect"] == 100
    trained = files["model.safetensors"]
    assert trained == (bench.output / "model.safetensors").read_bytes()
    assert trained != (bench.base / "model.safetensors").read_bytes()
    rows = rows_for()
    here, expected = answers_of(bench.output, rows)
    there, said = answers_of("me/zoom", rows)
    assert said == expected and there.conversation == here.conversation
    assert there.template.min_box_side == 20 and there.template.coordinates == "absolute"


def case_the_card_says_what_was_done(bench):
    base = bench.with_base()
    bench.train("--hub_token=hf_writer", "--hub_model_id", "me/zoom", model=base)
    card, data = bench.card, metadata(bench.card)
    assert data == {
        "base_model": "someone/tiny", "library_name": "transformers", "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text", "tags": ["trl", "mgpo", "grounding"],
    }  # fmt: skip
    assert (
        "MGPO" in card and "https://huggingface.co/papers/2507.05920" in card and "GRPO" not in card.split("```")[-2]
    )
    assert "2402.03300" not in card and "![" in card and "](rollouts.png)" in card
    assert "--hub_token=<masked>" in card and "--max_steps 1" in card and "hf_writer" not in card
    assert f"Trained on `{bench.data}`. Optimizer steps: 1." in card
    assert "| `reward` | 0.500 |" in card and "transformers 5." in card and "| `num_rounds` | `2` |" in card
    assert "That of the base model: apache-2.0." in card
    run_quick_start(card, bench.directory)


def metadata(card):
    import yaml

    return yaml.safe_load(card.split("---")[1])


def run_quick_start(card, directory):
    """The snippet of a card, as a stranger would run it beside a photograph."""
    from mgpo_trl.images import open_image

    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    open_image(rows_for(n=1)[0]["image"], "photo").save(directory / "photo.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        names = {"print": lambda *words: None}
        exec(snippet, names)  # noqa: S102
    assert len(names["said"].turns) == 2


def case_an_adapter_finds_its_base_by_id(bench):
    base = bench.with_base()
    bench.train("--use_peft", "--lora_r", "4", "--learning_rate", "0.05", model=base)
    files = bench.stub.files("me/zoom")
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    data = metadata(bench.card)
    assert data["base_model"] == base and data["library_name"] == "peft" and "lora" in data["tags"]
    rows = rows_for()
    assert answers_of("me/zoom", rows)[1] == answers_of(bench.output, rows)[1]
    assert "`lora_r` | `4`" in bench.card
    run_quick_start(bench.card, bench.directory)


def case_an_adapter_on_a_local_base_says_so(bench):
    with warnings() as said:
        bench.train("--use_peft", "--lora_r", "4")
    assert any("which nobody else has" in text for text in said)
    assert "base_model" not in metadata(bench.card) and 'base_model="path/to/the/base/model"' in bench.card
    rows = rows_for(n=1)
    assert answers_of("me/zoom", rows, base_model=str(bench.base))[1] == answers_of(bench.output, rows)[1]


def case_private_and_on_a_branch(bench):
    bench.train("--hub_private_repo", "true", "--hub_revision", "try-2", "--card_picture", "false")
    repository = bench.stub.repositories["me/zoom"]
    assert repository.private and "model.safetensors" in repository.branches["try-2"]
    assert repository.branches["main"] == {} and "rollouts.png" not in repository.branches["try-2"]
    rows = rows_for(n=1)
    assert answers_of("me/zoom", rows, revision="try-2")[1] == answers_of(bench.output, rows)[1]
    with pytest.raises(ValueError, match="The Hub does not give out 'me/zoom', revision try-3"):
        answers_of("me/zoom", rows, revision="try-3")


def case_an_adapter_of_the_hub_is_merged_with_its_conversation_and_the_facts_of_its_card(bench):
    from mgpo_trl.merging import merge_adapter
    from mgpo_trl.model_card import write_card

    base = bench.with_base()
    bench.train("--use_peft", "--lora_r", "4", "--learning_rate", "0.05", model=base)
    merged, rows = merge_adapter("me/zoom", bench.directory / "merged"), rows_for()
    assert answers_of(merged, rows)[1] == answers_of(bench.output, rows)[1]
    card = write_card(merged).read_text()
    assert metadata(card)["base_model"] == base and metadata(card)["library_name"] == "transformers"
    assert "Optimizer steps: 1." in card and "](rollouts.png)" in card


def case_rollouts_of_private_data_stay_here(bench):
    for folder in ("eval", "preflight"):
        (bench.output / folder).mkdir(parents=True)
    names = ("rollouts.jsonl", "pictures.jsonl", "rollouts.html", "eval/rollouts.jsonl", "eval/report.html")
    for name in (*names, "preflight/boxes.png"):
        (bench.output / name).write_text("private")
    bench.train("--log_completions", "true", "--report_to", "tensorboard")
    files = bench.stub.files("me/zoom")
    assert list((bench.output / "runs").iterdir()) and not [name for name in files if "tfevents" in name]
    assert list((bench.output / "completions").iterdir()) and not [name for name in files if "completions" in name]
    assert ".gitignore" in files and not [name for name, data in files.items() if data == b"private"]
    assert (bench.output / "rollouts.html").is_file() and "rollouts.html" not in files
    (bench.output / ".gitignore").write_text("rollouts.jsonl\n")
    push_again(bench)
    assert bench.stub.files("me/zoom")["rollouts.html"] == (bench.output / "rollouts.html").read_bytes()


# strategies


def case_every_save(bench):
    """The first push while training carries all that a stranger needs; it may be the only one before a crash."""
    bench.stub.fail("POST .*/commit/", 500, after=1)
    with refused("did not finish"):
        bench.train("--hub_strategy", "every_save", "--save_strategy", "steps", "--save_steps", 1)
    assert bench.stub.repositories["me/zoom"].commits == ["Training in progress, step 1"]
    assert {"model.safetensors", "conversation.json", "README.md"} <= set(bench.stub.files("me/zoom"))
    assert len(answers_of("me/zoom", rows_for(n=1))[1]) == 1


def case_checkpoints(bench):
    for strategy, wanted in (
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
    ):
        bench.stub.repositories.clear()
        each_step = ["--save_strategy", "steps", "--save_steps", 1, "--max_steps", 2]
        bench.train("--hub_strategy", strategy, "--hub_always_push", "true", *each_step)
        files = bench.stub.files("me/zoom")
        found = {name.split("/")[0] for name in files if name.endswith("/optimizer.pt")}
        assert found == wanted and f"{sorted(found)[-1]}/conversation.json" in files and "model.safetensors" in files
        state = json.loads(files[f"{sorted(found)[-1]}/trainer_state.json"])
        assert state["global_step"] == 2


def case_a_push_in_the_background_that_fails_is_told(bench):
    bench.stub.fail("POST .*/commit/", 413, times=1)
    with warnings() as said:
        bench.train("--hub_strategy", "every_save", "--save_strategy", "steps", "--save_steps", 1)
    (text,) = [text for text in said if "while training did not finish" in text]
    assert "'me/zoom'" in text and "413" in text and "Training goes on" in text
    assert bench.stub.repositories["me/zoom"].commits == ["End of training"]


# failures


def push_again(bench, *options):
    from mgpo_trl import push

    push.main([str(bench.output), "--repo_id", "me/zoom", *map(str, options)])


def case_an_upload_that_breaks_off_loses_nothing(bench):
    from mgpo_trl.hub import push_command

    bench.stub.fail("PUT /lfs/", 500)
    with refused("The push to 'me/zoom' did not finish", "500", push_command(bench.output, "me/zoom")):
        bench.train()
    rows = rows_for()
    expected = answers_of(bench.output, rows)[1]
    assert bench.stub.files("me/zoom") == {}
    bench.stub.faults.clear()
    push_again(bench)
    assert answers_of("me/zoom", rows)[1] == expected and "mgpo" in metadata(bench.card)["tags"]


def case_what_has_arrived_is_not_sent_again(bench):
    bench.stub.fail("POST .*/commit/", 500)
    with refused("did not finish"):
        bench.train()
    sent = bench.stub.asked("PUT /lfs/")
    bench.stub.faults.clear()
    push_again(bench)
    assert bench.stub.asked("PUT /lfs/") == sent > 0 and "model.safetensors" in bench.stub.files("me/zoom")
    push_again(bench)
    assert len(bench.stub.repositories["me/zoom"].commits) == 1, "nothing was new"


def case_a_hiccup_is_retried(bench):
    bench.stub.fail("PUT /lfs/", 503, times=1)
    bench.stub.fail("POST .*/preupload/", 500, times=1)
    bench.train()
    assert "model.safetensors" in bench.stub.files("me/zoom")


# pushing by hand


def case_results_come_from_reports(bench):
    bench.train()
    assert "## Results" not in bench.card
    where = bench.directory / "vstar"
    where.mkdir()
    (where / "report.json").write_text(json.dumps(REPORT))
    push_again(bench, "--reports", where)
    row = "| vstar, mgpo | 191 | 0.743 ± 0.032 | - | 0.990 ± 0.007 | greedy | 1003520 | `0123456789ab` |"
    assert row in bench.card and "## Training" in bench.card
    push_again(bench)
    assert row in bench.card, "a later push forgot them"
    with pytest.raises(ValueError, match=r"no `report.json` in .* Give the `--output_dir` of an evaluation"):
        push_again(bench, "--reports", bench.directory)


REPORT = {
    "dataset": "vstar", "split": None, "protocol": "mgpo", "n": 191, "hit_rate": None, "valid_ratio": 0.99,
    "accuracy": {"strict": 0.743, "stderr": {"strict": 0.032}}, "stderr": {"hit_rate": None, "valid_ratio": 0.007},
    "decoding": {"mode": "greedy"}, "max_pixels": 1003520, "commit": "0123456789abcdef",
}  # fmt: skip


def case_a_card_that_was_taken_over_stays(bench):
    from mgpo_trl.model_card.text import WRITTEN_BY

    bench.train()
    own = bench.card.replace(WRITTEN_BY, "").replace("# zoom", "# My zoom")
    (bench.output / "README.md").write_text(own)
    push_again(bench)
    assert bench.card == own
    with pytest.raises(ValueError, match="is your own: add the reports there"):
        push_again(bench, "--reports", bench.output)


def case_what_is_no_model_is_not_pushed(bench):
    from mgpo_trl import push

    with pytest.raises(ValueError, match="There is no model in"):
        push.main([str(bench.directory), "--repo_id", "me/zoom"])
    with pytest.raises(ValueError, match="has no `conversation.json`, so nobody could ask the model"):
        push.main([str(bench.base), "--repo_id", "me/zoom"])
    assert bench.stub.requests == []


def case_the_command_says_in_one_line_what_became_of_it(bench):
    from mgpo_trl.conversation import Conversation

    shutil.copytree(bench.base, bench.output)
    Conversation().save(bench.output)
    for model, word, code in ((bench.base, "has no `conversation.json`", 1), (bench.output, "Pushed '", 0)):
        command = [sys.executable, "-m", "mgpo_trl.push", str(model), "--repo_id", "me/zoom"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and word in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "HTTP Request" not in done.stderr


def case_the_built_in_task(bench):
    """Its figures and its picture are on the card, and its model is asked by its id."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_builtin(patch, bench.directory / "cache")
        patch.setattr(sys, "argv", ["/site/mgpo_trl/builtin/__main__.py", "--level", "refer", "--push_to_hub", "true"])
        load_script("train").main(
            ["--push_to_hub", "true", "--output_dir", str(bench.output), "--max_steps", "1", "--num_generations", "2",
             "--per_device_train_batch_size", "4", "--hub_strategy", "end"]
        )  # fmt: skip
    assert re.search(r"\| accuracy \| \d\.\d{3} ± \d\.\d{3} \| \d\.\d{3} ± \d\.\d{3} \|", bench.card)
    assert "n = 8, ± standard error, sampled" in bench.card and "](before_after.png)" in bench.card
    assert "python -m mgpo_trl.builtin --level refer --push_to_hub true" in bench.card
    assert "before_after.png" in bench.stub.files("me/zoom")
    run_quick_start(bench.card, bench.directory)


# running


def main(names):
    """Run the cases, all of them without names."""
    with hub_stub() as stub, tempfile.TemporaryDirectory() as root:
        os.environ.update(HF_ENDPOINT=stub.url, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HOME=f"{root}/home")
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        base, data = prepare(Path(root))
        cases = {name: case for name, case in globals().items() if name.startswith("case_")}
        for name in names or cases:
            directory = Path(root, name)
            directory.mkdir()
            failed = run(cases[name], Bench(stub, directory, base, data))
            sys.stdout.write(json.dumps({"case": name, "failed": failed}) + "\n")
            forget(stub, root)


def prepare(root):
    """The tiny model, and rows that refer to pictures beside them; no waiting between the client's attempts."""
    import torch
    from huggingface_hub.utils import _http

    from mgpo_trl.builtin.tiny import save_tiny

    torch.set_num_threads(1)
    _http.time = SimpleNamespace(sleep=lambda seconds: None, time=_http.time.time, monotonic=_http.time.monotonic)
    lines = []
    for row in rows_for():
        (root / row["image"]["path"]).write_bytes(row["image"]["bytes"])
        kept = {name: row[name] for name in ("question", "choices", "answer")}
        lines.append(json.dumps({"image": row["image"]["path"], **kept}))
    (root / "rows.jsonl").write_text("\n".join(lines))
    return save_tiny(root / "tiny", "refer", seed=0), root / "rows.jsonl"


def run(case, bench):
    os.environ["HF_TOKEN"] = "hf_writer"
    try:
        case(bench)
    except BaseException:
        return traceback.format_exc()
    return None


def forget(stub, root):
    """The next case finds an empty Hub, and an empty cache of it."""
    fresh = HubStub()
    for name in ("users", "repositories", "objects", "requests", "faults"):
        setattr(stub, name, getattr(fresh, name))
    shutil.rmtree(f"{root}/home", ignore_errors=True)


def names_of_cases():
    return [name for name, value in globals().items() if name.startswith("case_") and inspect.isfunction(value)]


if __name__ == "__main__":
    main(sys.argv[1:])
