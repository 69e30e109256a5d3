"""predict: the classes of image files."""

import argparse

from core import terminal
from core.commands import options
from core.plan import Project
from core.signals import Stop
from core.store import local
from core.terminal import warn

HELP = "classify image files: any image gets one of the classes of the data set"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("predict", parents=[options.which()], help=HELP)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the name of an experiment, an id or a file")
    parser.add_argument("images", nargs="+", type=local, metavar="IMAGE", help="a file, or a folder of them")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    """Returns 2 if an image cannot be read."""
    with stop.quick_imports():
        from core import images, predict
    options.no_effect_on_files(args, [args.checkpoint])
    network = predict.load(options.run_file(args, project, args.checkpoint))
    paths, classes = images.find(args.images), network.info.classes
    if not args.json:
        which = f": {', '.join(classes)}" if len(classes) <= terminal.LISTED else ""
        warn(f"there are only {len(classes)} classes, and every image gets one of them{which}")
    show = terminal.prediction_as_json if args.json else terminal.prediction
    status = 0
    for path in paths:
        try:
            show(path, classes, predict.top_k(network, images.read(path, network.info.shape)))
        except images.ImageError as error:
            warn(f"error: {error}")
            status = 2
    return status
