"""How a train step was made. A record has it as text: "compiled", or "eager, cohort of 4"."""

import re
from typing import Literal, NamedTuple, cast

Kind = Literal["compiled", "unpatched", "eager"]
PATTERN = r"\A(compiled|unpatched|eager)(?:, cohort of ([1-9][0-9]{0,8}))?\Z"


class Mode(NamedTuple):
    """How a train step was made. The bits of a run may differ from mode to mode.

    Attributes:
        kind: compiled; unpatched, that is compiled without the patches of core.compile.inductor; or eager.
        cohort: the number of runs that take each step together.
    """

    kind: Kind = "compiled"
    cohort: int = 1

    def __str__(self) -> str:
        return self.kind if self.cohort == 1 else f"{self.kind}, cohort of {self.cohort}"

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """The mode of a text in a record. Raises ValueError for any other text."""
        match = re.match(PATTERN, text)
        if not match:
            raise ValueError(f"{text!r} is no mode of a step")
        return cls(cast(Kind, match[1]), int(match[2] or 1))


COMPILED = Mode("compiled")
