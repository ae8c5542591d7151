"""Metrics of redundancy: what each computes (patches, attention, weights, output), and how it is added up.

Importing this package registers all of them.
"""

from redundancy.metrics import attention, output, patches, weights
from redundancy.metrics.registry import LEVELS, METRICS, Metric, choose, metric

__all__ = ["LEVELS", "METRICS", "Metric", "attention", "choose", "metric", "output", "patches", "weights"]
