"""verify: trains finished runs again in a temporary folder and compares the bits of the weights."""

import argparse
from typing import TYPE_CHECKING, Any

from core.commands import options
from core.events import Stopped
from core.listeners.progress import Display
from core.plan import Project
from core.runs.record import Finished
from core.signals import Stop
from core.tally import Tally
from core.terminal import say, warn

if TYPE_CHECKING:  # it imports torch
    from core.verify import Verification

HELP = "train again elsewhere, compare the bits"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parents = [options.shared(), options.machine(project), options.compiler(), options.settings()]
    parser = commands.add_parser("verify", parents=parents, help=HELP)
    parser.add_argument("names", nargs="+", metavar="NAME|KEY=VALUE", help="finished runs, as for run")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    """Returns 1 if the bits are different."""
    with stop.quick_imports():
        from core import schedule
        from core.verify import Verification, check_finished, verify

        source = options.source(args)
        runs = options.chosen(args, project, source)
    for run in runs:
        check_finished(run, source.identity(run.spec["dataset"]))

    on_device = options.data_on_device(args, source)

    def again(group: schedule.Group, **how: Any) -> list["Verification | Stopped"]:
        data, device = on_device(name := group[0].spec["dataset"])
        return [verify(group[0], data, device, compiled=options.compiled(args, name), **how)]

    executor: schedule.Executor[Verification] = schedule.one_after_another(again)
    tally, status = Tally(runs), 0
    options.no_effect(args, verbose=not tally.several and "a single run shows its epochs without it")
    with Display(tally, args.verbose) as display:
        for result in schedule.train_all(runs, executor, [display, stop.listen], stop):
            match result:
                case schedule.Interrupted():
                    warn(f"stopped with {tally.done:,} of {tally.total:,} verified; nothing is kept of the others")
                    return 130
                case Verification():
                    status = max(status, 0 if result.same else 1)
                    show(result)
    return status


def show(verification: "Verification") -> None:
    label, again, recorded = verification.run.label, verification.again, verification.recorded
    if isinstance(again, Finished):
        digests = f"{again.digest}, recorded {recorded.digest}"
        if verification.same:
            say(f"{label}: the same bits: {digests}")
            return
        warn(f"{label}: DIFFERENT bits: {digests}")
        if verification.reason:
            warn(f"{label}: this was to be expected: the recorded run had {verification.reason}")
