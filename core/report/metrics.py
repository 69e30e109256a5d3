"""metrics.json: mean accuracies, which DVC compares between commits (dvc.yaml)."""

import json

from core.report import stats, text

METRICS = "checkpoints/metrics.json"
SPLITS = ("test", "validation")
ALL = "test_trained_on_all"


def metrics(groups: list[stats.Group], whole: list[stats.Group]) -> str:
    """The text of metrics.json: numbers for each experiment that has a row in a table of results.md.

    DVC joins the keys with dots, to `test.lr-1e-3`. The name comes last, since it may have dots of its own.

    Args:
        groups: experiments with a validation split.
        whole: those trained on all images: a test accuracy apart from the others, which had fewer images.
    """
    best = stats.ranked(groups)[: text.ROWS]
    means = {split: _means(best, split) for split in SPLITS} | {ALL: _means(whole[: text.ROWS], "test")}
    return json.dumps(means, indent=1, sort_keys=True) + "\n"


def _means(groups: list[stats.Group], split: str) -> dict[str, float]:
    return {group.label: round(stats.accuracy(group, split), 6) for group in groups}
