"""list: the suites, with the time and disk space of one seed of each experiment; or the keys of a spec."""

import argparse

from core import plan, terminal
from core.commands import options
from core.commands.run import measured
from core.plan import Project
from core.signals import Stop

HELP = "show the suites and their specs, with an estimate"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("list", parents=[options.shared()], help=HELP)
    parser.add_argument("--keys", action="store_true", help="show the keys of a spec with their meanings instead")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    if args.keys:
        options.no_effect(args, out="the keys do not depend on runs")
        terminal.keys_as_json() if args.json else terminal.keys()
        return 0
    suites = project.catalog().suites
    runs = {suite: plan.runs(members, out=args.out, former=project.former) for suite, members in suites.items()}
    known = measured(stop, args.out)
    if args.json:
        for suite, members in runs.items():
            for run in members:
                terminal.estimate_as_json(run, known.estimate([run.spec]), suite=suite)
        return 0
    terminal.suites(runs, project.default, known.estimate)
    return 0
