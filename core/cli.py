"""The options of the command line."""

import argparse
import os
from pathlib import Path
from typing import NoReturn

from core import plan
from core.errors import UserError
from core.store import local

OVERRIDES = ("epochs", "batch_size", "lr", "precision", "seed")  # the keys of a spec that are options, too


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_address(text: str) -> str:
    """The address of a Ray cluster. An empty one, as of a variable that is not set, must not mean this machine."""
    if not text.strip():
        raise UserError("--ray has an empty address, expected HOST:PORT or auto, or --ray alone for this machine")
    return text


def parse(argv: list[str], data: Path, default: str) -> argparse.Namespace:
    """The `command`, which is `run` where none is named, and its options.

    Args:
        data: where CIFAR-10 is if --data does not say.
        default: the suite that `run` trains if no name is given.

    Raises:
        UserError: an option is unknown, or has a value that it does not take.
    """
    top = Parser(prog="main.py", description="CIFAR-10 with fully connected networks.")
    commands = top.add_subparsers(dest="command")
    shared = Parser(add_help=False)
    shared.add_argument("--out", type=local, default=".", metavar="DIR", help="where results.md and checkpoints/ are")
    where = Parser(add_help=False)
    where.add_argument("--data", type=local, default=data, metavar="DIR", help="where CIFAR-10 is, or goes")
    machine = Parser(add_help=False, parents=[where])
    machine.add_argument(
        "--data-url",
        default=os.environ.get("CIFAR10_URL"),
        metavar="URL",
        help="address of cifar-10-python.tar.gz to try before the mirrors (also $CIFAR10_URL)",
    )
    machine.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    training = Parser(add_help=False)
    training.add_argument("--no-compile", action="store_true", help="run the train step eager")
    training.add_argument("-v", "--verbose", action="store_true", help="show each epoch of several runs, too")
    training.add_argument("--epochs", type=int, metavar="N")
    training.add_argument("--batch-size", type=int, metavar="N")
    training.add_argument("--lr", type=float, metavar="X")
    training.add_argument("--precision", metavar="float32|tf32|bfloat16")
    seeds = training.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, metavar="N")
    seeds.add_argument("--seeds", type=plan.parse_seeds, metavar="N|A,B,...", help="how many from 0 on, or which")

    run = commands.add_parser("run", parents=[shared, machine, training], help="train experiments (the default)")
    run.add_argument(
        "names",
        nargs="*",
        metavar="NAME|KEY=VALUE",
        help=f"experiments, grids or suites (by default the suite {default}), and keys of the spec to change, such as "
        "lr=3e-4, widths=512,256 or activation=relu,gelu (a grid); list --keys shows all keys",
    )
    run.add_argument(
        "--cohort",
        type=plan.parse_cohort,
        default=1,
        metavar="off|N",
        help="train up to N runs of one shape together (default: off)",
    )
    run.add_argument(
        "--ray",
        nargs="?",
        const="local",
        type=parse_address,
        metavar="ADDRESS",
        help="train on a Ray cluster, by default all of this machine",
    )
    run.add_argument("--dry-run", action="store_true", help="show what would be trained, with an estimate")
    run.add_argument("--checkpoint-every", type=int, default=1, metavar="N", help="epochs between resume points")
    run.add_argument("--force", action="store_true", help="train from the start, even what is finished")
    run.add_argument("--resume-anyway", action="store_true", help="resume even where the bits will differ")

    which = Parser(add_help=False, parents=[shared])
    which.add_argument("--seed", type=int, metavar="N", help="of the network that is named, by default the first")
    evaluate = commands.add_parser("evaluate", parents=[which, machine], help="evaluate checkpoints on the test split")
    evaluate.add_argument(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="a name, an id or a file; all under --out if none"
    )
    evaluate.add_argument(
        "--tta", choices=("none", "flip"), default="none", help="average over each image and its mirror image"
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON object a line")

    predict = commands.add_parser(
        "predict", parents=[which], help="classify image files: any image gets one of the ten classes"
    )
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="the name of an experiment, an id or a file")
    predict.add_argument("images", nargs="+", type=local, metavar="IMAGE", help="a file, or a folder of them")
    predict.add_argument("--json", action="store_true", help="one JSON object a line")

    export = commands.add_parser("export", parents=[which, where], help="write a network for other programs")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="the name of an experiment, an id or a file")
    export.add_argument("--format", choices=("torch", "onnx"), required=True)
    export.add_argument("--output", type=local, metavar="FILE", help="by default beside the checkpoint")

    verify = commands.add_parser(
        "verify", parents=[shared, machine, training], help="train again elsewhere, compare the bits"
    )
    verify.add_argument("names", nargs="+", metavar="NAME|KEY=VALUE")

    listing = commands.add_parser("list", parents=[shared], help="show the suites and their specs, with an estimate")
    listing.add_argument("--keys", action="store_true", help="show the keys of a spec with their meanings instead")
    report = commands.add_parser("report", parents=[shared], help="rebuild results.md from the records")
    report.add_argument("--group-by", metavar="KEY", help="add a table of means by the values of a key of the spec")

    named = argv[:1] and argv[0] in (*commands.choices, "-h", "--help")
    return top.parse_args(argv if named else ["run", *argv])
