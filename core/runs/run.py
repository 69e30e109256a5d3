"""A run: its experiment, its spec, the folder of its files, and its result.

A run of an experiment NAME whose spec has the id ID owns checkpoints/NAME/ID.*: ID.safetensors (weights), ID.json (the
record), ID.diff.gz (uncommitted changes of the code, if there were any). While it is trained, it also owns
ID.step-N.safetensors (resume points), ID.lock and ID.owner.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

from core.code_hash import CODE, same_numbers
from core.errors import UserError
from core.runs.record import UNSET, Environment, Finished, Record, RecordError, check_name, read_record
from core.spec import DataInfo, Spec, resolve, spec_id
from core.store import local, locked

InProgress = Set[tuple[str, str]]  # runs that have resume points, by name and id


class OtherData(UserError):
    """A run has a result of other data; the message names the file."""


class OtherCode(UserError):
    """A run has a result of other code; the message says how to replace it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run of an experiment.

    Attributes:
        name: of the experiment.
        spec: may lack keys that have their default; it is resolved here.
        out: the folder of results.md and checkpoints/.
        former: earlier names of the experiment. The run reads weights and a record from there if `name` has none, and
            goes on from the resume points there. It writes only under `name`.
        title: names the experiment in messages, if `name` is not enough.

    Raises:
        core.errors.UserError: the name cannot name an experiment, or the spec is not valid (core.spec.SpecError).
    """

    name: str
    spec: Spec
    out: Path
    former: Sequence[str] = ()
    title: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        object.__setattr__(self, "spec", resolve(self.spec))
        object.__setattr__(self, "out", local(self.out))

    @property
    def seed(self) -> int:
        return self.spec["seed"]

    @property
    def label(self) -> str:
        """The run in messages."""
        return f"{self.title or self.name} seed {self.seed}"

    @cached_property
    def id(self) -> str:
        return spec_id(self.spec)

    def about(self, data: str, info: DataInfo, environment: Environment) -> dict[str, Any]:
        """The description of the run that each of its files contains: the keys of core.runs.record.About.

        Args:
            data: the identity of the data; see core.data.identity.
            info: of the data set. Files of CIFAR-10 do not have it.
        """
        return {
            "name": self.name,
            "spec": self.spec,
            "spec_id": self.id,
            "seed": self.seed,
            "data": data,
            "environment": environment,
            "info": UNSET if self.spec["dataset"] == "cifar10" else info,
        }

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints" / self.name

    @property
    def weights(self) -> Path:
        return self._existing(f"{self.id}.safetensors")

    @property
    def record(self) -> Path:
        return self._existing(f"{self.id}.json")

    def _existing(self, file: str) -> Path:
        """A file of the run; in the folder of a former name if it exists only there."""
        paths = [folder / file for folder in self._folders]
        return next(filter(os.path.lexists, paths), paths[0])

    @property
    def _folders(self) -> list[Path]:
        """The folder of the name, then those of its former names."""
        return [self.folder.with_name(name) for name in (self.name, *self.former)]

    @property
    def target(self) -> "Run":
        """The run without its former names. New files are written there, so that old ones stay."""
        return dataclasses.replace(self, former=())

    @property
    def diff(self) -> Path:
        return self.folder / f"{self.id}.diff.gz"

    def resume_point(self, step: int) -> Path:
        return self.folder / f"{self.id}.step-{step:010d}.safetensors"

    def resume_points(self) -> list[Path]:
        """The newest first; also those under former names."""
        points = [path for folder in self._folders for path in folder.glob(f"{self.id}.step-*.safetensors")]
        return sorted(points, key=lambda path: path.name, reverse=True)

    def is_in_progress(self, known: InProgress | None = None) -> bool:
        """Whether the run has resume points.

        Args:
            known: what `core.runs.files.in_progress` returns; by default the folders of this run are searched.
        """
        if known is None:
            return bool(self.resume_points())
        return any((folder.name, self.id) in known for folder in self._folders)

    def lock(self):
        """Lock the run for this process. Raises Held if another process trains it, UserError as `check_case`."""
        self.check_case()
        return locked(self.folder / f"{self.id}.lock", self.folder / f"{self.id}.owner", timeout=1)

    def check_case(self) -> None:
        """Raise UserError if there is an experiment whose name differs from this one only in case."""
        others: list[str] = []
        with contextlib.suppress(OSError):  # it does not exist yet, or whoever writes there says what is wrong
            others = os.listdir(self.folder.parent)
        for other in others:
            if other != self.name and other.lower() == self.name.lower():
                raise UserError(
                    f"{self.folder.with_name(other)} differs from the name {self.name} only in case, and Windows and "
                    "macOS keep the files of both in one folder: choose another name, or another folder with --out"
                )

    def read(self) -> Record | None:
        """The record, if there is one; see core.runs.record.read_record."""
        if not os.path.lexists(self.record):
            return None
        record = read_record(self.record)
        record.name = self.name
        return record

    def result(self, weights: bool = True) -> Finished | None:
        """The record of a finished run that has its weights; without `weights`, also of one that has none.

        Raises:
            RecordError: the record cannot be read. It may be the only copy of a result, so no run replaces it.
            UserError: as `check_case`.
        """
        try:
            record = self.read()
        except RecordError as error:
            self.check_case()
            raise RecordError(f"{error}; to train it anew, move that file to {self.record}.old") from None
        return record if isinstance(record, Finished) and (not weights or self.weights.exists()) else None

    def finished(
        self, data: str | None, in_progress: InProgress | None = None, weights: bool = True
    ) -> Finished | None:
        """The result, unless the run is being trained again.

        Args:
            data: the identity of the data to train on (core.data.identity); None for whatever it is.
            in_progress: as `is_in_progress` takes it.
            weights: as `result` takes it.

        Raises:
            OtherData, OtherCode: the result is of other data, or of code that gives other numbers. RecordError: as
                `result`.
        """
        result = self.result(weights)  # first: the search below reads the names of all files of a folder
        if result is None or self.is_in_progress(in_progress):
            return None
        if data is not None and result.data != data:
            raise OtherData(
                f"{self.record} is the result of other data ({result.data}, now {data}): name another folder with "
                "--out, or replace it with `run` and --force"
            )
        if not same_numbers(result.environment.code):
            raise OtherCode(
                f"{self.record} is the result of other code ({result.environment.code or 'unknown'}, now {CODE}): name "
                "another folder with --out, or replace it with `run` and --force"
            )
        return result
