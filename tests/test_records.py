"""Records: nothing lost or doubled whatever kills the process, strict JSON, and runs that do not mix."""

import dataclasses
import enum
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mgpo_trl import records
from mgpo_trl.records import (
    RecordError,
    RolloutWriter,
    check_resumable,
    question_id,
    read_rollouts,
    read_run,
    run_record,
    sample_id,
    seen_ids,
    to_json,
    write_run,
)

WRITER = """
import sys
from mgpo_trl.records import RolloutWriter
path, total, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with RolloutWriter(path) as writer:
    print("open", flush=True)
    for number in range(total):
        if str(number) not in writer.seen:
            writer.write({"id": str(number), "text": "x" * size})
            print(number, flush=True)
"""


def make_run(**changes):
    values = {"prompts_fingerprint": "f00", "max_pixels": 7056, "min_pixels": 3136, "seed": 1, "num_rounds": 2}
    config = changes.pop("config", {"model": "tiny", "learning_rate": 1e-6})
    return run_record(config, **{**values, **changes})


def lines(path):
    return Path(path).read_bytes().splitlines()


def write_until_killed(path, total, size, delay=None):
    """Runs a writer, kills it after `delay` seconds of writing, and returns what it had said was written."""
    command = [sys.executable, "-c", WRITER, str(path), str(total), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        if delay is not None:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split("\n")
    return set(said[:-1])  # what follows the last newline may be half a word


def test_nothing_is_lost_or_doubled_by_sigkill(tmp_path):
    path, size = tmp_path / "rollouts.jsonl", 500_000
    acknowledged = set()
    for kill in range(15):
        acknowledged |= write_until_killed(path, 10_000, size, delay=0.005 + 0.003 * kill)
        recorded = [record["id"] for record in read_rollouts(path)] if path.exists() else []
        assert acknowledged <= set(recorded)
        assert len(recorded) == len(set(recorded))
    assert acknowledged
    total = len(recorded) + 5
    assert len(write_until_killed(path, total, size)) == 5
    written = [(record["id"], len(record["text"])) for record in read_rollouts(path)]
    assert written == [(str(number), size) for number in range(total)]


def test_a_last_line_cut_at_any_byte(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    with RolloutWriter(path) as writer:
        writer.write({"id": "a"})
        writer.write({"id": "b", "text": "ü"})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert seen_ids(path) == {"a"}
        with RolloutWriter(path) as writer:
            assert writer.seen == {"a"}
            writer.write({"id": "b", "text": "ü"})
        assert path.read_bytes() == whole


@pytest.mark.parametrize("length", [10, (1 << 16) - 1, 1 << 16, 200_000])
def test_a_long_half_line_is_dropped_whole(tmp_path, length):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + b"x" * length)
    RolloutWriter(path).close()
    assert path.read_bytes() == b'{"id": "a"}\n'
    path.write_bytes(b"x" * length)
    RolloutWriter(path).close()
    assert path.read_bytes() == b""


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    write = os.write

    def full_disk(fd, data):
        if len(data) <= 5:
            raise OSError(28, "No space left on device")
        return write(fd, data[:-5])

    with RolloutWriter(path) as writer:
        writer.write({"id": "a"})
        monkeypatch.setattr(records.rollouts.os, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            writer.write({"id": "b", "text": "long enough"})
        monkeypatch.undo()
        writer.write({"id": "b"})
    assert [record["id"] for record in read_rollouts(path)] == ["a", "b"]


def test_ids_are_written_once(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    with RolloutWriter(path) as writer:
        writer.write({"id": "a"})
        with pytest.raises(RecordError, match="'a' is in .* already"):
            writer.write({"id": "a"})
    with RolloutWriter(path) as writer, pytest.raises(RecordError, match="'a' is in .* already"):
        writer.write({"id": "a"})
    with RolloutWriter(path, unique=False) as writer:
        writer.write({"id": "a"})
    assert len(lines(path)) == 2


@pytest.mark.parametrize("record", [{}, {"id": ""}, {"id": 3}])
def test_a_record_needs_an_id(tmp_path, record):
    with RolloutWriter(tmp_path) as writer, pytest.raises(RecordError, match="needs a non-empty text `id`"):
        writer.write(record)


def test_two_writers_on_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records.rollouts, "LOCK_WAIT_S", 0.3)
    with RolloutWriter(tmp_path), pytest.raises(RecordError, match="Another process is writing"):
        RolloutWriter(tmp_path)
    RolloutWriter(tmp_path).close()


def test_a_directory_stands_for_its_file(tmp_path):
    with RolloutWriter(tmp_path / "out") as writer:
        writer.write({"id": "a"})
    assert seen_ids(tmp_path / "out") == seen_ids(tmp_path / "out" / "rollouts.jsonl") == {"a"}
    assert seen_ids(tmp_path / "none") == set()
    with pytest.raises(RecordError, match="There are no rollouts at"):
        list(read_rollouts(tmp_path / "none"))


@pytest.mark.parametrize("line", [b"{not json}", b"[1]", b'{"text": "no id"}', b"\xff"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line + b'\n{"id": "b"}\n')
    with pytest.raises(RecordError, match="Line 2 of .*rollouts.jsonl"):
        list(read_rollouts(path))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def only_finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: only_finite(item) for key, item in value.items()}
    return [only_finite(item) for item in value] if isinstance(value, list) else value


@settings(max_examples=200)
@example("a lone surrogate \ud800, ü and a line separator \u2028")
@example([float("nan"), float("-inf"), 10**400])
@given(ANY_JSON)
def test_any_text_and_number_comes_back_and_the_json_is_strict(value):
    line = records.strict_json.dumps({"id": "a", "value": value})
    assert b"\n" not in line

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line.decode("utf-8"), parse_constant=refuse)["value"] == only_finite(value)


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    where: Path


def test_values_that_json_does_not_know():
    value = {
        1: (Colour.RED, {3, 1, 2}),
        "point": Point(1, Path("a/b")),
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.array([1.0, np.nan])],
        "type": np.ndarray,
    }
    clean = to_json(value)
    assert clean == {
        "1": ["red", [1, 2, 3]],
        "point": {"x": 1, "where": "a/b"},
        "numpy": [0.5, 3, True, [1.0, None]],
        "type": "<class 'numpy.ndarray'>",
    }
    assert json.loads(json.dumps(clean, allow_nan=False)) == clean


def test_secrets_are_masked():
    token = "hf_" + "a1" * 12
    config = {"hub_token": "x", "push_to_hub_token": None, "api_key": "y", "eos_token": "<e>", "note": f"use {token}!"}
    record = make_run(config=config, command=["train.py", "--hub_token", "x", "--api-key=y", "--seed", "1", token])
    assert record["config"] == {
        "hub_token": "<masked>", "push_to_hub_token": None, "api_key": "<masked>", "eos_token": "<e>",
        "note": "use <token>!",
    }  # fmt: skip
    assert record["command"] == ["train.py", "--hub_token", "<masked>", "--api-key=<masked>", "--seed", "1", "<token>"]


def git(*arguments, cwd):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (make_run()["commit"], make_run()["dirty"]) == (None, None)
    git("init", cwd=tmp_path)
    assert make_run()["commit"] is None
    (tmp_path / "a").write_text("1")
    git("add", "a", cwd=tmp_path)
    git("commit", "-m", "x", cwd=tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "run.json").write_text("{}")
    record = make_run()
    assert len(record["commit"]) == 40
    assert record["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert make_run()["dirty"] is True


def test_no_git_at_all(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert make_run()["commit"] is None


def test_run_record_says_what_a_reader_needs():
    record = make_run(decoding={"temperature": 0.0}, bad_rows=[], loss=float("nan"))
    assert record["loss"] is None
    assert record["num_rounds"] == 2
    assert record["versions"]["trl"].startswith("1.16")
    assert {"torch", "transformers", "peft", "accelerate", "datasets", "pillow", "deepspeed", "bitsandbytes"} <= set(
        record["versions"]
    )
    assert record["command"] == [str(word) for word in sys.argv]
    assert record["time"].endswith("+00:00")
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    with pytest.raises(RecordError, match=r"\['time'\] are filled in"):
        make_run(time=3)


def test_a_run_is_written_and_continued(tmp_path):
    first = write_run(tmp_path / "out", make_run())
    assert read_run(tmp_path / "out") == first
    later = make_run(command="again")
    later |= {"time": "later", "commit": "other", "platform": "elsewhere", "versions": {}, "python": "4"}
    second = write_run(tmp_path / "out", later)
    assert second == first | {"resumed": second["resumed"]} == read_run(tmp_path / "out")
    assert [note["command"] for note in second["resumed"]] == ["again"]
    assert len(write_run(tmp_path / "out", later)["resumed"]) == 2
    assert os.listdir(tmp_path / "out") == ["run.json"]


def test_another_configuration_is_refused_by_key(tmp_path):
    first = write_run(tmp_path, make_run())
    other = make_run(config={"model": "tiny", "learning_rate": 1e-5, "new": 1}, max_pixels=9)
    with pytest.raises(RecordError) as caught:
        write_run(tmp_path, other)
    message = str(caught.value)
    assert "`config.learning_rate` was 1e-06, is now 1e-05" in message
    assert "`config.new` was null, is now 1" in message
    assert "`max_pixels` was 7056, is now 9" in message
    assert "model" not in message
    assert read_run(tmp_path) == first
    check_resumable(first, other, ignore=["config.learning_rate", "config.new", "max_pixels"])
    assert write_run(tmp_path, other, overwrite=True) == read_run(tmp_path) == other


def test_run_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecordError, match="There is no '.*run.json'"):
        read_run(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RecordError, match="run.json"):
            read_run(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    first = write_run(tmp_path, make_run())

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk"):
        write_run(tmp_path, make_run(seed=5), overwrite=True)
    assert read_run(tmp_path) == first
    assert os.listdir(tmp_path) == ["run.json"]


def test_sample_ids():
    assert sample_id("q7", 2) == "q7/sample-2"
    assert question_id("q7/sample-2") == question_id("q7") == "q7"
    assert question_id("a/sample-x") == "a/sample-x"


def test_importing_records_imports_little():
    code = "import sys, mgpo_trl.records; sys.exit(any(m in sys.modules for m in ('torch', 'trl', 'datasets', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
