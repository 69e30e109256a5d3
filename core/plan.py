"""What the words of a command line mean: from suites, grids, changed keys and seeds to runs. Knows no tensor."""

import hashlib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core import space
from core.errors import UserError
from core.report.catalog import Catalog
from core.runs.record import MAX_NAME, check_name, former_names
from core.runs.run import Run
from core.spec import FIELDS, List, SpecError, nearest, plain

LIMIT = 10_000  # runs of one call
KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)

Experiments = dict[str, dict[str, Any]]  # name -> spec as experiments/ has it
Suites = Mapping[str, Mapping[str, Mapping[str, Any]]]  # name -> experiments and grids


class Project(NamedTuple):
    """A folder with experiments.

    Attributes:
        root: the folder of main.py.
        suites, ablations, default: as experiments/ has them.
        former: old names of experiments and suites, with the new names.
        searches: spaces to search, as experiments/ has them.
    """

    root: Path
    suites: Suites
    ablations: Mapping[str, Mapping[str, str]]
    default: str
    former: Mapping[str, str] = {}
    searches: Mapping[str, Mapping[str, Any]] = {}

    @property
    def named(self) -> Suites:
        """The suites, and for each search a suite of its base with its fixed keys: `run NAME lr=...` trains a trial."""
        known = experiments(self.suites)
        starts: dict[str, Mapping[str, Mapping[str, Any]]] = {}
        for name, search in self.searches.items():
            if name in self.suites:
                raise UserError(f"the name {name} stands for a suite and a search in experiments/; rename one of them")
            base, fixed = space.start(name, search, known)
            starts[name] = {name: {**known[base], **fixed}}
        return {**self.suites, **starts}

    def catalog(self) -> Catalog:
        """The experiments as a report needs them, with grids expanded."""
        expanded = catalog(self.suites)
        result = Catalog({suite: expanded[suite] for suite in self.suites}, self.ablations, self.default, self.former)
        result.check()
        return result


# Grids and names


def expand(name: str, spec: Mapping[str, Any]) -> Experiments:
    """The experiments of a spec: one for each combination of its lists of values, in the order in which they are
    written. A spec without lists is one experiment. A list may also be a tuple, a range or a NumPy array.

    Raises:
        UserError: there are none or too many, or two have the same name.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"experiment {name}: a spec is a dict, found {type(spec).__name__}")
    spec = {key: plain(value) for key, value in spec.items()}
    axes = {key: values for key, values in spec.items() if _is_axis(key, values)}
    for key, values in axes.items():
        if key == "seed" or not values:
            expected = "one seed; --seeds trains several" if key == "seed" else "at least one value"
            raise UserError(f"experiment {name}: {key} = {values}, expected {expected}")
    if (count := math.prod(map(len, axes.values()))) > LIMIT:
        raise UserError(f"experiment {name}: its grid has {count:,} members, expected at most {LIMIT:,}")
    members: Experiments = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        member = _short("-".join([name, *(f"{key}={_text(value)}" for key, value in point.items())]))
        if member in members:
            raise UserError(f"experiment {name}: two members of its grid are named {member}")
        members[member] = {**spec, **point}
    return members


def _is_axis(key: str, value: Any) -> bool:
    """Whether this is a list of values. For a key whose values are lists (widths), it is a list of lists."""
    if key in FIELDS and isinstance(FIELDS[key].default, list):
        return isinstance(value, list) and any(isinstance(each, list) for each in value)
    return isinstance(value, list)


def _text(value: Any) -> str:
    """A value in a name: 0.001, relu, 1024x512."""
    if isinstance(value, list):
        return "x".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _short(name: str) -> str:
    """The name; if it is too long, its beginning and a hash of all of it."""
    if len(name) <= MAX_NAME:
        return name
    tail = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: MAX_NAME - len(tail) - 1]}-{tail}"


def catalog(suites: Suites) -> dict[str, Experiments]:
    """Every name that may be used, with its experiments: those of a suite, of a grid, or just one.

    Raises:
        UserError: a name has two meanings, or differs from another only in case; a suite has no valid name; or a grid
            cannot be expanded.
    """
    names: dict[str, Experiments] = {}
    written: dict[str, str] = {}  # each name, by itself in small letters

    def add(name: str, members: Experiments) -> None:
        if (other := written.setdefault(name.lower(), name)) != name:
            raise UserError(
                f"the names {other} and {name} in experiments/ differ only in case, and Windows and macOS would keep "
                "their files in one folder; rename one of them"
            )
        if names.setdefault(name, members) != members:
            raise UserError(f"the name {name} stands for two different things in experiments/; rename one of them")

    for suite, specs in suites.items():
        check_name(suite, "a suite")
        everything: Experiments = {}
        for name, spec in specs.items():
            grid = expand(name, spec)
            for member in grid:
                add(member, {member: grid[member]})
            add(name, grid)
            everything |= grid
        add(suite, everything)
    return names


def experiments(suites: Suites) -> Experiments:
    """Every experiment, by its name."""
    return {name: spec for members in catalog(suites).values() for name, spec in members.items()}


# Words of a command line


class Words(NamedTuple):
    """The words of a command line by kind.

    Attributes:
        names: names of experiments, grids and suites.
        values: the keys with one value.
        axes: the keys with several values; together they are a grid.
    """

    names: list[str]
    values: dict[str, Any]
    axes: dict[str, list[Any]]


def split_words(words: Iterable[str], known: Collection[str]) -> Words:
    """Separate overrides from names. A word that starts with a key of a spec and "=" is an override.

    Args:
        known: all names that may be used. The names of the members of a grid contain "=", too.

    Raises:
        UserError: a key is unknown or is given twice.
    """
    sorted_words = Words([], {}, {})
    for word in words:
        match = KEY.fullmatch(word)
        if match is None or word in known:
            sorted_words.names.append(word)
            continue
        key, text = match.groups()
        if key not in FIELDS:
            raise UserError(f"unknown key {key!r} in {word!r}{nearest(key, list(FIELDS))}")
        if key in sorted_words.values or key in sorted_words.axes:
            raise UserError(f"{key} is given twice")
        values = parse_values(key, text)
        if len(values) == 1:
            sorted_words.values[key] = values[0]
        else:
            sorted_words.axes[key] = values
    return sorted_words


def parse_values(key: str, text: str) -> list[Any]:
    """The values of a key in a word: "1e-3,5e-4" are two learning rates, "512,256/1024" two lists of widths.

    A text that is no valid value stays a text, which core.spec.resolve refuses.
    """
    allowed = FIELDS[key].values
    return [allowed.parse(each) for each in text.split("/" if isinstance(allowed, List) else ",")]


def parse_seeds(text: str) -> Sequence[int]:
    """'5' is the seeds 0 to 4, '3,7,11' these three."""
    numbers = [int(n) for n in text.split(",")] if re.fullmatch(r"[0-9]{1,10}(,[0-9]{1,10})*", text) else [0]
    seeds = numbers if len(numbers) > 1 else range(numbers[0])
    if not seeds or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}, expected how many (5 is the seeds 0 to 4) or which (3,7,11, each once)")
    return seeds


def runs(
    experiments: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Any] = {},
    seeds: Sequence[int] | None = None,
    out: str | Path = ".",
    former: Mapping[str, str] = {},
) -> list[Run]:
    """The runs of these experiments: all with the first seed, then all with the next. A sweep that is stopped early has
    then compared all of them.

    Raises:
        UserError: a spec is not valid, or there are too many runs.
    """
    if (count := len(experiments) * (1 if seeds is None else len(seeds))) > LIMIT:
        raise UserError(f"{count:,} runs, expected at most {LIMIT:,} in one call")
    changes = [{**overrides}] if seeds is None else [{**overrides, "seed": seed} for seed in seeds]
    result = []
    for change in changes:
        for name, spec in experiments.items():
            try:
                result.append(Run(name, {**spec, **change}, Path(out), former_names(name, former)))
            except SpecError as error:
                raise UserError(f"experiment {name}: {error}") from None
    return result


def parse_cohort(text: str) -> int:
    """How many runs are trained together: '4' is 4, 'off' is 1."""
    if text == "off":
        return 1
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise UserError(f"--cohort {text}, expected off, or how many runs at once, at most 256")
    return int(text)


def chosen(
    project: Project, words: Iterable[str], values: Mapping[str, Any], seeds: Sequence[int] | None, out: str | Path
) -> list[Run]:
    """The runs that a command line asks for.

    Args:
        words: names, and keys with their values. Without a name, the default suite is meant.
        values: of the keys that were given as options.

    Raises:
        UserError: a word is unknown, a key is given twice, or a spec is not valid.
    """
    suites, known = project.named, catalog(project.named)
    given = split_words(words, known)
    if twice := values.keys() & (given.values.keys() | given.axes.keys()):
        raise UserError(f"{min(twice)} is given twice, once as an option")
    if "seed" in given.values and seeds is not None:
        raise UserError("seed is given twice, once as --seeds")
    members: Experiments = {}
    for word in given.names or [project.default]:
        if word not in known:
            written = dict.fromkeys([*suites, *(name for suite in suites.values() for name in suite)])
            raise UserError(f"unknown experiment {word!r}{nearest(word, list(written))}")
        for name, spec in known[word].items():
            fixed = {key: value for key, value in spec.items() if key not in given.axes}
            members |= expand(name, fixed | given.axes)
    return runs(members, {**values, **given.values}, seeds, out, project.former)
