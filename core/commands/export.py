"""export: the network of a checkpoint as a file for other programs."""

import argparse

from core.commands import options
from core.plan import Project
from core.signals import Stop
from core.store import local
from core.terminal import say, warn

HELP = "write a network for other programs"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("export", parents=[options.which(), options.data(project)], help=HELP)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the name of an experiment, an id or a file")
    parser.add_argument(
        "--format", choices=("torch", "onnx"), required=True, help="torch.export (.pt2) or ONNX (.onnx)"
    )
    parser.add_argument("--output", type=local, metavar="FILE", help="by default beside the checkpoint")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    with stop.quick_imports():
        from core import export, predict
    options.no_effect_on_files(args, [args.checkpoint])
    source = options.run_file(args, project, args.checkpoint)
    network = predict.load(source)
    path = args.output or source.with_suffix(export.FORMATS[args.format].suffix)
    images, what = export.check_images(network, args.data)
    precision, largest = export.export(network, args.format, path, images)
    tolerance = f"{export.TOLERANCE:g} of the largest logit" if largest > 1 else f"{export.TOLERANCE:g}"
    shape, classes = ", ".join(map(str, network.info.shape)), len(network.info.classes)
    say(f"{path}: uint8 images [n, {shape}] -> float32 logits [n, {classes}], within {tolerance} on {what}")
    if precision != network.spec["precision"]:
        warn(f"its matrix products are in {precision}, those of the checkpoint in {network.spec['precision']}")
    return 0
