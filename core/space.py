"""A search space: a spec in which some values are ranges or choices. Knows neither Optuna nor a tensor."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from core.errors import UserError
from core.runs import layout
from core.runs.record import Finished, Id, Name, Partial, Text
from core.spec import FIELDS, Integer, Number, Spec, SpecError, as_floats, nearest, plain, resolve

DIGITS = 3  # significant digits of a number in a range
PREFIX = "checkpoints/search-"  # of the files of a search
WHAT = "a file that `search` has written"
NOT_SEARCHED = ("seed", "dataset", "train_on")  # accuracies are compared, on one validation split


class Range(NamedTuple):
    """The numbers from `low` to `high`; with `log`, evenly spread over their logarithms."""

    low: float
    high: float
    log: bool = False


class Space(NamedTuple):
    """The specs of a search.

    Attributes:
        base: the experiment that the space varies.
        fixed: the keys in which all specs of the space differ from the base.
        spec: of the base, with `fixed`; resolved.
        axes: the range or the choices of each key that is searched.
    """

    name: str
    base: str
    fixed: Spec
    spec: Spec
    axes: dict[str, Range | list[Any]]

    def at(self, values: Mapping[str, Any]) -> Spec:
        """The resolved spec with these values of the searched keys; numbers are rounded to DIGITS digits.

        Raises:
            core.spec.SpecError: a spec refuses this combination.
        """
        rounded = {key: self._rounded(value, self.axes[key]) for key, value in values.items()}
        return resolve({**self.spec, **rounded})

    def _rounded(self, value: Any, axis: Range | list[Any]) -> Any:
        if not isinstance(axis, Range) or isinstance(value, int):
            return value
        return min(max(float(f"{value:.{DIGITS}g}"), axis.low), axis.high)

    def has(self, spec: Spec) -> bool:
        """Whether a resolved spec is one of the space."""
        return all(self._has(key, value) for key, value in spec.items())

    def _has(self, key: str, value: Any) -> bool:
        axis = self.axes.get(key)
        if isinstance(axis, Range):
            return axis.low <= value <= axis.high
        return value == self.spec[key] if axis is None else value in axis

    def sample(self, count: int) -> list[Spec]:
        """Specs at random, the same ones each time. Fewer than `count` if the specs refuse most combinations."""
        draws, found = random.Random(0), list[Spec]()
        for _ in range(100 * count):
            values = {
                key: draws.uniform(axis.low, axis.high) if isinstance(axis, Range) else draws.choice(axis)
                for key, axis in self.axes.items()
            }
            whole = {key: round(v) if isinstance(FIELDS[key].values, Integer) else v for key, v in values.items()}
            try:
                found.append(self.at(whole))
            except SpecError:
                continue
            if len(found) == count:
                break
        return found


class Trials(Struct):
    """What a report must know of a search beside the records, in a file under the folder of the report.

    Attributes:
        keys: the keys that are searched.
        log: those with a range of logarithms.
        trials: the ids of the trials in their order.
        comparison: the file of the comparison of the best trials on fresh seeds; empty until there is one.
    """

    name: Name
    base: Text
    keys: list[Text]
    log: list[Text]
    trials: list[Id]
    comparison: Text = ""

    @property
    def file(self) -> str:
        return f"{PREFIX}{self.name}.json"  # no experiment has a folder with such an ending

    def write(self, out: Path) -> None:
        """Raises core.store.StoreError if it cannot be written, or what is there is no such file."""
        layout.write(out / self.file, self, WHAT)


def read_all(out: Path) -> list[Trials]:
    """The searches that were made under `out`. Skips a file that is of none, with a warning in the log."""
    return layout.read_all(out.glob(f"{PREFIX}*.json"), Trials, WHAT)


def accuracy(record: Finished | Partial) -> float:
    """The validation accuracy, the last one of a run that fell behind."""
    if isinstance(record, Partial):
        return record.history[-1].val_accuracy or 0.0
    return record.metrics.validation.accuracy if record.metrics.validation else 0.0


def parse(name: str, searches: Mapping[str, Mapping[str, Any]], experiments: Mapping[str, Mapping[str, Any]]) -> Space:
    """The space with this name.

    Args:
        searches: as experiments/ has them.
        experiments: every experiment, by its name.

    Raises:
        core.errors.UserError: there is no such search, or it is not valid.
    """
    if name not in searches:
        raise UserError(f"unknown search {name!r}{nearest(name, list(searches))}")
    base, fixed = start(name, searches[name], experiments)
    try:
        axes = {key: _axis(key, value) for key, value in searches[name].items() if isinstance(value, Mapping)}
        if not axes:
            raise SpecError("no key has a range or choices, so there is nothing to search")
        plain_base, spec = resolve(experiments[base]), resolve({**experiments[base], **fixed})
        fixed = {key: spec[key] for key in fixed if spec[key] != plain_base[key]}
        space = Space(name, base, fixed, spec, axes)
        if space.spec["train_on"] == "all":
            raise SpecError("train_on = 'all' leaves no validation images to choose by")
        if not space.sample(1):
            raise SpecError("none of 100 combinations at random is a valid spec")
    except SpecError as error:
        raise UserError(f"search {name}: {error}") from None
    return space


def start(name: str, search: Mapping[str, Any], experiments: Mapping[str, Mapping[str, Any]]) -> tuple[str, Spec]:
    """The base of a search, and its fixed keys. Raises UserError if there is no such base."""
    base = search.get("base") if isinstance(search, Mapping) else None
    if not isinstance(base, str) or base not in experiments:
        expected = f"expected the name of an experiment{nearest(str(base), list(experiments))}"
        raise UserError(f"search {name}: base = {base!r}, {expected}")
    return base, {key: v for key, v in search.items() if key != "base" and not isinstance(v, Mapping)}


def _axis(key: str, given: Mapping[str, Any]) -> Range | list[Any]:
    """The range or the choices of a key, as a space has them.

    Raises:
        core.spec.SpecError: they are not valid.
    """
    if key not in FIELDS:
        raise SpecError(f"unknown key {key!r}{nearest(key, list(FIELDS))}")
    if key in NOT_SEARCHED:
        raise SpecError(f"{key} = {dict(given)}, expected one value: accuracies are compared on the same images")
    kind = FIELDS[key].values
    if given.keys() == {"choices"}:
        axis = given["choices"]
        if not isinstance(axis, list) or not axis:
            raise SpecError(f"{key} has the choices {axis!r}, expected a list of at least one value")
        values = [plain(value) for value in axis]
        for value in values:
            if not kind.accepts(value):
                raise SpecError(f"{key} has the choice {value!r}, expected {kind}")
        return [as_floats(value, kind) for value in values]
    if not {"low", "high"} <= given.keys() <= {"low", "high", "log"} or not isinstance(kind, Integer | Number):
        numbers = ' or {"low": ..., "high": ..., "log": True}' if isinstance(kind, Integer | Number) else ""
        raise SpecError(f'{key} = {dict(given)}, expected {{"choices": [...]}}{numbers}')
    for end in ("low", "high"):
        if not kind.accepts(given[end]):
            raise SpecError(f"{key} has the {end} end {given[end]!r}, expected {kind}")
    low, high, log = given["low"], given["high"], given.get("log", False)
    if not isinstance(log, bool):
        raise SpecError(f"{key} has log = {log!r}, expected True or False")
    if low >= high:
        raise SpecError(f"the range of {key} is empty: low = {low:g} is not below high = {high:g}")
    if log and low <= 0:
        raise SpecError(f"{key} has low = {low:g}, expected above 0 with log")
    return Range(low, high, log)
