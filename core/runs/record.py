"""The schema of a record and of the metadata of weights and resume points; reads and writes records.

A file may be damaged, edited or hostile. All types and ranges are checked here, so other code can use every value.

A key that a later version adds gets a default, so older records stay valid. SCHEMA_VERSION grows only when a key
changes its meaning.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from core.errors import UserError
from core.mode import PATTERN
from core.runs import layout
from core.spec import CIFAR10, DataInfo, Spec, resolve, spec_id
from core.store import StoreError, atomic_write, local, read_file

SCHEMA_VERSION = 1
MAX_BYTES = 64 << 20  # of a record; that of the longest run, 100,000 epochs, has 25 MB

# Text is shown in terminals, in Markdown and in pictures: no control, invisible, bidirectional or surrogate characters.
UNSHOWN = r"\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
Text = Annotated[str, Meta(max_length=1000, pattern=rf"\A[^{UNSHOWN}]*\Z")]
MAX_NAME = 100  # characters
Name = Annotated[str, Meta(max_length=MAX_NAME, pattern=r"\A[A-Za-z0-9][A-Za-z0-9_.+=-]*\Z")]
Id = Annotated[str, Meta(pattern=r"\A[0-9a-f]{12}\Z")]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
ModeText = Annotated[str, Meta(pattern=PATTERN)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Share = Annotated[float, Meta(ge=0, le=1)]
Loss = Annotated[float, Meta(ge=0, le=1e300)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Counts = list[Count]  # one for each class


class RecordError(StoreError):
    """A file is not a record that this version can read. The message names it; it may be the only copy of a result."""


class Metrics(Struct, frozen=True, gc=False):
    """The evaluation of one split. `correct` and `count` have a number for each class."""

    accuracy: Share
    loss: Loss
    n: Annotated[int, Meta(ge=1, le=2**53)]
    correct: Counts
    count: Counts

    def __post_init__(self) -> None:
        if len(self.correct) != len(self.count):
            raise ValueError("correct and count have different lengths")
        if any(hit > of for hit, of in zip(self.correct, self.count, strict=True)) or sum(self.count) != self.n:
            raise ValueError("a class has more correct images than images, or the classes do not add up to n")
        if abs(sum(self.correct) / self.n - self.accuracy) > 1e-6:
            raise ValueError(f"the accuracy is {self.accuracy}, but {sum(self.correct)} of {self.n} are correct")


class Epoch(Struct, frozen=True, gc=False):
    """One epoch: mean loss and accuracy in training, then on validation, which a run on all images does not have."""

    epoch: Annotated[int, Meta(ge=1, le=100_000)]
    train_loss: Loss
    train_accuracy: Share
    val_loss: Loss | None
    val_accuracy: Share | None
    seconds: Seconds  # of the steps, without the step that compiles and those in which the process was suspended
    samples_per_second: Count


class Splits(Struct, frozen=True, gc=False):
    """Evaluation on each split, in evaluation mode. A run on all images has no validation."""

    train: Metrics
    validation: Metrics | None
    test: Metrics


class Flipped(Struct, frozen=True, gc=False):
    """Evaluation with flip TTA: the probabilities of each image and its mirror image are averaged."""

    validation: Metrics | None
    test: Metrics


class Mistake(Struct, frozen=True, gc=False):
    """A wrong prediction for the image `index` of the test split."""

    index: Count
    label: Count
    predicted: Count
    probability: Share


class Answers(Struct, frozen=True):
    """The predictions on the test split; see core.functional.step.details.

    `right` has a bit for each image, in the order of the split. In JSON it is base64.
    """

    right: Annotated[bytes, Meta(max_length=1 << 16)]
    confusion: list[Counts]
    mistakes: Annotated[list[Mistake], Meta(max_length=100)]

    def is_right(self, index: int) -> bool:
        return bool(self.right[index // 8] & 128 >> index % 8)

    def check(self, test: Metrics) -> None:
        """Raise ValueError unless these predictions fit the test metrics."""
        if len(self.right) != (test.n + 7) // 8:
            raise ValueError(f"the bits of {test.n} images are {len(self.right)} bytes")
        bits = int.from_bytes(self.right)
        if bits.bit_count() != sum(test.correct) or bits % (1 << -test.n % 8):
            raise ValueError(f"the bits do not mark {sum(test.correct)} of {test.n} images as right")
        classes = len(test.count)
        if {len(self.confusion), *map(len, self.confusion)} != {classes}:
            raise ValueError(f"the confusion matrix is not one of {classes} classes")
        diagonal = [row[i] for i, row in enumerate(self.confusion)]
        if [sum(row) for row in self.confusion] != test.count or diagonal != test.correct:
            raise ValueError("the confusion matrix does not fit the test metrics")
        for mistake in self.mistakes:
            if mistake.index >= test.n or mistake.label == mistake.predicted or self.is_right(mistake.index):
                raise ValueError(f"image {mistake.index} is not a mistake")
            if max(mistake.label, mistake.predicted) >= classes:
                raise ValueError(f"image {mistake.index} has a class that does not exist")


class Environment(Struct, frozen=True, gc=False):
    """Where a run was made; see core.runs.provenance.

    `mode` is the text of a core.mode.Mode; `diff` is the sha256 of the uncommitted changes (core.runs.checkout).
    """

    torch: Text
    device: Text
    hardware: Text
    mode: ModeText
    device_name: Text
    threads: Count
    python: Text
    git: Text
    code: Text = ""
    settings: Text = "MKL_CBWR=AUTO,STRICT"
    diff: Text = ""


class About(Struct, kw_only=True):
    """What the record, the weights and the resume points of a run have in common.

    Attributes:
        spec: Resolved: a key that the file lacks has its default.
        data: The identity of the data; see core.data.identity.
        info: Of the data set. Files of CIFAR-10 do not have it; see `data_info`.
    """

    name: Name
    spec: Spec
    spec_id: Id
    data: Text
    environment: Environment
    seed: Count
    schema_version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION
    info: DataInfo | UnsetType = UNSET

    @property
    def data_info(self) -> DataInfo:
        return CIFAR10 if self.info is UNSET else self.info

    def check_classes(self, *metrics: Metrics | None) -> None:
        """Raise ValueError unless these have a number for each class."""
        expected = len(self.data_info.classes)
        if other := next((m for m in metrics if m and len(m.count) != expected), None):
            raise ValueError(f"numbers for {len(other.count)} classes, expected {expected}")

    def __post_init__(self) -> None:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(f"it was written by a later version of this program (schema {self.schema_version})")
        self.spec = resolve(self.spec)
        if self.seed != self.spec["seed"]:
            raise ValueError(f"the seed is {self.seed}, but {self.spec['seed']} in the spec")
        if (self.info is UNSET) != (self.spec["dataset"] == "cifar10"):
            raise ValueError(f"the classes are given or not, but the data set is {self.spec['dataset']}")


class Failed(About, tag_field="status", tag="failed"):
    """The record of a run that ended without a result."""

    error: Text

    @property
    def diverged(self) -> bool:
        """Whether a number became NaN or infinite. Any other failure, such as too little memory, does not count."""
        return "NaN" in self.error


class Partial(About, tag_field="status", tag="partial"):
    """The record of a run that was stopped after an epoch because it fell behind. It can go on from there."""

    history: Annotated[list[Epoch], Meta(min_length=1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_history(self.history, len(self.history), self.spec)


class Finished(About, tag_field="status", tag="finished"):
    """The record of a run with its result.

    Attributes:
        digest: sha256 of the weights; see core.runs.checkpoint.digest.
        exact: whether the bits are those of an uninterrupted run. The key in the file is `bitwise`.
        first_step_seconds: from the start of the run to the end of its first step, which compiles.
        answers, flipped: older records have none.
        shifted: evaluation of the test split with shifts TTA (core.functional.augment.views). Runs that trained on all
            images with shifts have it; older records have none.
        whitening: sha256 of the whitening, if the spec has one.
    """

    parameters: Count
    history: Annotated[list[Epoch], Meta(min_length=1)]
    first_step_seconds: Seconds
    metrics: Splits
    digest: Digest
    exact: bool = msgspec.field(name="bitwise")
    answers: Answers | UnsetType = UNSET
    flipped: Flipped | UnsetType = UNSET
    shifted: Metrics | UnsetType = UNSET
    whitening: Digest | UnsetType = UNSET

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_classes(*msgspec.structs.astuple(self.metrics))
        if self.flipped is not UNSET:
            self.check_classes(self.flipped.validation, self.flipped.test)
        if self.shifted is not UNSET:
            self.check_classes(self.shifted)
        if self.answers is not UNSET:
            self.answers.check(self.metrics.test)
        check_history(self.history, self.spec["epochs"], self.spec)
        if (self.metrics.validation is None) != (self.spec["train_on"] == "all"):
            raise ValueError(f"the validation metrics do not fit train_on = {self.spec['train_on']}")


def check_history(history: list[Epoch], epochs: int, spec: Spec) -> None:
    """Raise ValueError unless these are the epochs 1, 2, ..., and have validation metrics if the run has the split."""
    if [entry.epoch for entry in history] != list(range(1, epochs + 1)):
        raise ValueError(f"the history does not have the epochs 1 to {epochs}")
    absent = [value is None for entry in history for value in (entry.val_loss, entry.val_accuracy)]
    if absent != [spec["train_on"] == "all"] * len(absent):
        raise ValueError(f"the validation metrics of the history do not fit train_on = {spec['train_on']}")


class Weights(About):
    """The metadata of a file of weights, with the digest and the test metrics of the run."""

    digest: Digest
    test: Metrics

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_classes(self.test)


class Progress(Struct):
    """How far a run has come, apart from its state and its history.

    Attributes:
        seconds, timed: time and number of the measured steps of the present epoch.
        first_step_seconds, exact: as in `Finished`.
    """

    seconds: Seconds = 0.0
    timed: Count = 0
    first_step_seconds: Seconds = 0.0
    exact: bool = msgspec.field(name="bitwise", default=True)


class ResumePoint(About):
    """The metadata of a resume point."""

    progress: Progress


Record = Finished | Partial | Failed

# msgspec prepares a type when it is first used. Two threads that do so at once crash the process, so it is done here.
for _each in (Finished, Partial, Failed, Weights, ResumePoint):
    msgspec.json.Decoder(_each)

# Windows has no files of these names, whatever their ending, and drops a dot at the end.
NOT_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?|.*\.", re.IGNORECASE)

POINT = r"(?=-\w+=)"  # where the values begin in the name of a member of a grid

# Endings of other names in checkpoints/, beside the folders of experiments.
ENDINGS = (".csv", ".journal", ".json", ".lock", ".owner", ".png", ".svg", ".tmp")


def check_name(name: str, what: str = "an experiment") -> None:
    """Raise UserError unless `name` can name an experiment, and so a folder in checkpoints/, or a suite."""
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        raise UserError(
            f"{name!r} cannot name {what}, expected at most {MAX_NAME} letters, digits and _.+=-, no sign first"
        ) from None
    if NOT_ON_WINDOWS.fullmatch(name):
        raise UserError(f"{name!r} cannot name {what}, as Windows has no files of that name; choose another name")
    if name.lower().endswith(ENDINGS):
        raise UserError(
            f"{name!r} cannot name {what}, as files of the report end in {', '.join(ENDINGS)}; choose another name"
        )


def new_name(name: str, former: Mapping[str, str]) -> str:
    """The current name of an experiment. A member of a grid, such as NAME-lr=0.001, is renamed with its grid.

    Args:
        former: old names, with the new names.
    """
    base, *point = re.split(POINT, name, maxsplit=1)
    return "".join([former.get(base, base), *point])


def former_names(name: str, former: Mapping[str, str]) -> tuple[str, ...]:
    """The former names of an experiment; see `new_name`."""
    base, *point = re.split(POINT, name, maxsplit=1)
    return tuple("".join([old, *point]) for old, new in former.items() if new == base)


def decode(data: bytes) -> Record:
    """A record from its JSON. The history may be columns or, in older records, a list of epochs.

    Raises:
        ValueError: this is not a record.
    """
    content = msgspec.json.decode(data)
    if isinstance(content, dict) and isinstance(columns := content.get("history"), dict):
        lengths = {len(column) if isinstance(column, list) else None for column in columns.values()}
        if len(lengths) != 1 or None in lengths:
            raise ValueError("the columns of the history are not lists of one length")
        content["history"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return msgspec.convert(content, Record)  # type: ignore[arg-type]  # a union of types is no type to mypy


def encode(record: About) -> bytes:
    """A record or metadata as JSON: readable, the history as columns, equal text for equal records."""
    content = msgspec.json.decode(msgspec.json.encode(record))  # NaN becomes null, which `decode` refuses
    if rows := content.get("history"):
        content["history"] = {key: [row[key] for row in rows] for key in rows[0]}
    return layout.dumps(content).encode()


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically.

    Raises:
        core.store.StoreError: the file cannot be written. ValueError: a value is out of its range.
    """
    data = encode(record)
    decode(data)  # checks the values
    atomic_write(path, data)


def read_record(path: Path) -> Record:
    """The record in a file NAME/ID.json.

    Raises:
        RecordError: the file cannot be read, is damaged, or holds the record of another run or a later version.
    """
    try:
        record = decode(read_file(path, MAX_BYTES))
        names = record.name, record.spec_id, spec_id(record.spec)
        if names != (path.parent.name, path.stem, path.stem):
            raise ValueError(f"it is the record of {record.name}, spec {spec_id(record.spec)}")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error)
        reason = "".join(filter(str.isprintable, reason))[:200]  # msgspec may quote the file
        raise RecordError(f"{path} is not a record that this version of the program can read: {reason}") from None
    return record


def read_records(out: str | Path, former: Mapping[str, str] = {}) -> Iterator[Record]:
    """Every record under `out`, in the order of their paths; see core.runs.layout.read_each.

    Args:
        former: old names of experiments, with the new names. A record with an old name gets the new name. It is skipped
            if the run also has a record with the new name.
    """
    folder = local(out) / "checkpoints"
    paths = (path for path in sorted(folder.glob("*/*.json")) if re.fullmatch(r"[0-9a-f]{12}\.json", path.name))
    for record in layout.read_each(paths, read_record):
        if (name := new_name(record.name, former)) != record.name:
            if (folder / name / f"{record.spec_id}.json").exists():
                continue
            record.name = name
        yield record
