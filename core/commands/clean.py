"""clean: lists the files that nothing needs, and deletes them."""

import argparse
import contextlib
import shutil
from itertools import chain
from pathlib import Path

from rich.filesize import decimal

from core.commands import options
from core.errors import UserError
from core.plan import Project
from core.runs import files
from core.runs.record import former_names
from core.signals import Stop
from core.store import Held, Leftover, StoreError, delete, locked
from core.terminal import say, warn

HELP = "list the files that nothing needs, and delete them"


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("clean", parents=[options.shared()], help=HELP)
    parser.add_argument("--weights", metavar="NAME", help="also the weights of this experiment; its records stay")
    parser.add_argument("--yes", action="store_true", help="delete what is listed")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    """Returns 2 if a file cannot be deleted. Skips what another process uses. No record is ever listed."""
    with stop.quick_imports():
        from core.compile import cache  # it imports torch
    weights = list[Leftover]()
    if args.weights:
        name = options.current_name(args.weights, project)
        weights = [each for old in (name, *former_names(name, project.former)) for each in files.weights(args.out, old)]
        if not weights:
            raise UserError(f"there are no weights of {name} under {args.out}; names are in `main.py list`")
    found, status = list[tuple[int, Leftover]](), 0
    for leftover in chain(files.leftovers(args.out), weights, cache.leftovers()):
        with contextlib.suppress(Held):
            try:
                with locked(leftover.lock, timeout=0):
                    found.append((sum(map(size, leftover.paths)), leftover))
                    if args.yes:
                        remove(leftover)
            except StoreError as error:
                warn(f"error: {error}")
                status = 2
    for count, leftover in sorted(found, key=lambda each: -each[0]):
        say(f"{decimal(count):>10}  {leftover.reason}  {leftover.paths[0]}")
    total = decimal(sum(count for count, _ in found))
    if not found:
        say("nothing to delete")
    elif not args.yes:
        say(f"{total} in all; --yes deletes them")
    elif not status:
        say(f"deleted, {total} in all")
    return status


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(each.lstat().st_size for each in (path, *path.rglob("*")) if not each.is_dir())


def remove(leftover: Leftover) -> None:
    for path in leftover.paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            delete(path)
