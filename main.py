"""The command line: run (the default), evaluate, verify, list, report."""

import gc
import time

CLOCK_START = time.perf_counter()  # before the imports, which are part of the time to the first step
gc.disable()  # until torch is imported: to search what it makes for garbage, again and again, takes 0.3 s

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

from core.data import cifar10  # noqa: E402
from core.report import stats  # noqa: E402
from core.report.rebuild import rebuild  # noqa: E402
from core.runs import files, store  # noqa: E402
from core.runs.record import METRICS, check, read_record  # noqa: E402
from core.runs.record import records as read_records  # noqa: E402
from core.spec import Spec, SpecError, nearest, resolve, spec_id  # noqa: E402
from experiments import DEFAULT, EXPERIMENTS, SUITES  # noqa: E402

ROOT = Path(__file__).resolve().parent
COMMANDS = ("run", "evaluate", "verify", "list", "report")
console = Console(highlight=False, markup=False)
errors = Console(stderr=True, highlight=False, markup=False)


class UserError(Exception):
    """What a user can cause and mend: one sentence and exit status 2."""


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, as everything here does; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="main.py", description="CIFAR-10 with fully connected networks.")
    commands = top.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    shared = Parser(add_help=False)
    shared.add_argument("--out", type=Path, default=".", metavar="DIR", help="where results.md and checkpoints/ are")
    machine = Parser(add_help=False)
    machine.add_argument("--data", type=Path, default=ROOT / "data", metavar="DIR", help="where CIFAR-10 is, or goes")
    machine.add_argument(
        "--data-url",
        default=os.environ.get("CIFAR10_URL"),
        metavar="URL",
        help="address of cifar-10-python.tar.gz to try before the mirrors (also $CIFAR10_URL)",
    )
    machine.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    step = Parser(add_help=False)
    step.add_argument("--no-compile", action="store_true", help="run the train step eager")

    run = commands.add_parser("run", parents=[shared, machine, step], help="train experiments (the default)")
    run.add_argument("names", nargs="*", metavar="NAME", help=f"experiments or suites; the suite {DEFAULT} if none")
    run.add_argument("--epochs", type=int, metavar="N")
    run.add_argument("--batch-size", type=int, metavar="N")
    run.add_argument("--lr", type=float, metavar="X")
    run.add_argument("--seed", type=int, metavar="N")
    run.add_argument("--checkpoint-every", type=int, default=1, metavar="N", help="epochs between resume points")
    run.add_argument("--force", action="store_true", help="train from the start, even what is finished")
    run.add_argument("--resume-anyway", action="store_true", help="resume even where the bits will differ")

    evaluate = commands.add_parser("evaluate", parents=[shared, machine], help="evaluate checkpoints on the test split")
    evaluate.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="all under --out if none")
    evaluate.add_argument("--json", action="store_true", help="one JSON object a line")

    verify = commands.add_parser(
        "verify", parents=[shared, machine, step], help="train again elsewhere, compare the bits"
    )
    verify.add_argument("names", nargs="+", metavar="NAME")

    commands.add_parser("list", help="show the suites and their specs")
    commands.add_parser("report", parents=[shared], help="rebuild results.md from the records")
    return top


def chosen(names: list[str], overrides: dict[str, Any]) -> list[tuple[str, Spec]]:
    """The experiments of these names (or suites), resolved; all are checked before anything starts."""
    picked: list[str] = []
    for name in names or [DEFAULT]:
        if name not in EXPERIMENTS and name not in SUITES:
            raise UserError(f"unknown experiment {name!r}{nearest(name, list(EXPERIMENTS | SUITES))}")
        picked += [name] if name in EXPERIMENTS else list(SUITES[name])
    return [(name, resolved(name, overrides)) for name in dict.fromkeys(picked)]


def resolved(name: str, overrides: dict[str, Any] | None = None) -> Spec:
    """The whole spec of an experiment."""
    try:
        return resolve({**EXPERIMENTS[name], **(overrides or {})})
    except SpecError as error:
        raise UserError(f"experiment {name}: {error}") from None


class Stop:
    """SIGINT and SIGTERM: the first asks the run to save and stop, the second stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self.stepping = False  # before the first step there is nothing to save

    def __call__(self) -> bool:
        return self.requested

    def _handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            if console.is_terminal:
                os.write(1, b"\x1b[?25h\n")  # the progress bar hid the cursor
            os._exit(128 + signum)
        self.requested = True
        if not self.stepping:
            raise KeyboardInterrupt

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)


@contextlib.contextmanager
def progress_bar(name: str, stop: Stop) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener that shows a run live: a bar, a line an epoch when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # Two refreshes a second: more would take time from the two cores that train.
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bars:
        task = bars.add_task(name, total=None, note="compiling")

        def listen(event: str, details: dict[str, Any]) -> None:
            if event == "step":
                bars.update(task, completed=details["step"])
            elif event == "first_step":
                stop.stepping = True
                bars.update(task, total=details["total"], note="")
                console.print(f"{name}: first step {details['seconds']:.1f} s after the start of the process")
            elif event == "resumed":
                bars.update(task, completed=details["step"])
                bits = f", not bitwise: {details['different']}" if details["different"] else ""
                console.print(f"{name}: resumed after step {details['step']} (epoch {details['epoch']}){bits}")
            elif event == "epoch":
                note = f"validation {100 * details['val_accuracy']:.2f}%"
                bars.update(task, note=note)
                console.print(
                    f"{name}: epoch {details['epoch']}: train loss {details['train_loss']:.4f}, {note}, "
                    f"{details['samples_per_second'] or 0:,} samples/s"
                )
            else:  # damaged, eager
                errors.print(f"{name}: {details['reason']}", soft_wrap=True)

        yield listen


def load_data(args: argparse.Namespace) -> cifar10.Cifar10:
    bar: dict[str, Any] = {}
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bars:

        def show(what: str, done: int, total: int) -> None:
            if what not in bar:
                bar[what] = bars.add_task(what, total=total)
            bars.update(bar[what], completed=done)

        return cifar10.load(args.data, args.data_url, show)


def train_all(args: argparse.Namespace, experiments: list[tuple[str, Spec]]) -> int:
    """Train what is not finished yet; returns the exit status."""
    todo = []
    # So that an --out that cannot be written and a record that cannot be read are known before the training, too.
    files.sweep_all(args.out)
    read_records(args.out)
    for name, spec in experiments:
        run = files.Run(args.out, name, spec_id(spec))
        record = run.finished()
        if record and not args.force:
            accuracy = stats.percent(record["metrics"]["test"]["accuracy"])
            line = f"{name} ({run.spec_id}) is finished: {accuracy} test accuracy; --force trains it again"
            console.print(line, soft_wrap=True)
        else:
            todo.append((name, spec, run))
    status = 0
    if todo:
        stop = Stop()
        stop.install()
        try:
            trainer = Trainer(args, stop, first=todo[0][1])
            for name, spec, run in todo:
                status = max(status, trainer(name, spec, run))
                if stop():  # too late for this run, which is finished
                    raise KeyboardInterrupt(f"stopped after {name}")
        except KeyboardInterrupt as error:
            status = 130
            errors.print(
                f"{error}; {how_to_go_on(args)}" if str(error) else "stopped before the first step", soft_wrap=True
            )
    table(rebuild(args.out, EXPERIMENTS), {spec_id(spec) for _, spec in experiments})
    return status


def how_to_go_on(args: argparse.Namespace) -> str:
    if args.command == "verify":
        return "nothing of it is kept"
    return "without --force, " * args.force + "the same command goes on from there"


class Trainer:
    """Trains one experiment after another on one device, over one copy of the data."""

    def __init__(self, args: argparse.Namespace, stop: Stop, first: Spec) -> None:
        if args.checkpoint_every < 1:
            raise UserError(f"--checkpoint-every {args.checkpoint_every}, expected at least 1")
        from core import train
        from core.compile import fused
        from core.compile.device import pick_device, place

        gc.enable()
        try:
            self.device = pick_device(args.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        problem = fused.compiler_problem(self.device)
        if problem and not args.no_compile:
            errors.print(f"{problem}: the train step runs eager, which is slower")
        self.compiled = not (args.no_compile or problem)
        if self.compiled and self.device.type == "cpu":
            with contextlib.suppress(RuntimeError, MemoryError, OSError):  # which the run will meet again, and say
                train.compile_ahead(first)
        self.data = place(load_data(args), self.device)
        self.args, self.stop = args, stop

    def __call__(self, name: str, spec: Spec, run: files.Run) -> int:
        """Train one experiment; returns the exit status.

        Raises:
            KeyboardInterrupt: a signal asked to stop.
        """
        import torch

        from core.runs.provenance import environment
        from core.train import Diverged, Interrupted, ResumeError, Training, fail

        try:
            with run.lock(), progress_bar(name, self.stop) as listen:
                if self.args.force:  # what is finished stays until it is replaced
                    store.delete(*run.resume_points())
                elif run.finished():
                    console.print(f"{name} was finished by another process meanwhile")
                    return 0
                try:
                    Training(
                        run,
                        name,
                        spec,
                        self.data,
                        self.device,
                        compiled=self.compiled,
                        every=self.args.checkpoint_every,
                        listen=listen,
                        should_stop=self.stop,
                        loosely=self.args.resume_anyway,
                        clock_start=CLOCK_START,
                    )()
                    return 0
                except (Diverged, torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if isinstance(error, RuntimeError) and "memory" not in str(error):
                        raise  # what a CPU allocator raises says so only in its message
                    reason = str(error) if isinstance(error, Diverged) else f"out of memory on {self.device}"
                    fail(run, name, spec, environment(self.device, self.compiled), reason)
                    errors.print(f"{name} failed: {reason}", soft_wrap=True)
                    return 1
        except store.Held as holder:
            errors.print(f"{name} is being trained by {holder}; taking the next one", soft_wrap=True)
            return 0
        except Interrupted as error:
            raise KeyboardInterrupt(f"{name} {error}") from None
        except ResumeError as error:
            errors.print(f"error: {error}", soft_wrap=True)
            return 2
        finally:
            self.stop.stepping = False


def table(records: list[dict[str, Any]], ids: set[str]) -> None:
    """Print the runs of these spec ids."""
    shown = Table(
        "experiment", "lr", "epochs", "train", "validation", "test", "95%", "samples/s", box=None, pad_edge=False
    )
    for record in records:
        if record["spec_id"] in ids and record["status"] == "finished":
            train, validation, test = (record["metrics"][split] for split in ("train", "validation", "test"))
            low, high = stats.interval(test["accuracy"], test["n"])
            shown.add_row(
                record["name"],
                f"{record['spec']['lr']:g}",
                str(record["spec"]["epochs"]),
                *(stats.percent(split["accuracy"]) for split in (train, validation, test)),
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{stats.speed(record):,}",
            )
    if shown.rows:
        console.print(shown)


def run_command(args: argparse.Namespace) -> int:
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    return train_all(args, chosen(args.names, {key: value for key, value in options.items() if value is not None}))


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluate checkpoints on the test split; 1 where one differs from what its run recorded."""
    from core import predict
    from core.compile.device import pick_device, place

    gc.enable()
    paths = args.checkpoints or [
        p for p in sorted((args.out / "checkpoints").glob("*/*.safetensors")) if ".step-" not in p.name
    ]
    if not paths:
        raise UserError(f"no checkpoint under {args.out / 'checkpoints'}; `uv run main.py` trains some")
    try:
        device = pick_device(args.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    networks = [predict.load(path, device) for path in paths]
    records = [recorded(path, net) for path, net in zip(paths, networks, strict=True)]
    data = place(load_data(args), device)
    status = 0
    for path, net, (test, digest) in zip(paths, networks, records, strict=True):
        result = net.evaluate(data.test_images, data.test_labels)
        same = (
            digest == net.digest()
            and result["correct"] == test["correct"]
            and abs(result["loss"] - test["loss"]) < 1e-4
        )
        status = max(status, 0 if same else 1)
        if args.json:
            line = {
                "checkpoint": str(path),
                "experiment": net.meta["name"],
                "seed": net.meta["seed"],
                "test_accuracy": result["accuracy"],
                "test_loss": result["loss"],
                "n": result["n"],
                "recorded_test_accuracy": test["accuracy"],
            }
            print(json.dumps(line))
            continue
        low, high = stats.interval(result["accuracy"], result["n"])
        verdict = f"the run recorded {stats.percent(test['accuracy'])}, {test['loss']:.4f}, weights {digest[:12]}"
        console.print(
            f"{net.meta['name']} ({path}): {stats.percent(result['accuracy'])} of {result['n']:,} test images "
            f"(95% interval {100 * low:.2f}-{100 * high:.2f}%), loss {result['loss']:.4f}; "
            + ("as recorded" if same else verdict),
            soft_wrap=True,
        )
        classes = zip(cifar10.CLASSES, result["correct"], result["count"], strict=True)
        accuracies = ", ".join(f"{label} {100 * hit / count:.1f}%" for label, hit, count in classes)
        console.print(f"  {accuracies}", soft_wrap=True)
    return status


def recorded(path: Path, net: Any) -> tuple[dict[str, Any], str]:
    """The test metrics and the digest of the weights in the record beside a checkpoint; where there is none, those that
    the checkpoint has of itself."""
    expected = {"name": str, "seed": int, "digest": str, "test": METRICS}
    try:
        check(net.meta, expected)
    except ValueError as error:
        raise UserError(f"{path} does not hold what its run recorded: {error}") from None
    beside = path.with_suffix(".json")
    record = read_record(beside) if beside.exists() else None
    if record and record["status"] == "finished":
        return record["metrics"]["test"], record["digest"]
    return net.meta["test"], net.meta["digest"]


def verify_command(args: argparse.Namespace) -> int:
    """Train finished runs again in a folder of their own and compare the bits of the weights with the records."""
    from core.runs.provenance import difference

    status = 0
    for name, spec in chosen(args.names, {}):
        path = files.Run(args.out, name, spec_id(spec)).record
        record = read_record(path) if path.exists() else None
        if not record or record["status"] != "finished":
            raise UserError(f"{name} has no finished run under {args.out}; `uv run main.py run {name}` trains it")
        with tempfile.TemporaryDirectory() as elsewhere:
            again = argparse.Namespace(**vars(args), checkpoint_every=10**9, force=False, resume_anyway=False)
            again.out = Path(elsewhere)
            again.no_compile = args.no_compile or record["environment"]["mode"] == "eager"
            if failed := train_all(again, [(name, spec)]):
                return failed
            new = read_record(files.Run(again.out, name, spec_id(spec)).record)
        same = new["digest"] == record["digest"]
        status = max(status, 0 if same else 1)
        verdict = "the same bits" if same else "DIFFERENT bits"
        console.print(f"{name}: {verdict}: {new['digest']}, recorded {record['digest']}", soft_wrap=True)
        changed = difference(record["environment"], new["environment"])
        if not record["bitwise"]:
            changed = "been resumed with --resume-anyway"
        if not same and changed:
            console.print(f"{name}: no wonder, since the recorded run had {changed}", soft_wrap=True)
    return status


def list_command(args: argparse.Namespace) -> int:
    for suite, specs in SUITES.items():
        console.print(f"{suite}{' (the default)' if suite == DEFAULT else ''}")
        for name, spec in specs.items():
            console.print(f"  {name}  {spec_id(resolved(name))}  {spec}", soft_wrap=True)
    console.print(f"every other key: {resolve({})}", soft_wrap=True)
    return 0


def report_command(args: argparse.Namespace) -> int:
    count = len(rebuild(args.out, EXPERIMENTS))
    console.print(f"{args.out / 'results.md'} rebuilt from {count} records", soft_wrap=True)
    return 0


def main(argv: list[str]) -> int:
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    try:
        args = parser().parse_args(argv)
        status = globals()[f"{args.command}_command"](args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (UserError, cifar10.DataError, store.StoreError, OSError) as error:
        errors.print(f"error: {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("stopped")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
