"""verify: finished runs trained again in a folder of their own, to compare the bits of the weights."""

import argparse
from collections.abc import Iterator
from typing import Any

from core import terminal
from core.commands import options
from core.listeners.progress import Display
from core.plan import Project
from core.runs.record import Finished
from core.signals import Stop
from core.tally import Tally
from core.terminal import say

HELP = "train again elsewhere, compare the bits"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parents = [options.shared(), options.machine(project), options.training()]
    parser = commands.add_parser("verify", parents=parents, help=HELP)
    parser.add_argument("names", nargs="+", metavar="NAME|KEY=VALUE")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    """Returns 1 where the bits are different."""
    with stop.quick_imports():
        from core import schedule, session
        from core.data.cifar10 import DIRECTORY_HASH
        from core.verify import Verification, check_finished, verify
    runs = options.chosen(args, project)
    for run in runs:
        check_finished(run, DIRECTORY_HASH)

    def executor(groups: Any, listener: Any, should_stop: Any) -> Iterator[Any]:
        data, device = session.prepare(args.device, lambda: options.load_data(args))

        def again(group: Any, listener: Any, should_stop: Any) -> list[Any]:
            return [verify(group[0], data, device, [listener], should_stop, compiled=not args.no_compile)]

        return schedule.one_after_another(again)(groups, listener, should_stop)

    tally, status = Tally(runs), 0
    with Display(tally, args.verbose) as display:
        for result in schedule.train_all(runs, executor, [stop.listen, display], stop):
            if isinstance(result, schedule.Interrupted):
                terminal.interrupted(result._replace(runs=()), tally, "a verification keeps nothing")
                return 130
            assert isinstance(result, Verification)
            status = max(status, 0 if result.same else 1)
            show(result)
    return status


def show(verification: Any) -> None:
    label, again, recorded = verification.run.label, verification.again, verification.recorded
    if isinstance(again, Finished):
        verdict = "the same bits" if verification.same else "DIFFERENT bits"
        say(f"{label}: {verdict}: {again.digest}, recorded {recorded.digest}")
        if not verification.same and verification.reason:
            say(f"{label}: this was to be expected, since the recorded run had {verification.reason}")
