"""Metrics, one file a family. Importing this package registers those that come with it, in the order of reports."""

from rotate_edit.evaluation.metrics import kept, knowledge, probability, reading, writing
from rotate_edit.evaluation.metrics.base import (
    HIGHER,
    LOWER,
    MeasuredModel,
    Metric,
    all_metrics,
    failed_gates,
    find_metric,
    metric,
)

__all__ = [
    "HIGHER",
    "LOWER",
    "MeasuredModel",
    "Metric",
    "all_metrics",
    "failed_gates",
    "find_metric",
    "kept",
    "knowledge",
    "metric",
    "probability",
    "reading",
    "writing",
]
