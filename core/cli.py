"""The command line: words to a command and its options."""

import argparse

from core.commands import evaluate, export, listing, options, predict, report, run, verify
from core.plan import Project

COMMANDS = (run, evaluate, predict, export, verify, listing, report)  # each with add_parser, and execute in `args.do`


def parse(argv: list[str], project: Project) -> argparse.Namespace:
    """The command that is asked for, in `do`, and its options. Without a command it is `run`.

    Raises:
        core.errors.UserError: an option is unknown, or has a value that it does not take.
    """
    top = options.Parser(prog="main.py", description="CIFAR-10 with fully connected networks.")
    commands = top.add_subparsers(dest="command")
    for command in COMMANDS:
        command.add_parser(commands, project).set_defaults(do=command.execute)
    named = argv[:1] and argv[0] in (*commands.choices, "-h", "--help")
    return top.parse_args(argv if named else ["run", *argv])
