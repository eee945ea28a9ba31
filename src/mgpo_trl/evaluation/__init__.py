"""Metrics and reports over rollout records."""

from .metrics import ClusterMean, Metrics, RecordScore, score_record
from .report import build_report, format_report, rescore, write_report

__all__ = [
    "ClusterMean", "Metrics", "RecordScore", "build_report", "format_report", "rescore", "score_record", "write_report"
]  # fmt: skip
