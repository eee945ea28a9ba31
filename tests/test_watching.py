"""Rollouts of a training on disk: which, when, with what they were worth, bounded, and without doubles on resuming."""

import errno
import logging
import math
import os
from types import SimpleNamespace

import pytest
from PIL import Image
from test_docs import FENCE, ROOT
from watched import picture_for, watched_record, write_watched

from mgpo_trl import MGPOConfig
from mgpo_trl.gallery import PICTURES_FILE, PictureReader
from mgpo_trl.records import ROLLOUTS_FILE, RecordError, RolloutWriter, read_rollouts
from mgpo_trl.watching import CURVES_FILE, PAGE_FILE, write_training_page
from mgpo_trl.watching import watcher as watcher_module
from mgpo_trl.watching.files import RolloutLog, rollout_id, spread, step_of
from mgpo_trl.watching.watcher import RolloutWatcher


def steps_in(directory, name=ROLLOUTS_FILE):
    return sorted({step_of(record["id"]) for record in read_rollouts(directory / name)})


def ids_in(directory):
    return [record["id"] for record in read_rollouts(directory)]


# files


def test_an_id_says_where_a_rollout_stands():
    assert rollout_id(20, 1, 3) == "step-20/group-1/sample-3"
    assert step_of("step-20/group-1/sample-3") == 20
    assert step_of("q7/sample-2") is None and step_of("q7") is None


def test_steps_from_the_start_on_are_dropped_and_said(tmp_path, caplog):
    write_watched(tmp_path, [0, 10, 20])
    with open(tmp_path / PICTURES_FILE, "ab") as file:
        file.write(b'{"id": "step-30/group-0/sample-0", "overv')  # killed here
    assert RolloutLog(tmp_path, 600).begin(step=10) == 0
    assert steps_in(tmp_path) == steps_in(tmp_path, PICTURES_FILE) == [0]
    assert "12 rollouts in" in caplog.text and "are of step 10 or later and are dropped" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [PICTURES_FILE, ROLLOUTS_FILE]


def test_nothing_is_rewritten_where_nothing_is_dropped(tmp_path, caplog):
    write_watched(tmp_path, [0, 10])
    before = os.stat(tmp_path / ROLLOUTS_FILE).st_ino
    assert RolloutLog(tmp_path, 600).begin(step=20) == 10
    assert os.stat(tmp_path / ROLLOUTS_FILE).st_ino == before and not caplog.records
    assert RolloutLog(tmp_path / "new", 600).begin(step=20) is None


def test_rollouts_of_an_evaluation_are_not_touched(tmp_path):
    with RolloutWriter(tmp_path) as writer:
        writer.write({"id": "q7"})
    with pytest.raises(RecordError, match="holds a rollout that no training wrote .'q7'.*another `output_dir`"):
        RolloutLog(tmp_path, 600).begin(step=0)
    assert ids_in(tmp_path) == ["q7"]


@pytest.mark.parametrize(
    "most, kept", [(18, {0: 6, 10: 6, 20: 6}), (12, {0: 6, 20: 6}), (7, {20: 6}), (4, {20: 4}), (0, {})]
)
def test_pictures_are_bounded_and_rollouts_are_not(tmp_path, most, kept):
    """Six rollouts a step: where they do not fit, half of the steps lose their pictures; the last step has them."""
    write_watched(tmp_path, [0, 10, 20], max_pictures=most)
    records, pictures = ids_in(tmp_path), PictureReader(tmp_path)
    assert len(records) == len(set(records)) == 18
    found = [step_of(identity) for identity in records if identity in pictures]
    assert {step: found.count(step) for step in found} == kept


def test_pictures_stay_spread_over_a_long_training(tmp_path):
    write_watched(tmp_path, range(0, 640, 10), groups=1, size=1, max_pictures=8)
    steps = steps_in(tmp_path, PICTURES_FILE)
    assert len(steps) <= 8 and steps[0] == 0 and steps[-1] == 630
    assert max(after - before for before, after in zip(steps, steps[1:], strict=False)) <= 250
    assert spread([0, 1, 2, 3, 10], 3) == {0, 3, 10} and spread([4, 8], 1) == {4} and spread([4], 0) == set()


def test_a_reopened_log_counts_the_pictures_that_are_there(tmp_path):
    write_watched(tmp_path, [0, 10], max_pictures=12)
    log = RolloutLog(tmp_path, 12)
    log.begin(step=20)
    record = watched_record(20)
    log.add(20, [record], [picture_for(record)])
    assert steps_in(tmp_path, PICTURES_FILE) == [0, 20] and steps_in(tmp_path) == [0, 10, 20]


# page


def test_the_page_says_what_it_leaves_out(tmp_path):
    write_watched(tmp_path, [0, 10, 20], max_pictures=12)
    Image.new("RGB", (8, 8), "white").save(tmp_path / CURVES_FILE)
    page = write_training_page(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert page == tmp_path / PAGE_FILE
    assert "18 rollouts of 3 steps, 0 to 20." in text
    assert "the first 2 of 4 groups of the batch are kept" in text
    assert "6 of the rollouts are shown without pictures" in text
    assert text.count('class="card"') == 18 and text.count("data:image/png;base64,") == 1


def test_a_page_needs_the_rollouts_of_a_training(tmp_path):
    with pytest.raises(RecordError, match="There are no rollouts"):
        write_training_page(tmp_path)
    with RolloutWriter(tmp_path) as writer:
        writer.write({"id": "q7"})
    with pytest.raises(RecordError, match=r"rollouts of an evaluation, not of a training.*eval.py --rescore"):
        write_training_page(tmp_path)


# watcher


def make_watcher(tmp_path, process=0, processes=1, weights=(("accuracy_reward", 1.0),), **options):
    """A watcher with the arguments of one of several processes, ready to watch."""
    values = {"output_dir": str(tmp_path), "log_rollouts_steps": 10, "log_rollouts_groups": 2, "num_generations": 3}
    values |= {"log_rollouts_pictures": 600, "process_index": process, "world_size": processes}
    args = SimpleNamespace(**{**values, "log_completions": False, **options})
    watcher = RolloutWatcher(args, weights, callbacks=[])
    watcher.on_train_begin(args, SimpleNamespace(global_step=0, is_world_process_zero=process == 0), None)
    return watcher


class FakeRollout:
    """As much of a rollout as is watched."""

    def __init__(self, identity):
        self.id, self.view, self.crops = identity, Image.new("RGB", (40, 80), "red"), [None]

    def to_record(self):
        return {**watched_record(0), "id": self.id, "training": None}


@pytest.fixture
def processes(monkeypatch):
    """`processes(calls)` calls them in turn, the main process's last: it gets what every process gathers."""

    def run(calls):
        others = []
        for call in calls[:0:-1]:
            given = []
            monkeypatch.setattr(watcher_module, "gather_object", lambda mine, given=given: given.append(mine) or mine)
            call()
            others.insert(0, iter(given))
        monkeypatch.setattr(watcher_module, "gather_object", lambda mine: sum(map(next, others), mine))
        calls[0]()

    return run


def test_a_group_that_processes_share_is_kept_whole(tmp_path, processes):
    """Three processes of four rollouts make up four groups of three: the second is on the first two processes."""
    rewards = [[float(n)] for n in range(12)]
    calls = []
    for process in range(3):
        mine = slice(4 * process, 4 * process + 4)
        watcher = make_watcher(tmp_path, process, 3)
        rollouts = [FakeRollout(f"row-{n // 3}") for n in range(12)][mine]
        advantages = [n / 10 for n in range(12)][mine]
        calls.append(lambda w=watcher, r=rollouts, g=rewards[mine], a=advantages: w.watch(0, r, g, a))
    processes(calls)
    kept = [record["training"] for record in read_rollouts(tmp_path)]
    assert [(one["row"], one["group"], one["sample"], one["reward"], one["advantage"]) for one in kept] == [
        (f"row-{n // 3}", n // 3, n % 3, float(n), n / 10) for n in range(6)
    ]
    assert {(one["groups_shown"], one["groups_of_step"]) for one in kept} == {(2, 4)}
    assert len([identity for identity in ids_in(tmp_path) if identity in PictureReader(tmp_path)]) == 6


def test_rewards_of_several_functions(tmp_path):
    """TRL's sum: weighted, over the functions that gave one; nothing where none did. Names are told apart."""
    weights = [("f", 1.0), ("f", 0.5), ("g", 2.0)]
    watcher = make_watcher(tmp_path, weights=weights)
    rewards = [[1.0, 1.0, 1.0], [1.0, math.nan, 0.0], [math.nan] * 3]
    watcher.watch(0, [FakeRollout("a")] * 3, rewards, [0.1, -0.1, 0.0])
    kept = [record["training"] for record in read_rollouts(tmp_path)]
    assert [one["reward"] for one in kept] == [3.5, 1.0, None]
    assert kept[1]["rewards"] == {"f": 1.0, "f 2": None, "g": 0.0}
    text = (tmp_path / PAGE_FILE).read_text()
    assert '"reward": "none"' in text and '"f 2": "1.00"' in text


def test_it_is_due_at_every_multiple_and_not_before_training(tmp_path):
    watcher = make_watcher(tmp_path, log_rollouts_steps=10)
    watched = []
    for step in (0, 4, 8, 12, 16, 20, 24, 36):  # a window of four steps, and a gap
        if watcher.is_due(step):
            watcher.watch(step, [FakeRollout("a")] * 3, [[1.0]] * 3, [0.0] * 3)
            watched.append(step)
    assert watched == [0, 12, 20, 36]
    args = SimpleNamespace(output_dir=str(tmp_path / "new"), log_rollouts_pictures=600, log_rollouts_steps=10)
    assert not RolloutWatcher(args, [("f", 1.0)], []).is_due(0)


def test_a_full_disk_costs_rollouts_and_not_the_training(tmp_path, monkeypatch, caplog):
    watcher = make_watcher(tmp_path, log_rollouts_steps=1)
    group = [FakeRollout("a")] * 3, [[1.0]] * 3, [0.0] * 3
    watcher.watch(0, *group)

    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RolloutWriter, "write", full)
        watcher.watch(1, *group)
    assert "The rollouts of step 1 could not all be kept" in caplog.text and "No space left" in caplog.text
    watcher.watch(2, *group)
    assert steps_in(tmp_path) == [0, 2]


def test_other_errors_are_raised(tmp_path, monkeypatch):
    watcher = make_watcher(tmp_path)
    monkeypatch.setattr(watcher_module, "write_training_page", lambda directory: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watcher.watch(0, [FakeRollout("a")] * 3, [[1.0]] * 3, [0.0] * 3)


@pytest.mark.parametrize(
    "options", [{"log_rollouts_steps": -1}, {"log_rollouts_groups": 0}, {"log_rollouts_pictures": 1.5}]
)
def test_bounds_are_checked(tmp_path, options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number >= \d, got {value}"):
        MGPOConfig(str(tmp_path), **options)
    assert MGPOConfig(str(tmp_path), log_rollouts_steps=None).log_rollouts_steps == 0


# training


def one_of_two(completions, **kwargs):
    return [float(number % 2) for number in range(len(completions))]


def test_a_training_is_watched_and_evaluations_are_not(make_trainer, rows, tmp_path):
    others = rows.map(lambda row: {"id": f"evaluated-{row['id']}"})
    trainer = make_trainer(
        reward=one_of_two, max_steps=5, log_rollouts_steps=2, log_rollouts_groups=1,
        eval_strategy="steps", eval_steps=1, kwargs={"eval_dataset": others},
    )  # fmt: skip
    trainer.train()
    directory = tmp_path / "run"
    records = list(read_rollouts(directory))
    assert [record["id"] for record in records] == [
        f"step-{step}/group-0/sample-{sample}" for step in (0, 2, 4) for sample in (0, 1)
    ]
    known = {row["id"]: row for row in rows}
    for place, record in enumerate(records):
        row, training = known[record["training"]["row"]], record["training"]
        assert (record["question"], record["answer"]) == (row["question"], row["answer"])
        assert training["rewards"] == {"one_of_two": float(place % 2)} and training["reward"] == float(place % 2)
        assert training["advantage"] == pytest.approx((0.5 if place % 2 else -0.5) / (math.sqrt(0.5) + 1e-4), rel=1e-4)
        assert training["groups_of_step"] == 2 and len(record["turns"]) == 2
        assert PictureReader(directory)(record["id"])["overview"]
    assert "6 rollouts of 3 steps, 0 to 4." in (directory / PAGE_FILE).read_text()
    with Image.open(directory / CURVES_FILE) as curves:
        assert curves.size[0] > 500


def test_a_resumed_training_appends_and_doubles_nothing(make_trainer, tmp_path):
    options = {"max_steps": 6, "log_rollouts_steps": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    make_trainer(**options).train()
    directory = tmp_path / "run"
    whole = list(read_rollouts(directory))
    assert steps_in(directory) == [0, 2, 4]
    (directory / CURVES_FILE).write_text("old")
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-3"))
    assert list(read_rollouts(directory)) == whole
    assert steps_in(directory, PICTURES_FILE) == [0, 2, 4]
    with Image.open(directory / CURVES_FILE) as curves:
        assert curves.format == "PNG"


def test_generation_windows_longer_than_the_interval_are_watched_once_each(make_trainer, tmp_path):
    make_trainer(max_steps=6, num_iterations=3, log_rollouts_steps=2, logging_steps=10).train()
    assert steps_in(tmp_path / "run") == [0, 3]


def test_watching_nothing_leaves_nothing(make_trainer, tmp_path):
    make_trainer(log_rollouts_steps=0).train()
    assert not {ROLLOUTS_FILE, PICTURES_FILE, PAGE_FILE, CURVES_FILE} & {p.name for p in (tmp_path / "run").iterdir()}


def test_one_round_without_answers_is_watched_too(make_trainer, rows, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    bare = rows.remove_columns(["answer"])
    make_trainer(bare, reward=one_of_two, num_rounds=1, logging_steps=10).train()
    [first, *_] = read_rollouts(tmp_path / "run")
    assert first["answer"] is None and '"right": null' in (tmp_path / "run" / PAGE_FILE).read_text()


def test_the_snippets_of_the_document_run(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    write_watched(tmp_path / "outputs" / "mine", [0, 10])
    monkeypatch.chdir(tmp_path)
    snippets = [block for language, block in FENCE.findall(text) if language == "python"]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "watching.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "outputs" / "mine" / PAGE_FILE).is_file()
    for name in ("log_rollouts_steps", "log_rollouts_groups", "log_rollouts_pictures"):
        assert f"`{name}`" in text
