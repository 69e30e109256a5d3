"""Options that several commands share, and their meaning."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from core import plan, terminal
from core.data import datasets, folder
from core.data.datasets import Source
from core.data.tensors import Data
from core.errors import UserError
from core.plan import Project
from core.runs import files
from core.runs.record import former_names, new_name
from core.runs.run import Run
from core.spec import FIELDS
from core.store import local

if TYPE_CHECKING:
    import torch

KEYS = ("epochs", "batch_size", "lr", "precision", "seed")  # keys of a spec that are options, too


class Parser(argparse.ArgumentParser):
    """Reports an error in one sentence that refers to --help."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def shared() -> Parser:
    parser = Parser(add_help=False)
    here = Path(".")
    parser.add_argument("--out", type=local, default=here, metavar="DIR", help="where results.md and checkpoints/ are")
    return parser


def data(project: Project) -> Parser:
    parser = Parser(add_help=False)
    where = project.root / "data"
    parser.add_argument("--data", type=local, default=where, metavar="DIR", help="where published data is, or goes")
    return parser


def machine(project: Project) -> Parser:
    parser = Parser(add_help=False, parents=[data(project)])
    parser.add_argument(
        "--data-url",
        type=address,
        metavar="URL|FILE",
        help="the archive, such as cifar-10-python.tar.gz, to try first (or an address in CIFAR10_URL, CIFAR100_URL)",
    )
    parser.add_argument(
        "--data-folder",
        type=local,
        metavar="DIR",
        help="images of your own: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* with --test-share",
    )
    parser.add_argument(
        "--test-share", type=float, metavar="X", help="share of the images of --data-folder that are for testing"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto is CUDA or else the CPU"
    )
    return parser


def address(text: str) -> str:
    """The address of an archive; that of a file, if there is one with this name."""
    path = local(text)
    return path.resolve().as_uri() if os.path.isfile(path) else text  # is_file() fails for a very long one


def parse_address(text: str) -> str:
    """The address of a Ray cluster. An empty one, from a variable that is not set, must not mean this machine."""
    if not text.strip():
        raise UserError("--ray has an empty address, expected HOST:PORT or auto, or --ray alone for this machine")
    return text


def compiler() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--no-compile", action="store_true", help="run the train step eager")
    lines = parser.add_mutually_exclusive_group()
    lines.add_argument("-v", "--verbose", action="store_true", help="show each epoch of several runs, too")
    lines.add_argument("-q", "--quiet", action="store_true", help="print no more than warnings, errors and --json")
    return parser


def training() -> Parser:
    """The options of a command that trains many runs; see core.commands.run.train."""
    parser = Parser(add_help=False, parents=[compiler()])
    parser.add_argument(
        "--cohort",
        type=plan.parse_cohort,
        default=1,
        metavar="off|N",
        help="train up to N runs of one shape together (default: off)",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        type=parse_address,
        metavar="ADDRESS",
        help="train on a Ray cluster, by default all of this machine",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained, with an estimate")
    parser.add_argument(
        "--checkpoint-every",
        type=parse_epochs,
        metavar="N",
        help="epochs between resume points (default: 1, or more so that saving takes at most a twentieth of the time)",
    )
    parser.add_argument("--resume-anyway", action="store_true", help="resume even where the result is not exact")
    return parser


def parse_epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--checkpoint-every {text}, expected at least 1")
    return int(text)


def settings() -> Parser:
    parser = Parser(add_help=False)
    settings = parser.add_argument_group("keys of the spec", "The result is saved as another run.")
    settings.add_argument("--epochs", type=int, metavar="N", help=FIELDS["epochs"].meaning)
    settings.add_argument("--batch-size", type=int, metavar="N", help=FIELDS["batch_size"].meaning)
    settings.add_argument("--lr", type=float, metavar="X", help=FIELDS["lr"].meaning)
    settings.add_argument("--precision", metavar="float32|tf32|bfloat16", help=FIELDS["precision"].meaning)
    seeds = settings.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, metavar="N", help=FIELDS["seed"].meaning)
    seeds.add_argument("--seeds", type=plan.parse_seeds, metavar="N|A,B,...", help="how many from 0 on, or which")
    return parser


def which() -> Parser:
    parser = Parser(add_help=False, parents=[shared()])
    parser.add_argument("--seed", type=int, metavar="N", help="of the run, by default the first")
    return parser


def chosen(args: argparse.Namespace, project: Project, source: Source) -> list[Run]:
    """The runs of a command; all are checked before anything starts. Prints the notes on their data sets."""
    values = {key: getattr(args, key) for key in KEYS if getattr(args, key) is not None}
    if source.own is not None:
        values["dataset"] = source.own_name
    words = [current_name(word, project) for word in args.names]
    runs = plan.chosen(project, words, values, args.seeds, args.out)
    print_notes(args, source, runs)
    return runs


def print_notes(args: argparse.Namespace, source: Source, runs: Iterable[Run]) -> None:
    """Print the notes on the data sets of these runs, and which options have no effect on them."""
    names = dict.fromkeys(run.spec["dataset"] for run in runs)
    for name in names:
        if (source.own is None or name != source.own_name) and (note := datasets.get(name).note):
            terminal.note(note)
    no_effect_on_data(args, names)
    small = not any(map(datasets.worth_compiling, names))
    no_effect(args, no_compile=small and "for so little data, no step is compiled")


def compiled(args: argparse.Namespace, dataset: str) -> bool:
    """Whether to compile the train step of a run on a data set."""
    return not args.no_compile and datasets.worth_compiling(dataset)


def no_effect(args: argparse.Namespace, **reasons: str | bool | None) -> None:
    """Say which of the given options change nothing in this call. Without a reason, an option has an effect."""
    for name, reason in reasons.items():
        if reason and name in args.given:
            terminal.note(f"--{name.replace('_', '-')} has no effect: {reason}")


def reasons_without_effect(args: argparse.Namespace) -> dict[str, str]:
    """The options that have no effect with --dry-run or --ray, and why; none without these."""
    if args.dry_run:
        names = ("checkpoint_every", "cohort", "minutes", "resume_anyway", "tensorboard", "verbose")
        return dict.fromkeys(names, "a dry run trains nothing")
    reasons = {
        "checkpoint_every": "a worker keeps no resume points",
        "resume_anyway": "on a cluster, every run starts anew",
        "verbose": "a worker reports no epochs",
    }
    return reasons if args.ray else {}


def no_effect_on_data(args: argparse.Namespace, names: Iterable[str]) -> None:
    """The same for the options that say where the data of these data sets is."""
    published = [name for name in names if name in datasets.REGISTRY and datasets.get(name).archive]
    complete = not any(datasets.get(name).missing(datasets.home(name, args.data)) for name in published)
    none_published = not published and "no published data is read"
    none_own = not any(name.startswith(folder.PREFIX) for name in names) and "no run has images of your own"
    no_effect(
        args,
        data=none_published,
        data_url=none_published or (complete and f"all files are in {args.data}"),
        data_folder=none_own,
        test_share=none_own,
    )


def no_effect_on_files(args: argparse.Namespace, words: Sequence[str]) -> None:
    """The same for the options that say which run a word means."""
    kinds = {files.kind(word) for word in words}
    no_effect(
        args,
        seed="name" not in kinds and "no run is meant by the name of its experiment",
        out=kinds == {"file"} and "every run is meant by a file",
    )


def source(args: argparse.Namespace) -> Source:
    """Where the data of this call comes from."""
    return Source(args.data, args.data_url, args.data_folder, args.test_share, terminal.fetching)


def data_on_device(args: argparse.Namespace, source: Source) -> "Callable[[str], tuple[Data, torch.device]]":
    """A function that loads a data set by name onto the device of this call. It keeps only the last one."""
    kept: dict[str, tuple[Data, torch.device]] = {}

    def load(name: str) -> "tuple[Data, torch.device]":
        from core.session import prepare  # it imports torch

        if name not in kept:
            kept.clear()  # first: the device may not have room for both
            kept[name] = prepare(args.device, lambda: source.load(name))
        return kept[name]

    return load


def run_file(
    args: argparse.Namespace,
    project: Project,
    word: str,
    suffix: str = ".safetensors",
    dataset: "Callable[[], str | None]" = lambda: None,
) -> Path:
    """The weights or, with ".json", the record that `word` means. Of runs on several data sets, those on the one that
    `dataset` returns are meant."""
    name = current_name(word, project)
    spec = plan.experiments(project.suites).get(name)
    return files.find_file(args.out, name, args.seed, spec, former_names(name, project.former), suffix, dataset)


def current_name(word: str, project: Project) -> str:
    """The current name of an experiment or suite; a former name still works."""
    if (name := new_name(word, project.former)) != word:
        terminal.note(f"{word} has a new name: {name}")
    return name


def labels(runs: Iterable[Run], most: int = 3) -> str:
    """The first `most` runs for a sentence, and the number of the others."""
    names = [run.label for run in runs]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
