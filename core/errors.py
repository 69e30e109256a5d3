"""The base of every error that is one sentence for the user."""


class UserError(Exception):
    """What a user, a file or the environment can cause. The message is one sentence: what was found, what was expected,
    and what to do next. Where a sentence is not enough, each further argument is a line below it. The command line
    prints it without a traceback and exits with status 2."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))
