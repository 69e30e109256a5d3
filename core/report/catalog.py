"""What a report knows of experiments/."""

from collections.abc import Mapping
from typing import NamedTuple

from core.errors import UserError
from core.spec import Spec, SpecError, resolve


class Catalog(NamedTuple):
    """The experiments of a project.

    Attributes:
        suites: for each suite the specs of its experiments by name; grids are expanded.
        ablations: for each suite that is an ablation, the names of its "plain" and its "full" experiment, or of one of
            them. The other experiments of the suite are compared with these.
        default: the suite that comes first in a report.
        former: old names, with the new names.
    """

    suites: Mapping[str, Mapping[str, Spec]] = {}
    ablations: Mapping[str, Mapping[str, str]] = {}
    default: str = ""
    former: Mapping[str, str] = {}

    def spec(self, name: str) -> Spec | None:
        """The resolved spec of an experiment; None if there is no such experiment, or its spec is invalid."""
        given = [specs[name] for specs in self.suites.values() if name in specs]
        try:
            return resolve(given[-1]) if given else None
        except SpecError:  # its runs are older than what is wrong in it
            return None

    def check(self) -> None:
        """Raise UserError if an ablation names a suite or an experiment that does not exist."""
        for suite, ends in self.ablations.items():
            if suite not in self.suites:
                raise UserError(f"ABLATIONS in experiments/ names the suite {suite!r}, but there is no such suite")
            if not (ends.keys() <= {"plain", "full"} and self.suites[suite].keys() >= set(ends.values())):
                raise UserError(
                    f"ABLATIONS in experiments/ says {dict(ends)} for the suite {suite!r}; expected plain, full or "
                    "both, each with an experiment of this suite"
                )
