"""evaluate: checkpoints on the test split, compared with the records of their runs."""

import argparse
from collections import defaultdict
from pathlib import Path

from core import terminal
from core.commands import options
from core.data.tensors import DataError
from core.errors import UserError
from core.plan import Project
from core.runs.record import new_name
from core.signals import Stop
from core.store import StoreError
from core.terminal import warn

HELP = "evaluate checkpoints on the test split"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("evaluate", parents=[options.which(), options.machine(project)], help=HELP)
    parser.add_argument(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="a name, an id or a file; all under --out if none"
    )
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "shifts"),
        default="none",
        help="also average over mirror images, or over nine shifts of a pixel and their mirror images",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    """Returns 1 if a checkpoint differs from the record of its run, 2 if it, or the record, cannot be read."""
    with stop.quick_imports():
        from core import predict
    source = options.source(args)
    if args.checkpoints:
        paths = [options.run_file(args, project, word, dataset=lambda: source.own_name) for word in args.checkpoints]
    else:
        files = sorted((args.out / "checkpoints").glob("*/*.safetensors"))
        paths = [path for path in files if ".step-" not in path.name]
    if not paths:
        raise UserError(f"no checkpoint under {args.out / 'checkpoints'}; `uv run main.py` trains some")
    status = 0
    good: dict[str, list[Path]] = defaultdict(list)  # by their data set
    for path in paths:  # before the data is read, and one at a time: memory may not hold all
        try:
            about = predict.load(path).about
            predict.recorded(path)
            good[about.spec["dataset"]].append(path)
        except StoreError as error:
            warn(f"error: {error}")
            status = 2
    if not good:
        return status
    options.no_effect_on_files(args, args.checkpoints)
    options.no_effect_on_data(args, good)
    show = terminal.evaluation_as_json if args.json else terminal.evaluation
    on_device = options.data_on_device(args, source)
    for name, members in good.items():
        try:
            data, device = on_device(name)
        except DataError as error:
            if len(good) == 1:
                raise
            terminal.fail(error)
            status = 2
            continue
        for path in members:
            network = predict.load(path, device)
            network.about.name = new_name(network.about.name, project.former)
            for tta in dict.fromkeys(("none", args.tta)):  # the plain number first, whatever is asked for
                evaluation = predict.evaluate(path, network, data, tta)
                status = max(status, 0 if evaluation.same else 1)
                show(path, network.about, evaluation)
    return status
