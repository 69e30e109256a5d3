"""run: train what is not finished yet, and rebuild results.md."""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import estimate, terminal
from core.commands import options
from core.data.datasets import Source
from core.events import Listener, Stopped
from core.listeners.progress import Display
from core.plan import Project
from core.report import stats
from core.report.rebuild import prepare, rebuild
from core.report.tables import row
from core.runs import files
from core.runs.record import Failed, Finished, Record, RecordError, read_records
from core.runs.run import OtherCode, Run
from core.signals import Stop
from core.spec import static_key
from core.tally import Tally
from core.terminal import say, warn

if TYPE_CHECKING:  # it imports torch
    from core.schedule import Executor, Group, Result, ShouldStop

HELP = "train experiments (the default)"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parents = [options.shared(), options.machine(project), options.training(), options.settings()]
    parser = commands.add_parser("run", parents=parents, help=HELP)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME|KEY=VALUE",
        help=f"experiments, grids or suites (by default the suite {project.default}), and keys of the spec to change, "
        "such as lr=3e-4, widths=512,256 or activation=relu,gelu (a grid); list --keys shows all keys",
    )
    parser.add_argument(
        "--force", action="store_true", help="train again; the old result stays until the new one exists"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a run, on stdout; messages go to stderr")
    parser.add_argument("--tensorboard", action="store_true", help="also write DIR/tensorboard for TensorBoard")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    with stop.quick_imports():  # of torch, to read --data-folder
        source = options.source(args)
        runs = options.chosen(args, project, source)
    if args.dry_run:
        options.no_effect(args, **options.reasons_without_effect(args))
        return dry_run(args, runs, source, stop)
    catalog = project.catalog()
    prepare(args.out, catalog)  # fails now, not after the training, if --out cannot be written
    tally, todo = Tally(runs), []
    for run, result in with_results(args, runs, source, tally):
        if result:
            tally.add(result, title=run.title)
            if args.json:
                terminal.as_json(row(result))
        else:
            todo.append(run)
    say_no_effect(args, todo, tally.several)
    status = 0 if tally.done + len(todo) == len(runs) else 2
    say_finished(tally)
    if todo:
        before = tally.done
        made, _ = train(args, todo, source, Display(tally, args.verbose, args.ray is not None), stop)
        status = made or status
        if status == 130 and tally.done == before:  # nothing new to report, and the user waits
            return status
    rebuild(args.out, catalog, args.data)
    terminal.table(tally)
    return status


def with_results(
    args: argparse.Namespace, runs: list[Run], source: Source, tally: Tally
) -> Iterator[tuple[Run, Finished | None]]:
    """Each run, with its result if it is finished. Reports and skips a run whose record cannot be read or is of other
    code."""
    in_progress, other_code = files.in_progress(args.out), []
    for run in runs:
        try:
            data = source.identity(run.spec["dataset"])
            result = run.result() if args.force else run.finished(data, in_progress)
        except RecordError as error:
            warn(f"error: {error}")
            tally.leave_out(run)
        except OtherCode:
            other_code.append(run)
            tally.leave_out(run)
        else:
            yield run, None if args.force else result
    if other_code:
        count = "1 finished run is" if len(other_code) == 1 else f"{len(other_code):,} finished runs are"
        warn(
            f"{count} of other code, which gives other numbers ({options.labels(other_code)}): neither counted as "
            "results of this code nor replaced; --force trains them anew"
        )


def say_no_effect(args: argparse.Namespace, todo: Sequence[Run], several: bool) -> None:
    """Say which options change nothing, now that it is known which runs are trained. If all are finished, a line says
    so already."""
    if not todo:
        return
    in_progress = files.in_progress(args.out)
    resumable = any(run.is_in_progress(in_progress) for run in todo)
    replaced = resumable or any(run.record.exists() for run in todo)
    shapes = {(static_key(run.spec), run.spec["epochs"]) for run in todo}
    reasons: dict[str, str | bool] = {
        "cohort": len(shapes) == len(todo) and "no two runs can be trained together",
        "resume_anyway": (args.force and "with --force, every run starts anew")
        or (not resumable and "there is nothing to resume"),
        "force": not replaced and "there is no result to replace",
        "verbose": not several and "a single run shows its epochs without it",
    }
    options.no_effect(args, **reasons | options.reasons_without_effect(args))


def say_finished(tally: Tally) -> None:
    if tally.done and tally.several:
        say(f"{tally.done:,} of {tally.total:,} runs are finished already; --force trains them again")
    elif tally.done:
        [(name, [result])] = tally.results.items()
        accuracy = stats.percent(result.metrics.test.accuracy)
        say(f"{name} ({result.spec_id}) is finished: {accuracy} test accuracy; --force trains it again")


def train(
    args: argparse.Namespace, runs: list[Run], source: Source, display: Display, stop: Stop
) -> tuple[int, list[Record]]:
    """Train, report what failed or was skipped, and return the exit status and the records.

    Args:
        args: has the options of options.machine and options.training, `force` and `tensorboard`.
        display: has a tally that counts the runs.
    """
    with stop.quick_imports():
        from core import schedule

        listeners = list[Listener]()
        if args.tensorboard:
            from core.listeners.tensorboard import TensorBoard

            listeners.append(TensorBoard(args.out))
    status, tally, records = 0, display.tally, list[Record]()
    if args.ray:  # one data set after the other
        runs = sorted(runs, key=lambda run: run.spec["dataset"])
    with display:
        listeners += [display, stop.listen]
        for result in schedule.train_all(runs, executor(args, source, stop), listeners, stop, args.cohort):
            if isinstance(result, Record):
                records.append(result)
                if args.json:
                    terminal.as_json(row(result))
            match result:
                case Failed():
                    status = 1
                case schedule.Skipped():
                    warn(f"{result.run.label} is being trained by {result.reason}; taking the next one")
                case schedule.Interrupted():
                    status = 130
                    again = "the same command goes on from there"
                    if args.force:
                        again = f"without --force, {again}"
                    if args.ray:
                        done = f"{tally.done:,} of {tally.total:,} done"
                        warn(f"stopped with {done}, and nothing kept of the others; {again}")
                    else:
                        terminal.interrupted(result, tally, again)
    return status, records


def executor(args: argparse.Namespace, source: Source, stop: Stop, **more: Any) -> "Executor[Record]":
    """Trains in this process or on a Ray cluster. A data set is loaded when its first run starts.

    Args:
        more: options of core.session.run_cohort for the runs of this process.
    """
    from core import schedule, session

    on_device = options.data_on_device(args, source)
    settings = {
        "checkpoint_every": args.checkpoint_every,
        "force": args.force,
        "exact": not args.resume_anyway,
        **more,
    }

    def train(group: "Group", **how: Any) -> "Sequence[Record | Stopped]":
        data, device = on_device(name := group[0].spec["dataset"])
        return session.run_cohort(group, data, device, compiled=options.compiled(args, name), **settings, **how)

    def on_cluster(
        groups: "Iterable[Group]", listener: Listener, should_stop: "ShouldStop"
    ) -> "Iterator[Result[Record]]":
        with stop.quick_imports():
            from core import remote
        for name, members in itertools.groupby(groups, lambda group: group[0].spec["dataset"]):
            data, compiled = source.load(name), options.compiled(args, name)
            yield from remote.train(
                members, data, args.ray, args.device, compiled, args.force, listener, on_notice=warn
            )

    here: Executor[Record] = schedule.one_after_another(train)
    return on_cluster if args.ray else here


def measured(stop: Stop, out: Path, device: str = "auto", threads: int | None = None) -> estimate.Measured:
    """The times that this machine has measured with `threads` (default: PyTorch's number), from records under `out`."""
    with stop.quick_imports():
        from torch import get_num_threads

        from core.compile.device import pick_device
        from core.runs import provenance
    name = provenance.device_name(pick_device(device))
    return estimate.Measured(read_records(out), name, threads or get_num_threads())


def dry_run(args: argparse.Namespace, runs: list[Run], source: Source, stop: Stop) -> int:
    """Show each run with its time and disk space; write nothing."""
    known = measured(stop, args.out, args.device, 1 if args.ray else None)
    todo = []
    for run, result in with_results(args, runs, source, Tally(runs)):
        if not result:
            todo.append(run.spec)
        estimated = known.estimate([] if result else [run.spec], not args.no_compile)
        if args.json:
            terminal.estimate_as_json(run, estimated, status="finished" if result else "to train")
        else:
            say(f"{run.label}  {run.id}  {'finished' if result else terminal.estimate(estimated)}")
    total = terminal.estimate(known.estimate(todo, not args.no_compile), while_trained=True)
    say(f"{len(runs):,} runs, {len(todo):,} to train: {total}")
    return 0
