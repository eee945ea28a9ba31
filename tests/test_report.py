"""The report: exact keys, a title that hides nothing, and scoring again without a model."""

import json
import subprocess
import sys
import tracemalloc

import pytest
from test_metrics import make_box, make_record

from mgpo_trl.evaluation import build_report, format_report, rescore, write_report
from mgpo_trl.records import RecordError, RolloutWriter, run_record, write_run


def make_run(**extra):
    values = {"num_rounds": 2, "decoding": "greedy", "protocol_version": 1, "bad_rows": [], **extra}
    return run_record(
        {"model": "tiny"}, prompts_fingerprint="f00d", max_pixels=1_003_520, min_pixels=200_704, seed=1, **values
    )


def make_records(count=4):
    return [make_record(f"q{n}", text=r"\boxed{B}" if n % 4 else "", boxes=[make_box()]) for n in range(count)]


def test_keys_of_the_report():
    report = build_report(make_records(), make_run())
    assert set(report) == {
        "accuracy", "n", "n_questions", "by_category", "valid_ratio", "status", "crop_area", "coverage", "hit_rate",
        "stderr", "turns", "max_pixels", "min_pixels", "num_rounds", "decoding", "bad_rows", "prompts_fingerprint",
        "protocol_version", "commit", "dirty", "seed", "model", "dataset", "split", "n_expected",
        "n_clusters", "counting", "protocol", "left_out", "num_samples", "shuffle_choices", "official",
        "view_decoding",
    }  # fmt: skip
    assert set(report["accuracy"]) == {"strict", "flexible", "stderr"}
    assert set(report["accuracy"]["stderr"]) == {"strict", "flexible"}
    assert set(report["by_category"]["cards"]) == {"n", "strict", "flexible", "stderr"}
    assert report["accuracy"]["strict"] == 0.75
    assert (report["max_pixels"], report["min_pixels"]) == (1_003_520, 200_704)
    assert (report["decoding"], report["num_rounds"], report["prompts_fingerprint"]) == ("greedy", 2, "f00d")
    assert report["protocol_version"] == 1
    assert report["model"] == "tiny"  # from `config`


def test_the_title_carries_what_the_number_depends_on():
    text = format_report(build_report(make_records(), make_run()))
    title = "# 75.0 ± 21.7 % strict (n = 4, max_pixels 1,003,520 = 1280x28x28, greedy, 2 rounds)"
    assert text.splitlines()[0] == title
    assert "| all | 4 | 75.0 ± 21.7 % |" in text
    assert "| valid boxes | 100.0 ± 0.0 % |" in text
    assert "Not finished" not in text


def test_what_is_missing_is_said():
    bad = [{"row": 3, "id": "3", "field": "image", "reason": "gone"}]
    run = make_run(n_expected=9, bad_rows=bad, decoding={"temperature": 1.0, "samples": 2})
    records = [make_record(f"q{n}/sample-{s}", category="a|b\nc") for n in range(2) for s in range(2)]
    report = build_report(records, {**run, "num_rounds": 1, "max_pixels": None})
    text = format_report(report)
    assert report["bad_rows"] == bad
    assert "Not finished: 4 of 9 rollouts." in text
    assert "1 bad rows" in text
    assert "2 questions" in text
    assert "pixel cap not recorded, temperature 1.0, samples 2, 1 round)" in text
    assert "| a\\|b c | 4 |" in text
    assert "grounding" not in text


def test_conditions_that_were_not_recorded_are_none():
    report = build_report(make_records(), {})
    assert report["max_pixels"] is report["decoding"] is report["commit"] is None
    assert report["bad_rows"] == []
    assert report["num_rounds"] == 2
    assert "decoding not recorded" in format_report(report)
    json.dumps(report, allow_nan=False)


def test_the_record_of_the_run_must_fit():
    with pytest.raises(RecordError, match="2 rounds, the run record says 3"):
        build_report(make_records(), make_run(num_rounds=3))


def write_evaluation(directory, count=40):
    write_run(directory, make_run())
    with RolloutWriter(directory) as writer:
        for record in make_records(count):
            writer.write(record)


def test_rescore_reads_what_a_run_left(tmp_path):
    write_evaluation(tmp_path)
    report = rescore(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.md").read_text() == format_report(report)
    with open(tmp_path / "rollouts.jsonl", "a") as file:
        file.write('{"id": "half')
    assert rescore(tmp_path) == report


@pytest.mark.parametrize("missing", ["run.json", "rollouts.jsonl"])
def test_rescore_names_what_is_missing(tmp_path, missing):
    write_evaluation(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(RecordError, match="There (is no|are no rollouts at)"):
        rescore(tmp_path)
    assert not (tmp_path / "report.json").exists()


def test_rescore_imports_no_torch(tmp_path):
    write_evaluation(tmp_path)
    code = (
        "import sys; from mgpo_trl.evaluation import rescore; rescore(sys.argv[1]); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
    assert json.loads((tmp_path / "report.json").read_text())["n"] == 40


def test_memory_does_not_grow_with_the_text_of_records():
    def records():
        for number in range(300):
            yield make_record(f"q{number}", text="x" * 200_000 + r"\boxed{B}", boxes=[make_box()])

    tracemalloc.start()
    try:
        report = build_report(records(), make_run())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["n"] == 300
    assert peak < 8_000_000  # the texts are 60 MB


def test_text_that_utf_8_cannot_carry(tmp_path):
    records = [make_record(f"q{n}", text="\ud800", category="\ud800") for n in range(2)]
    write_report(tmp_path, build_report(records, {}))
    assert json.loads((tmp_path / "report.json").read_text())["by_category"]["\ud800"]["n"] == 2
