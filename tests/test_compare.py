"""Paired statistics against hand-computed numbers, and two result directories compared."""

import json
import math

import pytest
from commands import load_script
from test_metrics import make_record
from test_report import make_run

from mgpo_trl.evaluation import Metrics
from mgpo_trl.evaluation.compare import compare_runs, format_comparison
from mgpo_trl.evaluation.joint import format_joint, joint_report
from mgpo_trl.evaluation.paired import PairedDifference, mcnemar_p
from mgpo_trl.evaluation.questions import Questions, shuffled
from mgpo_trl.evaluation.report import build_report, format_report, rescore, title
from mgpo_trl.records import RecordError, RolloutWriter, write_run

RIGHT, WRONG = r"\boxed{B}", r"\boxed{A}"


def write(directory, results, **run):
    """Results as {id: right}; records of one image share a group where the id has a `-`."""
    write_run(directory, make_run(**{"num_rounds": 1, **run}))
    with RolloutWriter(directory) as writer:
        for identity, right in results.items():
            group = identity.split("-")[0] if "-" in identity else None
            writer.write(make_record(identity, RIGHT if right else WRONG, group=group, category="c" + identity[:1]))
    return directory


def test_worked_example():
    pairs = PairedDifference()
    for number, (first, second) in enumerate([(1, 0), (1, 1), (0, 0)]):
        pairs.add(str(number), bool(first), bool(second))
    summary = pairs.summary()
    assert summary["difference"] == pytest.approx(1 / 3)
    assert summary["stderr"] == pytest.approx(math.sqrt(6 / 9) / 3)
    assert (summary["only_first"], summary["only_second"], summary["mcnemar_p"]) == (1, 0, 1.0)
    low, high = summary["interval_95"]
    assert high - low == pytest.approx(2 * 1.96 * summary["stderr"], rel=1e-3)


@pytest.mark.parametrize(("first", "second", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (9, 1, 22 / 1024)])
def test_mcnemar_is_exact(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == pytest.approx(p)
    assert mcnemar_p(3000, 2000) < 1e-40  # no overflow


def test_a_comparison(tmp_path):
    a = write(tmp_path / "a", {"1": True, "2": True, "3": False, "4": True, "only-a": True})
    b = write(tmp_path / "b", {"1": True, "2": False, "3": False, "4": False})
    comparison = compare_runs(a, b)
    strict = comparison["strict"]
    assert (comparison["n"], strict["first"], strict["second"], strict["difference"]) == (4, 0.75, 0.25, 0.5)
    assert (strict["only_first"], strict["only_second"], strict["mcnemar_p"]) == (2, 0, 0.5)
    assert comparison["unpaired"] == {"first": 1, "second": 0} and comparison["differing"] == {}
    text = format_comparison(comparison)
    assert text.startswith("# +50.0 points [") and "max_pixels 1,003,520 = 1280x28x28" in text
    assert "Not in both, and left out: 1 rollouts of A" in text and "| c2 | 1 |" in text


def test_groups_widen_the_interval(tmp_path):
    """Two images, four orders each: the rows of one image agree, so they count as two."""
    a = {f"{image}-{cycle}": True for image in "12" for cycle in range(4)}
    b = {name: name[0] == "1" for name in a}
    summary = compare_runs(write(tmp_path / "a", a), write(tmp_path / "b", b))["strict"]
    assert summary["stderr"] == pytest.approx(math.sqrt(2 * 2**2) / 8)  # 0.354, not 0.177
    metrics = Metrics()
    for name, right in b.items():
        metrics.add(make_record(name, RIGHT if right else WRONG, group=name[0]))
    report = metrics.summary()
    assert (report["n"], report["n_questions"], report["n_clusters"]) == (8, 8, 2)
    assert report["accuracy"]["stderr"]["strict"] == pytest.approx(math.sqrt(2 * 2**2) / 8)


def test_conditions_that_differ_are_said_and_other_questions_refused(tmp_path):
    a = write(tmp_path / "a", {"1": True})
    b = write(tmp_path / "b", {"1": True}, decoding={"mode": "sampled", "temperature": 1.0})
    assert "**`decoding` differs" in format_comparison(compare_runs(a, b))
    c = write(tmp_path / "c", {"9": True})
    with pytest.raises(RecordError, match="No rollout of .* is in"):
        compare_runs(a, c)
    write_run(tmp_path / "d", make_run(num_rounds=1))
    with RolloutWriter(tmp_path / "d") as writer:
        writer.write(make_record("1", RIGHT, choices=["blue", "red"]))
    with pytest.raises(RecordError, match="'1' asks .* in one result and .* in the other"):
        compare_runs(a, tmp_path / "d")


def test_the_command_writes_both_forms(tmp_path, capsys):
    a, b = write(tmp_path / "a", {"1": True, "2": True}), write(tmp_path / "b", {"1": True, "2": False})
    load_script("eval").main(["--compare", str(a), str(b), "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["strict"]["difference"] == 0.5
    assert (tmp_path / "out" / "compare.md").read_text() == capsys.readouterr().out.removesuffix("\n")
    with pytest.raises(ValueError, match="takes two result directories"):
        load_script("eval").main(["--compare", str(a)])


def test_a_joint_report_pairs_the_protocols(tmp_path):
    results = {"mgpo": [1, 1, 1, 0], "no-crop": [1, 0, 0, 0], "oracle-crop": [1, 1, 1]}
    for name, values in results.items():
        write(tmp_path / name, {str(n): bool(v) for n, v in enumerate(values)}, protocol=name)
    joint = joint_report(tmp_path, {name: rescore(tmp_path / name) for name in results})
    utility = joint["crop_utility"]
    assert set(utility) == {"mgpo - no-crop", "oracle-crop - mgpo"}
    assert utility["mgpo - no-crop"]["difference"] == 0.5 and utility["mgpo - no-crop"]["n"] == 4
    assert utility["oracle-crop - mgpo"]["difference"] == 0.0 and utility["oracle-crop - mgpo"]["n"] == 3
    text = format_joint(joint)
    assert text.startswith("# mgpo, no-crop, oracle-crop (max_pixels 1,003,520 = 1280x28x28, greedy)")
    assert "| mgpo - no-crop | 4 | +50.0 points" in text


# rows as they are asked


class Rows(list):
    """Stands in for a `datasets.Dataset`."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_shuffled_choices_keep_the_right_text():
    row = {"id": "7", "choices": ["a", "b", "c", "d"], "answer": "C"}
    orders = set()
    for seed in range(40):
        other = shuffled(row, seed)
        assert other["choices"]["ABCD".index(other["answer"])] == "c" and sorted(other["choices"]) == row["choices"]
        orders.add(tuple(other["choices"]))
    assert len(orders) > 10 and shuffled(row, 3) == shuffled(row, 3)
    assert shuffled({"id": "7", "choices": None, "answer": "3"}, 1)["answer"] == "3"


def test_samples_have_ids_of_their_own_and_fixed_batches():
    rows = Rows({"id": str(n), "choices": ["x", "y"], "answer": "A", "target_boxes": [[0, 0, 1, 1]] if n else None}
                for n in range(3))  # fmt: skip
    questions = Questions(rows, num_samples=2, shuffle_choices=1)
    assert questions.ids == [f"{n}/sample-{s}" for n in range(3) for s in range(2)]
    assert questions[2]["choices"] == questions[3]["choices"] and questions[3]["id"] == "1/sample-1"
    assert questions.with_boxes() == set(questions.ids[2:])
    batches = list(questions.batches(4, {"0/sample-1", "2/sample-0"}))
    assert [(start, [row["id"] for row in rows]) for start, rows in batches] == [
        (0, ["0/sample-1"]), (4, ["2/sample-0"]),
    ]  # fmt: skip


# tables of the report


def test_avg_at_k_and_bad_rows_stand_in_the_title():
    bad = [{"row": 3, "id": "3", "field": "image", "reason": "gone"}]
    run = make_run(num_rounds=1, num_samples=2, bad_rows=bad, protocol="direct", shuffle_choices=5)
    report = build_report([make_record(f"q/sample-{s}") for s in range(2)], run)
    assert "n = 2, 1 bad rows left out," in title(report) and "Avg@2" in title(report)
    assert "choices shuffled, seed 5" in title(report)


def test_the_table_of_tasks():
    """Two tasks as in MME-RealWorld: by subtask, over all rows, and as the mean of the subtasks."""
    rows = {"Perception/OCR": [1, 1, 0], "Perception/RS": [0], "Reasoning/AD": [1]}
    records = [
        make_record(f"{category}{n}", RIGHT if right else WRONG, category=category)
        for category, values in rows.items()
        for n, right in enumerate(values)
    ]
    text = format_report(build_report(records, make_run(num_rounds=1)))
    assert "| strict accuracy | OCR | RS | AD | all rows | mean of subtasks |" in text
    assert "| Perception | 66.7 % | 0.0 % | - | 50.0 % | 33.3 % |" in text
    assert "| Reasoning | - | - | 100.0 % | 100.0 % | 100.0 % |" in text


def test_counts_have_an_error():
    """Right 5, 5, 5: said 7, 5, nothing; the mean absolute error is over the answers that are numbers."""
    texts = [r"\boxed{7}", r"\boxed{5}", "many"]
    records = [make_record(f"q{n}", text, choices=None, answer="5") for n, text in enumerate(texts)]
    report = build_report(records, make_run(num_rounds=1))
    assert report["accuracy"]["strict"] == pytest.approx(1 / 3)
    assert report["counting"] == {"n": 3, "no_number": 1, "mae": 1.0, "stderr": pytest.approx(math.sqrt(2) / 2)}
    assert "| all | 3 | 1.00 ± 0.71 | 1 |" in format_report(report)
    assert build_report([make_record()], make_run(num_rounds=1))["counting"] is None


def test_official_scoring_is_a_third_column(tmp_path):
    text = r"Based on the crop, \boxed{A}"
    directory = tmp_path / "run"
    write_run(directory, make_run(num_rounds=1))
    with RolloutWriter(directory) as writer:
        writer.write(make_record("q", text))
    report = rescore(directory, "vstar")
    assert (report["accuracy"]["strict"], report["accuracy"]["official"], report["official"]) == (0.0, 1.0, "vstar")
    text = (directory / "report.md").read_text()
    assert "| accuracy | n | strict | flexible | official (vstar) |" in text and "lmms-eval's V* task" in text
    assert "official" not in rescore(directory)["accuracy"]
