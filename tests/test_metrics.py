"""Scores of records written by hand, and standard errors against their formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpo_trl.evaluation import ClusterMean, Metrics, score_record
from mgpo_trl.records import RecordError


def make_box(status="ok", box=(0, 0, 50, 100)):
    ok = status == "ok"
    size = [box[2] - box[0], box[3] - box[1]] if ok else None
    return {"status": status, "box_original_px": list(box) if ok else None, "crop_size": size}


def make_record(identity="q0", text=r"\boxed{B}", boxes=(), **changes):
    """An image of 100 x 200 whose target is the box (0, 0, 50, 50)."""
    texts = ["look"] * len(boxes) + [text]
    turns = [
        {"round": n, "text": t, "num_tokens": 10 * n, "truncated": n == 1, "box": b}
        for n, (t, b) in enumerate(zip(texts, [*boxes, None], strict=True), start=1)
    ]
    record = {
        "id": identity, "question": "q", "choices": ["red", "blue"], "answer": "B", "category": "cards",
        "image": {"size": [100, 200]}, "view_size": [56, 112], "num_rounds": len(turns), "turns": turns,
        "target_boxes": [[0, 0, 50, 50]],
    }  # fmt: skip
    return record | changes


def summarise(*records):
    metrics = Metrics()
    for record in records:
        metrics.add(record)
    return metrics.summary()


ANSWERS = [(r"\boxed{B}", True, True), ("Answer: B", False, True), (r"\boxed{A}", False, False), ("Blue", False, True)]


@pytest.mark.parametrize(("text", "strict", "flexible"), ANSWERS)
def test_the_last_turn_is_judged(text, strict, flexible):
    score = score_record(make_record(text=text, boxes=[make_box()]))
    assert (score.strict, score.flexible) == (strict, flexible)


def test_the_answer_in_an_earlier_turn_does_not_count():
    record = make_record(text=r"\boxed{A}", boxes=[make_box()])
    record["turns"][0]["text"] = r"\boxed{B}"
    assert not score_record(record).flexible


def test_grounding_of_one_usable_box():
    score = score_record(make_record(boxes=[make_box(box=(0, 0, 25, 50))]))
    assert score.statuses == ("ok",)
    assert score.crop_area == 25 * 50 / (100 * 200)
    assert score.coverage == 0.5
    assert score.hit is True
    assert score_record(make_record(boxes=[make_box(box=(0, 0, 24, 50))])).hit is False


def test_an_unusable_box_misses_a_known_target():
    score = score_record(make_record(boxes=[make_box("too_small")]))
    assert (score.crop_area, score.coverage, score.hit) == (None, 0.0, False)
    score = score_record(make_record(boxes=[make_box("too_small")], target_boxes=None))
    assert (score.crop_area, score.coverage, score.hit) == (None, None, None)


@pytest.mark.parametrize("targets", [None, []])
def test_without_targets_only_the_crop_area_is_known(targets):
    score = score_record(make_record(boxes=[make_box()], target_boxes=targets))
    assert (score.crop_area, score.coverage, score.hit) == (0.25, None, None)


def test_the_last_of_several_boxes_counts():
    right, wrong = make_box(box=(0, 0, 50, 50)), make_box(box=(50, 50, 100, 200))
    assert score_record(make_record(boxes=[wrong, right])).coverage == 1
    assert score_record(make_record(boxes=[right, wrong])).coverage == 0
    assert score_record(make_record(boxes=[right, make_box("empty")])).coverage == 0


def test_summary_of_four_records():
    summary = summarise(
        make_record("a", boxes=[make_box(box=(0, 0, 50, 50))]),
        make_record("b", text="Answer: B", boxes=[make_box("no_json")]),
        make_record("c", text="no idea", boxes=[make_box("no_json")], target_boxes=None, category="signs"),
        make_record("d", boxes=[make_box(box=(0, 0, 100, 200))], target_boxes=None, category=None),
    )
    assert summary["n"] == summary["n_questions"] == 4
    assert summary["accuracy"] == {
        "strict": 0.5,
        "flexible": 0.75,
        "stderr": {"strict": 0.25, "flexible": pytest.approx(math.sqrt(0.75 * 0.25 / 4))},
    }
    assert {name: (c["n"], c["strict"], c["flexible"]) for name, c in summary["by_category"].items()} == {
        "(none)": (1, 1, 1), "cards": (2, 0.5, 1), "signs": (1, 0, 0)
    }  # fmt: skip
    assert summary["by_category"]["cards"]["stderr"]["strict"] == pytest.approx(math.sqrt(0.5 * 0.5 / 2))
    assert summary["valid_ratio"] == 0.5
    assert {name: count for name, count in summary["status"].items() if count} == {"ok": 2, "no_json": 2}
    assert summary["status"]["too_narrow"] == 0
    assert summary["crop_area"] == (0.125 + 1) / 2
    assert summary["coverage"] == 0.5
    assert summary["hit_rate"] == 0.5
    assert summary["turns"] == [
        {"round": 1, "n": 4, "tokens": 10, "truncated": 1}, {"round": 2, "n": 4, "tokens": 20, "truncated": 0}
    ]  # fmt: skip
    assert summary["num_rounds"] == 2


def test_one_round_has_no_grounding():
    summary = summarise(make_record("a"), make_record("b"))
    for name in ("valid_ratio", "crop_area", "coverage", "hit_rate"):
        assert summary[name] is None
        assert summary["stderr"][name] is None
    assert summary["status"] == {}
    assert [turn["round"] for turn in summary["turns"]] == [1]
    assert summary["accuracy"]["strict"] == 1


def test_every_grounding_round_counts_for_the_valid_ratio():
    summary = summarise(make_record(boxes=[make_box(), make_box("empty"), make_box("empty")]))
    assert summary["valid_ratio"] == pytest.approx(1 / 3)
    assert sum(summary["status"].values()) == 3


def test_no_categories():
    assert summarise(make_record(category=None))["by_category"] == {}


def mean_of(clusters):
    mean = ClusterMean()
    for name, values in clusters.items():
        for value in values:
            mean.add(name, value)
    return mean


def test_worked_example_of_the_docstring():
    clustered = mean_of({"a": [1, 1], "b": [0, 1]})
    assert clustered.mean == 0.75
    assert clustered.stderr == pytest.approx(math.sqrt(0.5) / 4)
    assert mean_of({"a": [1], "b": [1], "c": [0], "d": [1]}).stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(1, 5))
def test_standard_error_of_a_share(values, samples):
    share = sum(values) / len(values)
    alone = mean_of({str(index): [value] for index, value in enumerate(values)})
    assert alone.mean == pytest.approx(share)
    assert alone.stderr == pytest.approx(math.sqrt(share * (1 - share) / len(values)), abs=1e-12)
    repeated = mean_of({str(index): [value] * samples for index, value in enumerate(values)})
    assert repeated.stderr == pytest.approx(alone.stderr, abs=1e-12)  # saying it again adds no evidence


def test_samples_of_one_question_are_one_cluster():
    records = [make_record(f"q{q}/sample-{s}", text=r"\boxed{B}" if q else "") for q in range(2) for s in range(8)]
    summary = summarise(*records)
    assert (summary["n"], summary["n_questions"]) == (16, 2)
    assert summary["accuracy"]["stderr"]["strict"] == pytest.approx(math.sqrt(0.25 / 2))


def test_an_unknown_standard_error_is_none():
    assert mean_of({}).mean is mean_of({}).stderr is mean_of({"a": [1, 0]}).stderr is None


def test_a_record_counts_once():
    with pytest.raises(RecordError, match="'q0' is recorded twice"):
        summarise(make_record(), make_record())


@pytest.mark.parametrize(
    "change", [{"turns": []}, {"turns": None}, {"answer": None}, {"answer": "Q"}, {"image": {}, "turns": None}]
)
def test_a_record_that_cannot_be_scored_is_named(change):
    with pytest.raises(RecordError, match="'q0' cannot be scored"):
        score_record(make_record() | change)


def test_nothing_and_mixtures_are_refused():
    with pytest.raises(RecordError, match="no rollouts"):
        Metrics().summary()
    with pytest.raises(RecordError, match=r"mix \[1, 2\] rounds"):
        summarise(make_record("a"), make_record("b", boxes=[make_box()]))
