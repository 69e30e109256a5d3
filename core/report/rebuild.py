"""results.md and its picture: a view of the records, rebuilt from them and from nothing else."""

from collections.abc import Mapping
from pathlib import Path

from core.report import markdown, plots, stats
from core.runs import store
from core.runs.record import Finished, Record, read_records
from core.spec import Spec

MAX_BYTES = 16 << 20  # of a report or a picture on disk; what is larger is not ours, and is written anew


def rebuild(out: Path, experiments: Mapping[str, Spec], redraw: bool = False) -> list[Record]:
    """Bring results.md and the learning curves under `out` up to date; a file that is right already is not touched.

    Args:
        experiments: what the names of experiments stand for now, to say how to run them again.
        redraw: draw the picture even where the one on disk says that it shows these curves.

    Returns:
        All records, in the order of the table.

    Raises:
        core.runs.store.StoreError: a record is damaged, or a file cannot be written; the old files are intact.
    """
    with store.locked(out / "checkpoints" / "results.lock"):
        records = sorted(read_records(out), key=markdown.order)
        groups = stats.groups(record for record in records if isinstance(record, Finished))
        content, picture = plots.content(groups), out / plots.PICTURE
        if redraw or plots.identifier(content).encode() not in _on_disk(picture):
            _update(picture, plots.draw(content))
        _update(out / "results.md", markdown.markdown(records, experiments).encode())
    return records


def _on_disk(path: Path) -> bytes:
    """The content of a file; nothing where it cannot be read."""
    try:
        return store.read_file(path, MAX_BYTES)
    except (OSError, ValueError):
        return b""


def _update(path: Path, data: bytes) -> None:
    if _on_disk(path) != data:
        store.atomic_write(path, data)
