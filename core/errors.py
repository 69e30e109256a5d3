"""The base of every error that is one sentence for the user."""

import os
import traceback
from itertools import takewhile

CORE = os.path.join(os.path.dirname(__file__), "")


class UserError(Exception):
    """What a user, a file or the environment can cause. The message is one sentence: what was found, what was expected,
    and what to do next. Where a sentence is not enough, each further argument is a line below it. The command line
    prints it without a traceback and exits with status 2."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of the traceback: the line that called core, then the message."""
        frames = traceback.extract_tb(self.__traceback__)
        callers = [tuple(frame) for frame in takewhile(lambda frame: not frame.filename.startswith(CORE), frames)]
        return ["".join(traceback.format_list(callers[-1:])) + f"{type(self).__name__}: {self}"]
