"""Parses the command line."""

import argparse
import tomllib

from core import commands, terminal
from core.commands.options import Parser
from core.plan import Project


def parse(argv: list[str], project: Project) -> argparse.Namespace:
    """The options of a command, and its function in `execute`. Without a command, `run` is meant.

    Raises:
        core.errors.UserError: an option is unknown or has an invalid value.
    """
    top = Parser(prog="main.py", description="CIFAR-10 with fully connected networks.")
    top.add_argument("--version", action="store_true", help="print the version, and exit")
    parsers = top.add_subparsers(dest="command")
    for command in commands.ALL:
        command.add_parser(parsers, project).set_defaults(execute=command.execute)
    has_command = argv[:1] and argv[0] in (*parsers.choices, "-h", "--help", "--version")
    args, more = top.parse_known_args(argv if has_command else ["run", *argv])
    if args.version:
        about = tomllib.loads((project.root / "pyproject.toml").read_text(encoding="utf-8"))
        terminal.say(about["project"]["version"])
        top.exit()
    default = parsers.choices[args.command].get_default
    args.given = {name for name, value in vars(args).items() if value != default(name)}  # for options.no_effect
    if more:  # argparse takes no names after options, as in: run baseline --epochs 3 lr=0.1
        key = "names" if hasattr(args, "names") else "checkpoints"
        if unknown := [word for word in more if word.startswith("-") or not hasattr(args, key)]:
            top.error(f"unrecognized arguments: {' '.join(unknown)}")
        vars(args)[key].extend(more)
    return args
