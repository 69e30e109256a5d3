"""diff: what differs between two runs, and their results side by side."""

import argparse
from typing import Any

from core import terminal
from core.code_hash import same_numbers
from core.commands import options
from core.plan import Project
from core.report.tables import MEASUREMENTS, row
from core.runs.record import read_record
from core.signals import Stop
from core.spec import FIELDS

HELP = "show what differs between two runs, and their results side by side"
SAID = {"experiment", "spec_id"}  # in the heading of the table


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parser = commands.add_parser("diff", parents=[options.which()], help=HELP)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="the name of an experiment, an id, or a file of the run")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    with stop.quick_imports():
        from core.runs.provenance import deciding  # it imports torch
    options.no_effect_on_files(args, args.runs)
    one, other = (read_record(options.run_file(args, project, word, ".json")) for word in args.runs)
    rows = row(one), row(other)
    decides = {*deciding(one.environment), *deciding(other.environment), *FIELDS, "data", "bitwise"}
    if same_numbers(one.environment.code, other.environment.code):
        decides.discard("code")
    parts: dict[str, dict[str, tuple[Any, Any]]] = {"decides_weights": {}, "other": {}, "results": {}}
    for key, pair in zip(rows[0], zip(*(each.values() for each in rows), strict=True), strict=True):
        if key in decides and (pair[0] != pair[1] or (key == "bitwise" and False in pair)):
            parts["decides_weights"][key] = pair
        elif key in MEASUREMENTS or key in ("status", "error"):
            if pair != (None, None):
                parts["results"][key] = pair
        elif pair[0] != pair[1] and key not in SAID:
            parts["other"][key] = pair
    digests = [each["digest"] for each in rows]
    same = None if None in digests else digests[0] == digests[1]
    if args.json:
        about = [{key: each[key] for key in ("experiment", "spec_id", "seed")} for each in rows]
        terminal.as_json({"runs": about, "same_weights": same, **parts})
    else:
        terminal.say(verdict(same, list(parts["decides_weights"])))
        terminal.differences([f"{each['experiment']} seed {each['seed']}\n{each['spec_id']}" for each in rows], parts)
    return 0


def verdict(same: bool | None, decides: list[str]) -> str:
    if same is None:
        return "The weights cannot be compared, since only a finished run has weights."
    if same:
        return "The weights are the same, bit for bit."
    if decides:
        return f"The weights differ. What explains it: {', '.join(decides)}."
    return "The weights differ, and nothing in the records explains it."
