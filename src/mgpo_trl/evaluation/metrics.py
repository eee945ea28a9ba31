"""Scores of rollout records, one at a time, and their means.

Standard errors are robust to clusters: with p the mean over n values and e_c the sum of (value - p) within question c,

    stderr = sqrt(sum over c of e_c ** 2) / n

With one rollout a question this is sqrt(p (1 - p) / n) for a share. With k rollouts a question, whose answers agree
more often than those of different questions, it does not take n rollouts for n independent ones. Rollouts of one
question are told by their ids, see [`~mgpo_trl.records.question_id`]; rows of one `group` (an image that is asked
about several times, or in several orders of its choices) are one cluster too.

Worked example: questions a and b with two rollouts each, right [1, 1] and [0, 1]. p = 0.75, e_a = 0.5, e_b = -0.5, so
the standard error is sqrt(0.25 + 0.25) / 4 = 0.177; four questions with the same answers would give 0.217.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..answers import extract_answer, judge
from ..boxes import BoxStatus
from ..geometry import box_area_fraction, coverage, hit
from ..records import RecordError, question_id
from .extractors import EXTRACTORS


@dataclass(frozen=True)
class RecordScore:
    """What one rollout record is worth."""

    id: str
    """Id of the rollout."""
    category: str | None
    """Its category."""
    strict: bool
    """Whether the boxed answer of the last turn is right."""
    flexible: bool
    """Whether the answer is right when clear statements count too."""
    statuses: tuple[str, ...]
    """Box status of every grounding round; empty with one round."""
    crop_area: float | None
    """Share of the original that the last crop covers; `None` without a usable box in the last grounding round."""
    coverage: float | None
    """Share of the target that the last crop covers, 0 without a usable box; `None` where no target is known."""
    hit: bool | None
    """Whether the last crop covers enough of the target, see [`~mgpo_trl.boxes.hit`]; `None` as for `coverage`."""
    tokens: tuple[int, ...]
    """Sampled tokens a turn."""
    truncated: tuple[bool, ...]
    """Whether each turn was cut off by its token budget."""
    official: bool | None = None
    """Whether the answer that the field's own extractor reads is right; `None` where none was asked for, or where
    there are no choices."""
    count_error: float | None = None
    """Absolute error of a count (a free-form answer that is a whole number); `None` where the boxed answer is no
    number."""
    is_count: bool = False
    """Whether the right answer is a count."""


def score_record(record: Mapping[str, Any], official: str | None = None) -> RecordScore:
    """
    Scores one rollout record, see [`mgpo_trl.records`] for its form.

    Args:
        record (`Mapping`): The record.
        official (`str`, *optional*): Name of an extractor of [`mgpo_trl.evaluation.extractors`] to score with as well.

    The crop that counts is that of the last grounding round, which the answer is given from. Where its box was
    unusable the whole image came back instead: coverage is 0 and the target is missed.
    """
    try:
        return _score(record, official)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RecordError(
            f"The rollout {record.get('id')!r} cannot be scored ({type(error).__name__}: {error}). Remove its line "
            "and continue the run."
        ) from None


def _score(record: Mapping[str, Any], official: str | None) -> RecordScore:
    turns = record["turns"]
    text, answer, choices = turns[-1]["text"], record["answer"], record.get("choices")
    boxes = [turn["box"] for turn in turns[:-1]]
    last_px = boxes[-1]["box_original_px"] if boxes else None
    targets = record.get("target_boxes") if boxes else None
    return RecordScore(
        id=record["id"],
        category=record.get("category"),
        strict=judge(text, answer, choices, mode="strict"),
        flexible=judge(text, answer, choices, mode="flexible"),
        statuses=tuple(box["status"] for box in boxes),
        crop_area=box_area_fraction(last_px, tuple(record["image"]["size"])) if last_px else None,
        coverage=(coverage(last_px, targets) if last_px else 0.0) if targets else None,
        hit=(last_px is not None and hit(last_px, targets)) if targets else None,
        tokens=tuple(turn["num_tokens"] for turn in turns),
        truncated=tuple(bool(turn["truncated"]) for turn in turns),
        official=EXTRACTORS[official][0](text, choices) == answer if official and choices else None,
        count_error=_count_error(text, answer) if _is_count(answer, choices) else None,
        is_count=_is_count(answer, choices),
    )


def _is_count(answer: str, choices: Any) -> bool:
    return choices is None and answer.strip().isascii() and answer.strip().isdigit()


def _count_error(text: str, answer: str) -> float | None:
    """How far the boxed number is from the right one. `\\boxed{7}` for 5 is 2."""
    said = extract_answer(text, None)
    try:
        error = abs(float((said or "").replace(",", "")) - int(answer))
    except ValueError:
        return None
    return error if math.isfinite(error) else None


def cluster_of(record: Mapping[str, Any], question: str) -> str:
    """The cluster of a record: its group where it has one, else its question."""
    group = record.get("group")
    return question if group is None else f"group {group}"


class ClusterMean:
    """A running mean with a standard error that allows for clusters. Keeps two numbers a cluster."""

    def __init__(self) -> None:
        self.n = 0
        self._clusters: dict[str, list[float]] = {}

    def add(self, cluster: str, value: float | None) -> None:
        """Counts `value` within `cluster`; `None` counts as nothing."""
        if value is None:
            return
        self.n += 1
        sums = self._clusters.setdefault(cluster, [0, 0.0])
        sums[0] += 1
        sums[1] += value

    @property
    def clusters(self) -> int:
        """Number of clusters seen."""
        return len(self._clusters)

    @property
    def mean(self) -> float | None:
        """The mean, `None` of nothing."""
        return math.fsum(total for _, total in self._clusters.values()) / self.n if self.n else None

    @property
    def stderr(self) -> float | None:
        """The standard error, `None` where fewer than two clusters leave it unknown."""
        if self.clusters < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((total - n * mean) ** 2 for n, total in self._clusters.values())) / self.n


@dataclass
class _Accuracy:
    strict: ClusterMean = field(default_factory=ClusterMean)
    flexible: ClusterMean = field(default_factory=ClusterMean)
    official: ClusterMean = field(default_factory=ClusterMean)

    def add(self, cluster: str, score: RecordScore) -> None:
        self.strict.add(cluster, score.strict)
        self.flexible.add(cluster, score.flexible)
        self.official.add(cluster, score.official)

    def summary(self) -> dict[str, Any]:
        means = {"strict": self.strict, "flexible": self.flexible}
        if self.official.n:
            means["official"] = self.official
        stderr = {name: mean.stderr for name, mean in means.items()}
        return {**{name: mean.mean for name, mean in means.items()}, "stderr": stderr}


@dataclass
class _TurnMeans:
    tokens: ClusterMean = field(default_factory=ClusterMean)
    truncated: ClusterMean = field(default_factory=ClusterMean)


class Metrics:
    """
    Running totals over rollout records. Memory grows by a few numbers a question, never by a record's text.

    Example:

    ```python
    metrics = Metrics()
    for record in read_rollouts("out"):
        metrics.add(record)
    metrics.summary()["accuracy"]["strict"]
    ```
    """

    GROUNDING = ("valid_ratio", "crop_area", "coverage", "hit_rate")

    def __init__(self, official: str | None = None) -> None:
        self._official = official
        self._questions: set[str] = set()
        self._counts = {"absolute_error": ClusterMean(), "no_number": 0, "n": 0}
        self._ids: set[str] = set()
        self._rounds: set[int] = set()
        self._accuracy = _Accuracy()
        self._categories: dict[str | None, _Accuracy] = defaultdict(_Accuracy)
        self._grounding = {name: ClusterMean() for name in self.GROUNDING}
        self._status: Counter[str] = Counter()
        self._turns: dict[int, _TurnMeans] = defaultdict(_TurnMeans)

    def add(self, record: Mapping[str, Any]) -> RecordScore:
        """Scores and counts one record. Raises `RecordError` where its id was counted already."""
        score = score_record(record, self._official)
        if score.id in self._ids:
            raise RecordError(f"The rollout '{score.id}' is recorded twice. Remove one of its lines.")
        self._ids.add(score.id)
        self._rounds.add(len(score.tokens))
        question = question_id(score.id)
        self._questions.add(question)
        cluster = cluster_of(record, question)
        self._accuracy.add(cluster, score)
        self._categories[score.category].add(cluster, score)
        self._add_grounding(cluster, score)
        self._add_count(cluster, score)
        for number, (tokens, truncated) in enumerate(zip(score.tokens, score.truncated, strict=True), start=1):
            self._turns[number].tokens.add(cluster, tokens)
            self._turns[number].truncated.add(cluster, truncated)
        return score

    def _add_grounding(self, cluster: str, score: RecordScore) -> None:
        self._status.update(score.statuses)
        for status in score.statuses:
            self._grounding["valid_ratio"].add(cluster, status == BoxStatus.OK.value)
        self._grounding["crop_area"].add(cluster, score.crop_area)
        self._grounding["coverage"].add(cluster, score.coverage)
        self._grounding["hit_rate"].add(cluster, score.hit)

    def _add_count(self, cluster: str, score: RecordScore) -> None:
        if score.is_count:
            self._counts["n"] += 1
            self._counts["no_number"] += score.count_error is None
            self._counts["absolute_error"].add(cluster, score.count_error)

    def summary(self) -> dict[str, Any]:
        """The means as the report holds them. Shares are between 0 and 1; what was not measured is `None`."""
        if not self._ids:
            raise RecordError("There are no rollouts to score. Run the evaluation first.")
        if len(self._rounds) > 1:
            raise RecordError(f"The rollouts mix {sorted(self._rounds)} rounds. Score each number alone.")
        return {
            "accuracy": self._accuracy.summary(),
            "n": len(self._ids),
            "n_questions": len(self._questions),
            "n_clusters": self._accuracy.strict.clusters,
            "by_category": self._by_category(),
            **{name: mean.mean for name, mean in self._grounding.items()},
            "stderr": {name: mean.stderr for name, mean in self._grounding.items()},
            "status": self._status_counts(),
            "turns": [self._turn(number) for number in sorted(self._turns)],
            "num_rounds": max(self._rounds),
            "counting": self._counting(),
        }

    def _counting(self) -> dict[str, Any] | None:
        """Mean absolute error of the counts, over the answers that are numbers; `None` where nothing is counted."""
        if self._counts["n"] == 0:
            return None
        error = self._counts["absolute_error"]
        return {
            "n": self._counts["n"],
            "no_number": self._counts["no_number"],
            "mae": error.mean,
            "stderr": error.stderr,
        }

    def _by_category(self) -> dict[str, Any]:
        if set(self._categories) == {None}:
            return {}
        named = {("(none)" if name is None else name): accuracy for name, accuracy in self._categories.items()}
        return {name: {"n": named[name].strict.n, **named[name].summary()} for name in sorted(named)}

    def _status_counts(self) -> dict[str, int]:
        if not self._status:
            return {}
        known = [status.value for status in BoxStatus]
        return {name: self._status[name] for name in [*known, *sorted(self._status.keys() - set(known))]}

    def _turn(self, number: int) -> dict[str, Any]:
        turn = self._turns[number]
        return {"round": number, "n": turn.tokens.n, "tokens": turn.tokens.mean, "truncated": turn.truncated.mean}
