"""Where runs keep their files.

A run of an experiment NAME whose spec has the id ID owns checkpoints/NAME/ID.*: ID.safetensors (weights), ID.json (the
record), ID.diff.gz (changes of the code that were not committed, if there were any), and while it is under way
ID.step-N.safetensors (resume points), ID.lock and ID.owner.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from core.code_hash import CODE, same_numbers
from core.errors import UserError
from core.runs.record import Finished, Record, RecordError, read_each, read_record
from core.spec import resolve
from core.store import Held, delete, local, locked, reserve, sweep

Begun = Set[tuple[str, str]]  # runs by their names and the ids of their specs


class OtherData(UserError):
    """There is a result of a run, but of other data; the message says where."""


class OtherCode(UserError):
    """There is a result of a run, but of other code; the message says how to replace it."""


class Run:
    """The files of one run.

    Attributes:
        weights, record: in the folder of a former name, if the file exists only there. Everything else is in `folder`.
    """

    def __init__(self, out: str | Path, name: str, spec_id: str, former: Mapping[str, str] = {}) -> None:
        """`former`: old names of experiments, with the new names."""
        self.name, self.spec_id = name, spec_id
        self.folder, *old = _folders(out, name, former)
        self.weights = _existing(f"{spec_id}.safetensors", self.folder, old)
        self.record = _existing(f"{spec_id}.json", self.folder, old)
        self.diff = self.folder / f"{spec_id}.diff.gz"

    def lock(self):
        """Keep the run for this process. Raises Held where another process has it for longer than a sweep takes."""
        return locked(self.folder / f"{self.spec_id}.lock", self.folder / f"{self.spec_id}.owner", timeout=1)

    def resume_point(self, step: int) -> Path:
        return self.folder / f"{self.spec_id}.step-{step:010d}.safetensors"

    def resume_points(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob(f"{self.spec_id}.step-*.safetensors"), reverse=True)

    def read(self) -> Record | None:
        """The record, if there is one; see `read_record`."""
        if not os.path.lexists(self.record):
            return None
        record = read_record(self.record)
        record.name = self.name
        return record

    def result(self) -> Finished | None:
        """The record of a finished run, if its weights are there too.

        Raises:
            RecordError: there is a record that cannot be read. It may be the only copy of a result, so no run
                takes its place.
        """
        try:
            record = self.read()
        except RecordError as error:
            aside = shlex.join(("mv", str(self.record), f"{self.record}.old"))
            raise RecordError(f"{error}; to train it anew, move that file away: {aside}") from None
        return record if isinstance(record, Finished) and self.weights.exists() else None

    def finished(self, data: str, begun: Begun | None = None) -> Finished | None:
        """The result, unless the run is being trained again: there are resume points, or it is one of `begun`.

        Args:
            data: what the run is asked for with; see core.data.identity.

        Raises:
            OtherData, OtherCode: the result is of other data, or of code that gives other numbers. RecordError: as
                `result`.
        """
        # Before the resume points: to look for them reads all names of a folder, which may hold 10,000 runs.
        if not (result := self.result()):
            return None
        again = self.resume_points() if begun is None else (self.folder.name, self.spec_id) in begun
        found = None if again else result
        if found and found.data != data:
            raise OtherData(
                f"{self.record} is the result of other data ({found.data}, now {data}): name another folder with "
                "--out, or replace it with --force"
            )
        if found and not same_numbers(found.environment.code):
            raise OtherCode(
                f"{self.record} is the result of other code ({found.environment.code or 'unknown'}, now {CODE}): name "
                "another folder with --out, or replace it with --force"
            )
        return found


def _folders(out: str | Path, name: str, former: Mapping[str, str]) -> list[Path]:
    """The folder of an experiment, then those of its former names."""
    return [local(out) / "checkpoints" / each for each in (name, *(old for old, new in former.items() if new == name))]


def _existing(file: str, folder: Path, old: list[Path]) -> Path:
    """The file in `folder`, unless it exists only in one of the old folders."""
    found = [each for each in old if os.path.lexists(each / file) and not os.path.lexists(folder / file)]
    return (found or [folder])[0] / file


def under_way(out: Path) -> Begun:
    """The runs under `out` that have resume points, found in one pass over the folders: to ask each of 10,000 runs of a
    folder would read all their names 10,000 times."""
    points = (local(out) / "checkpoints").glob("*/*.step-*.safetensors")
    return {(path.parent.name, path.name.split(".step-")[0]) for path in points}


def lock_results(out: Path) -> contextlib.AbstractContextManager[None]:
    """Keep the report under `out` for this process, as soon as no other has it."""
    return locked(out / "checkpoints" / "results.lock", out / "checkpoints" / "results.owner")


def sweep_all(out: Path) -> None:
    """Delete the temporary files and the names of owners that killed processes left under `out`. Skips runs that
    another process is training.

    Raises:
        StoreError: `out` cannot be written, or its file system has no locks.
    """
    with lock_results(out):
        reserve(out / "results.md", 1, 1)
        sweep(out, "results.md")
        sweep(out / "checkpoints", "")  # the pictures and tables of the report
    left = [path for kind in ("tmp", "owner") for path in (out / "checkpoints").glob(f"*/*.{kind}")]
    for folder, run_id in sorted({(path.parent, path.name.split(".")[0]) for path in left}):
        with contextlib.suppress(Held), locked(folder / f"{run_id}.lock", timeout=0):
            sweep(folder, f"{run_id}.")
            delete(folder / f"{run_id}.owner")


def find_weights(
    out: Path,
    word: str,
    seed: int | None = None,
    spec: Mapping[str, Any] | None = None,
    former: Mapping[str, str] = {},
) -> Path:
    """The file of weights that a word of the command line means: a path, an id, or the name of an experiment.

    Args:
        seed: of the run; None for the first.
        spec: of the experiment of that name as experiments/ has it now, if it has one. Runs of this spec come first.
        former: old names of experiments, with the new names.

    Raises:
        UserError: There is no such file, or the word may mean several.
    """
    path = local(word)
    if path.exists() or path.name != word or word.endswith(".safetensors"):
        return path
    if re.fullmatch("[0-9a-f]{12}", word):
        found = sorted((out / "checkpoints").glob(f"*/{word}.safetensors"))
        if not found:
            raise UserError(f"there are no weights of the id {word} under {out}")
        return found[0]
    records = [record for record in _finished(out, word, former) if seed is None or record.seed == seed]
    if not records:
        of_seed = "" if seed is None else f" --seed {seed}"
        train = f"`uv run main.py run {word}{of_seed}` trains it" if spec is not None else "names are in `main.py list`"
        raise UserError(f"there are no weights of {word}{of_seed} under {out}; {train}")
    wanted = None if spec is None else {**resolve(spec), "seed": 0}
    records = [record for record in records if {**record.spec, "seed": 0} == wanted] or records
    first = min(record.seed for record in records)
    ids = [record.spec_id for record in records if record.seed == first]
    if len(ids) > 1:
        raise UserError(
            f"there are several networks of {word} with seed {first}: say which by its id: {', '.join(ids)}"
        )
    return Run(out, word, ids[0], former).weights


def _finished(out: Path, name: str, former: Mapping[str, str]) -> list[Finished]:
    """The records of an experiment whose weights exist."""
    ids = {path.stem for folder in _folders(out, name, former) for path in folder.glob("*.json")}
    runs = [Run(out, name, each, former) for each in sorted(ids)]
    records = read_each(run.record for run in runs if run.weights.exists())
    return [record for record in records if isinstance(record, Finished)]
