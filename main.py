"""The commands: run (the default), evaluate, predict, export, verify, list, report."""

import contextlib
import os
import signal
import sys
import time
from typing import Any

STARTED = time.perf_counter()
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_at_once(number: int, frame: Any) -> None:
    """Handle a signal while modules are imported: an exception could be swallowed there, or leave half a module."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)


def handle(handler: Any) -> dict[int, Any]:
    """Set the handler of all signals that stop a run; returns the handlers before. nohup has SIGHUP ignored."""
    before = {number: signal.getsignal(number) for number in STOPS}
    return {number: signal.signal(number, handler) for number in STOPS if before[number] != signal.SIG_IGN}


if __name__ == "__main__":  # until there is something to stop, a signal ends the process without a traceback
    handle(end_at_once)

import argparse
import atexit
import gc
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
if sys.flags.safe_path:  # PYTHONSAFEPATH or python -P: this folder is not in the path
    sys.path.insert(0, str(ROOT))

from core import cli, estimate, plan, terminal
from core.data import cifar10
from core.errors import UserError
from core.mode import Mode
from core.report.catalog import Catalog
from core.report.rebuild import prepare, rebuild
from core.runs import files
from core.runs.record import Finished, Record, RecordError, read_records
from core.spec import resolve, spec_id
from core.store import Held, StoreError
from core.tally import Tally
from core.terminal import say, warn
from experiments import ABLATIONS, DEFAULT, FORMER_NAMES, SUITES


def new_name(word: str) -> str:
    """The name to use for a word of the command line. An old name still works."""
    if word not in FORMER_NAMES:
        return word
    warn(f"{word} has a new name: {FORMER_NAMES[word]}")
    return FORMER_NAMES[word]


def chosen(args: argparse.Namespace) -> list[plan.Run]:
    """The runs that a command asks for; all are checked before anything starts."""
    options = {key: getattr(args, key) for key in cli.OVERRIDES if getattr(args, key) is not None}
    words = plan.split_words(map(new_name, args.names), plan.catalog(SUITES))
    if twice := options.keys() & (words.values.keys() | words.axes.keys()):
        raise UserError(f"{min(twice)} is given twice, once as an option")
    if "seed" in words.values and args.seeds is not None:
        raise UserError("seed is given twice, once as --seeds")
    picked = plan.pick(SUITES, words.names or [DEFAULT])
    members: plan.Experiments = {}
    for name, spec in picked.items():
        fixed = {key: value for key, value in spec.items() if key not in words.axes}
        members |= plan.expand(name, fixed | words.axes)
    return plan.runs(members, options | words.values, args.seeds)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch without garbage collection: to search what it makes again and again takes 0.3 s. A signal ends the
    process."""
    before = handle(end_at_once)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for number, handler in before.items():
            signal.signal(number, handler)


def load_data(args: argparse.Namespace) -> cifar10.Cifar10:
    with terminal.fetching() as progress:
        return cifar10.load(args.data, args.data_url, progress)


def train(
    args: argparse.Namespace, runs: list[plan.Run], display: terminal.Display, do: Callable[..., Any], **options: Any
) -> Iterator[Any]:
    """Call `do`, which takes what core.session.run_cohort takes, for groups of runs over one copy of the data, and
    yield each of the things it returns. A run that another process is at work on is left out.

    Raises:
        KeyboardInterrupt: a signal asked to stop; the message says what is saved, if anything is.
    """
    stop = display.stop
    stop.install()
    with quick_imports():
        from core.session import Interrupted, TooLarge, prepare
    data, device = prepare(args.device, lambda: load_data(args))
    groups = deque(plan.cohorts(runs, args.cohort))
    while groups:
        group = groups.popleft()
        labels = [display.tally.label(name, spec["seed"]) for name, spec in group]
        try:
            with display.run(labels) as listeners:
                ended = do(group, args.out, data, device, listeners, stop, compiled=not args.no_compile, **options)
        except (Held, TooLarge) as error:
            if len(group) > 1:  # some of them, or all one by one, may do
                groups.extendleft([run] for run in reversed(group))
            else:
                leave_out(display.tally, group[0], error)
            continue
        except Interrupted as error:
            raise KeyboardInterrupt(str(error)) from None
        yield from ended
        if stop():  # too late for these runs, which have ended
            raise KeyboardInterrupt(f"stopped after {labels[-1]}")


def leave_out(tally: Tally, run: plan.Run, held: UserError) -> None:
    name, spec = run
    warn(f"{tally.label(name, spec['seed'])} is being trained by {held}; taking the next one")


def train_on_cluster(args: argparse.Namespace, runs: list[plan.Run], display: terminal.Display) -> Iterator[Record]:
    """Have a Ray cluster train runs; yield their records as they come."""
    display.stop.install()
    with quick_imports():
        from core import remote
    data, groups = load_data(args), plan.cohorts(runs, args.cohort)
    with display.cluster() as ended:
        for record in remote.train(
            groups,
            args.out,
            data,
            args.ray,
            args.device,
            compiled=not args.no_compile,
            force=args.force,
            on_held=partial(leave_out, display.tally),
            on_notice=warn,
        ):
            ended()
            yield record


def run_command(args: argparse.Namespace) -> int:
    """Train what is not finished yet, and rebuild results.md."""
    runs = chosen(args)
    if args.checkpoint_every < 1:
        raise UserError(f"--checkpoint-every {args.checkpoint_every}, expected at least 1")
    if args.dry_run:
        return dry_run(args, runs)
    prepare(args.out, catalog())  # an --out that cannot be written is found before the training, not after it
    display, todo = terminal.Display(runs, args.verbose, STARTED), []
    for run, record in with_results(args, runs, display.tally):
        if record:
            display.tally.add(record)
        else:
            todo.append(run)
    status = 0 if display.tally.done + len(todo) == len(runs) else 2
    display.found()
    if todo:
        before = display.tally.done
        status = train_and_tell(args, todo, display) or status
        if status == 130 and display.tally.done == before:  # nothing to report, and whoever has stopped it waits
            return status
    rebuild(args.out, catalog(), args.data)
    terminal.table(display.tally)
    return status


def with_results(
    args: argparse.Namespace, runs: list[plan.Run], tally: Tally
) -> Iterator[tuple[plan.Run, Finished | None]]:
    """The runs, each with its result if it need not be trained. Names, and leaves out, those that may not be trained:
    their record cannot be read, or other code has made it."""
    begun, of_other_code = files.under_way(args.out), []
    for name, spec in runs:
        try:
            run = files.Run(args.out, name, spec_id(spec), FORMER_NAMES)
            result = run.result() if args.force else run.finished(cifar10.DIRECTORY_HASH, begun)
        except RecordError as error:
            warn(f"error: {error}")
            tally.leave_out(spec)
        except files.OtherCode:
            of_other_code.append(tally.label(name, spec["seed"]))
            tally.leave_out(spec)
        else:
            yield (name, spec), None if args.force else result
    terminal.other_code(of_other_code)


def train_and_tell(args: argparse.Namespace, runs: list[plan.Run], display: terminal.Display) -> int:
    """Train; returns the exit status."""
    with quick_imports():
        from core.session import run_cohort
    status = 0
    options = {"checkpoint_every": args.checkpoint_every, "force": args.force, "allow_inexact": args.resume_anyway}
    try:
        trained = (
            train_on_cluster(args, runs, display) if args.ray else train(args, runs, display, run_cohort, **options)
        )
        for record in trained:
            display.ended(record)
            status = status if isinstance(record, Finished) else 1
    except KeyboardInterrupt as error:
        again = "without --force, " * args.force + "the same command goes on from there"
        done = f"{display.tally.done:,} of {display.tally.total:,} done"
        said = str(error) or f"stopped between two runs, {done}" * bool(display.tally.done)
        said = f"stopped with {done}, and nothing kept of the others" if args.ray else said
        warn(f"{said}; {again}" if said else "stopped before the first step")
        status = 130
    return status


def measured(out: Path, device: str = "auto", threads: int | None = None) -> estimate.Measured:
    """What this machine has measured with so many threads, by default PyTorch's, from the records under `out`."""
    with quick_imports():
        from torch import get_num_threads

        from core.compile.device import pick_device
        from core.runs import provenance
    name = provenance.device_name(pick_device(device))
    return estimate.Measured(read_records(out), name, threads or get_num_threads())


def dry_run(args: argparse.Namespace, runs: list[plan.Run]) -> int:
    """Show each run with what it will take; write nothing."""
    known, tally = measured(args.out, args.device, 1 if args.ray else None), Tally(runs)
    mode, todo = Mode("eager" if args.no_compile else "compiled"), []
    for (name, spec), done in with_results(args, runs, tally):
        todo += [] if done else [spec]
        found = "finished" if done else terminal.estimate(known.estimate([spec], mode))
        say(f"{tally.label(name, spec['seed'])}  {spec_id(spec)}  {found}")
    total = known.estimate(todo, mode)
    say(f"{len(runs):,} runs, {len(todo):,} to train: {terminal.estimate(total, while_trained=True)}")
    return 0


def weights(args: argparse.Namespace, word: str) -> Path:
    """The file of weights that a word means."""
    name = new_name(word)
    return files.find_weights(args.out, name, args.seed, plan.experiments(SUITES).get(name), FORMER_NAMES)


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluate checkpoints on the test split; 1 where one differs from what its run recorded, 2 where one, or its
    record, cannot be read."""
    with quick_imports():
        from core import predict
        from core.session import prepare
    paths = [weights(args, word) for word in args.checkpoints] or [
        p for p in sorted((args.out / "checkpoints").glob("*/*.safetensors")) if ".step-" not in p.name
    ]
    if not paths:
        raise UserError(f"no checkpoint under {args.out / 'checkpoints'}; `uv run main.py` trains some")
    status, good = 0, []
    for path in paths:  # a bad one is found before the data is read; all at once might be more than memory holds
        try:
            predict.load(path)
            predict.recorded(path)
            good.append(path)
        except StoreError as error:
            warn(f"error: {error}")
            status = 2
    if not good:
        return status
    data, device = prepare(args.device, lambda: load_data(args))
    for path in good:
        network = predict.load(path, device)
        network.about.name = FORMER_NAMES.get(network.about.name, network.about.name)
        found = predict.evaluate(path, network, data, args.tta == "flip")
        status = max(status, 0 if found.same else 1)
        (terminal.evaluation_as_json if args.json else terminal.evaluation)(path, network.about, found)
    return status


def predict_command(args: argparse.Namespace) -> int:
    """Classify image files; 2 where one cannot be read."""
    with quick_imports():
        from core import images, predict
    network = predict.load(weights(args, args.checkpoint))
    paths = images.find(args.images)
    if not args.json:
        warn(f"there are only ten classes, and every image gets one of them: {', '.join(cifar10.CLASSES)}")
    status = 0
    for path in paths:
        try:
            likeliest = predict.likeliest(network, images.read(path))
        except images.ImageError as error:
            warn(f"error: {error}")
            status = 2
        else:
            (terminal.prediction_as_json if args.json else terminal.prediction)(path, likeliest)
    return status


def export_command(args: argparse.Namespace) -> int:
    """Write the network of a checkpoint as a file for other programs."""
    with quick_imports():
        from core import export, predict
    source = weights(args, args.checkpoint)
    network = predict.load(source)
    path = args.output or source.with_suffix(export.FORMATS[args.format].suffix)
    images, what = export.check_images(args.data)
    precision, largest = export.export(network, args.format, path, images)
    within = f"within {export.TOLERANCE:g}{' of the largest logit' * (largest > 1)} on {what}"
    say(f"{path}: uint8 images [n, 3, 32, 32] -> float32 logits [n, 10], {within}")
    if precision != network.spec["precision"]:
        warn(f"its matrix products are in {precision}, those of the checkpoint in {network.spec['precision']}")
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Train finished runs again in a folder of their own and compare the bits of the weights with the records."""
    with quick_imports():
        from core.verify import read_finished, verify
    runs = chosen(args)
    recorded = [read_finished(name, spec, args.out, cifar10.DIRECTORY_HASH, FORMER_NAMES) for name, spec in runs]
    args.cohort = 1
    args.no_compile = args.no_compile or all(Mode.parse(r.environment.mode).kind == "eager" for r in recorded)
    status = 0
    display = terminal.Display(runs, args.verbose, STARTED)

    def verify_one(
        group: list[plan.Run], out: Path, data: Any, device: Any, listeners: list, *rest: Any, **options: Any
    ):
        return [verify(*group[0], out, data, device, listeners[0], *rest, **options, former=FORMER_NAMES)]

    for found in train(args, runs, display, verify_one):
        name = display.tally.label(found.recorded.name, found.recorded.seed)
        status = max(status, 0 if found.same else 1)
        if not isinstance(found.again, Finished):
            warn(f"{name} failed: {found.again.error}")
            continue
        verdict = "the same bits" if found.same else "DIFFERENT bits"
        say(f"{name}: {verdict}: {found.again.digest}, recorded {found.recorded.digest}")
        if not found.same and found.reason:
            say(f"{name}: this was to be expected, since the recorded run had {found.reason}")
    return status


def list_command(args: argparse.Namespace) -> int:
    """Show the suites, with what one seed of each experiment takes; or the keys of a spec."""
    if args.keys:
        terminal.keys()
        return 0
    found = [(suite, members, dict(plan.runs(members, {}))) for suite, members in catalog().suites.items()]
    known = measured(args.out)
    for suite, members, specs in found:
        default = " (the default)" if suite == DEFAULT else ""
        say(f"{suite}{default}: {terminal.estimate(known.estimate(specs.values()))}")
        for name, spec in specs.items():
            say(f"  {name}  {spec_id(spec)}  {terminal.estimate(known.estimate([spec]))}  {members[name]}")
    say(f"every other key: {resolve({})}")
    return 0


def catalog() -> Catalog:
    """What experiments/ says, with grids expanded."""
    expanded = plan.catalog(SUITES)
    found = Catalog({suite: expanded[suite] for suite in SUITES}, ABLATIONS, DEFAULT, FORMER_NAMES)
    found.check()
    return found


def report_command(args: argparse.Namespace) -> int:
    """Rebuild results.md, its pictures and tables from the records."""
    if not (args.out / "checkpoints").is_dir():
        raise UserError(f"there are no runs under {args.out}: it has no folder checkpoints; --out names another folder")
    count = len(rebuild(args.out, catalog(), ROOT / "data", redraw=True, group_by=args.group_by))
    say(f"{args.out / 'results.md'} rebuilt from {count} records")
    return 0


DO = {
    "run": run_command,
    "evaluate": evaluate_command,
    "predict": predict_command,
    "export": export_command,
    "verify": verify_command,
    "list": list_command,
    "report": report_command,
}


def main(argv: list[str]) -> int:
    terminal.open_standard_streams()
    handle(signal.default_int_handler)
    try:
        args = cli.parse(argv, ROOT / "data", DEFAULT)
        status = DO[args.command](args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (UserError, OSError) as error:
        terminal.fail(error)
        return 2
    except KeyboardInterrupt as error:
        warn(str(error) or "stopped")
        return 130


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status == 130:  # stopped: it would take Python a second to clear away what a compiler has left
        atexit._run_exitfuncs()
        end_at_once(signal.SIGINT, None)
    sys.exit(status)
