"""report: results.md, its pictures and tables, from the records."""

import argparse

from core.commands import options
from core.errors import UserError
from core.plan import Project
from core.report.rebuild import rebuild
from core.signals import Stop
from core.terminal import say

HELP = "rebuild results.md from the records"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("report", parents=[options.shared()], help=HELP)
    parser.add_argument("--group-by", metavar="KEY", help="add a table of means by the values of a key of the spec")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    if not (args.out / "checkpoints").is_dir():
        raise UserError(f"there are no runs under {args.out}: it has no folder checkpoints; --out names another folder")
    records = rebuild(args.out, project.catalog(), project.root / "data", redraw=True, group_by=args.group_by)
    say(f"{args.out / 'results.md'} rebuilt from {len(records)} records")
    return 0
