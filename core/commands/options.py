"""Options that several commands share, and what they mean."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from core import plan, terminal
from core.data import cifar10
from core.data.tensors import Data
from core.errors import UserError
from core.plan import Project
from core.runs import files
from core.runs.run import Run, former_of
from core.store import local

KEYS = ("epochs", "batch_size", "lr", "precision", "seed")  # the keys of a spec that are options, too


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def shared() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--out", type=local, default=".", metavar="DIR", help="where results.md and checkpoints/ are")
    return parser


def data(project: Project) -> Parser:
    parser = Parser(add_help=False)
    folder = project.root / "data"
    parser.add_argument("--data", type=local, default=folder, metavar="DIR", help="where CIFAR-10 is, or goes")
    return parser


def machine(project: Project) -> Parser:
    parser = Parser(add_help=False, parents=[data(project)])
    parser.add_argument(
        "--data-url",
        default=os.environ.get("CIFAR10_URL"),
        metavar="URL",
        help="address of cifar-10-python.tar.gz to try before the mirrors (also $CIFAR10_URL)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser


def training() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--no-compile", action="store_true", help="run the train step eager")
    parser.add_argument("-v", "--verbose", action="store_true", help="show each epoch of several runs, too")
    settings = parser.add_argument_group("keys of the spec", "The result is saved as another run.")
    settings.add_argument("--epochs", type=int, metavar="N")
    settings.add_argument("--batch-size", type=int, metavar="N")
    settings.add_argument("--lr", type=float, metavar="X")
    settings.add_argument("--precision", metavar="float32|tf32|bfloat16")
    seeds = settings.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, metavar="N")
    seeds.add_argument("--seeds", type=plan.parse_seeds, metavar="N|A,B,...", help="how many from 0 on, or which")
    return parser


def which() -> Parser:
    parser = Parser(add_help=False, parents=[shared()])
    parser.add_argument("--seed", type=int, metavar="N", help="of the network that is named, by default the first")
    return parser


def chosen(args: argparse.Namespace, project: Project) -> list[Run]:
    """The runs that a command asks for; all are checked before anything starts."""
    values = {key: getattr(args, key) for key in KEYS if getattr(args, key) is not None}
    words = [new_name(word, project) for word in args.names]
    return plan.chosen(project, words, values, args.seeds, args.out)


def load_data(args: argparse.Namespace) -> Data:
    with terminal.fetching() as progress:
        return cifar10.load(args.data, args.data_url, progress)


def weights(args: argparse.Namespace, project: Project, word: str) -> Path:
    """The file of weights that a word means."""
    name = new_name(word, project)
    spec = plan.experiments(project.suites).get(name)
    return files.find_weights(args.out, name, args.seed, spec, former_of(name, project.former))


def new_name(word: str, project: Project) -> str:
    """The name to use for a word of the command line. An old name still works."""
    if word not in project.former:
        return word
    terminal.warn(f"{word} has a new name: {project.former[word]}")
    return project.former[word]


def labels(runs: Iterable[Run], most: int = 3) -> str:
    """The names of some runs in a sentence."""
    names = [run.label for run in runs]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
