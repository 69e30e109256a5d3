"""The numbers of a report: intervals of accuracies, speeds."""

import math
from typing import Any

Record = dict[str, Any]


def interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95% interval of an accuracy measured on n examples (Wilson 1927)."""
    z = 1.959964
    center = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n))
    return center - half, center + half


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def speed(record: Record) -> int:
    """The median over the epochs, in samples a second; 0 where none was timed."""
    speeds = sorted(entry["samples_per_second"] for entry in record["history"] if entry["samples_per_second"])
    return speeds[len(speeds) // 2] if speeds else 0
