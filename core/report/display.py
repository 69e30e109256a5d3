"""What a record looks like in a notebook: a small table, or a line in a list of records; and its learning curves.

Importing this module adds them to the classes of records as methods: core/runs knows nothing of reports.
"""

import html
import io
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from core.report import plots, stats
from core.report.stats import Group
from core.runs.record import Failed, Finished, Record
from core.spec import changed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 6  # of the curves, in inches


def rows(record: Record) -> dict[str, str]:
    """The cells of the table: the run, the keys of its spec that differ from the defaults, and what came of it."""
    spec = ", ".join(f"{key} {stats.shown(value)}" for key, value in changed(record.spec).items() if key != "seed")
    cells = {"run": f"{record.name} seed {record.seed}", "spec": spec or "all keys have their defaults"}
    if isinstance(record, Failed):
        return {**cells, "failed": record.error}
    if isinstance(record, Finished):
        for split in ("train", "validation", "test"):
            if metrics := getattr(record.metrics, split):
                low, high = stats.interval(metrics.accuracy, metrics.n)
                interval = "" if split == "train" else f" (95% interval {100 * low:.2f}-{100 * high:.2f}%)"
                cells[f"{split} accuracy"] = stats.percent(metrics.accuracy) + interval
    else:
        cells["fell behind"] = f"after epoch {len(record.history)} of {record.spec['epochs']}"
    return {**cells, "time": f"{stats.seconds(record):.1f} s of training"}


def line(record: Record) -> str:
    """The table as one line."""
    return f"<{type(record).__name__} {', '.join(f'{name} {cell}' for name, cell in rows(record).items())}>"


def table(record: Record) -> str:
    """The table as HTML."""
    left = 'style="text-align: left"'
    cells = (
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(cell)}</td></tr>"
        for name, cell in rows(record).items()
    )
    return f"<table>{''.join(cells)}</table>"


def plot(record: Any) -> "Figure":
    """The learning curves of a run, finished or partial, as a figure of matplotlib, which a notebook shows."""
    from matplotlib import style

    curve = plots.curve(Group([record], record.name), plots.MAX_POINTS)
    picture = plots.Picture(plots.CURVES, plots.EXPLAINED, [curve], plots.paint_curves, HEIGHT, alt="")
    with style.context(plots.STYLE, after_reset=True):
        figure: Any = plots.paint(picture)
    figure._repr_png_ = partial(_png, figure)  # without it, IPython shows figures of pyplot alone
    return figure


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


METHODS = {"__repr__": line, "_repr_html_": table}
for _kind in get_args(Record):
    for _name, _method in (METHODS if _kind is Failed else {**METHODS, "plot": plot}).items():
        setattr(_kind, _name, _method)
