"""results.md and its picture: a view of the records, rebuilt from them and from nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.report import markdown, plots
from core.runs import record, store
from core.spec import Spec

Record = dict[str, Any]


def rebuild(out: Path, experiments: Mapping[str, Spec]) -> list[Record]:
    """Write results.md and the learning curves under `out`; returns the records, in the order of the table.

    Args:
        experiments: what the names of experiments stand for now, to say how to run them again.

    Raises:
        core.runs.store.StoreError: they cannot be written; the old ones are intact.
    """
    with store.locked(out / "checkpoints" / "results.lock"):
        records = sorted(record.records(out), key=markdown.order)
        finished = [r for r in records if r["status"] == "finished"]
        store.atomic_write(out / plots.PICTURE, plots.picture(finished))
        store.atomic_write(out / "results.md", markdown.markdown(records, experiments).encode())
    return records
