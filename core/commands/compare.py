"""compare: trains more seeds of several experiments until it is clear which is best."""

import argparse
import math
from collections.abc import Iterable
from typing import Any

from core import compare, plan, terminal
from core.code_hash import same_numbers
from core.commands import options
from core.commands.run import measured, say_no_effect, train
from core.compare import Candidate, Look, Question
from core.data.datasets import Source
from core.errors import UserError
from core.listeners.progress import Display
from core.plan import Project
from core.report import questions
from core.report.rebuild import prepare, rebuild
from core.runs import files
from core.runs.record import Failed, Record, former_names
from core.runs.run import Run
from core.signals import Stop
from core.tally import Tally
from core.terminal import say

HELP = "train seeds until one experiment beats the others, or the difference does not matter"
EXAMPLE = 'quote an experiment with its changes: "lr-1e-3 dropout=0.1"'


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parents = [options.shared(), options.machine(project), options.training()]
    parser = commands.add_parser("compare", parents=parents, help=HELP)
    parser.add_argument("names", nargs="+", metavar="CANDIDATE", help=f"an experiment; {EXAMPLE}")
    parser.add_argument(
        "--within",
        type=float,
        default=compare.DIFFERENCE,
        metavar="POINTS",
        help="a smaller difference in accuracy does not matter (default: %(default)s)",
    )
    parser.add_argument("--max-seeds", type=int, default=50, metavar="N", help="of each candidate (default: 50)")
    parser.add_argument("--confidence", type=float, default=95, metavar="PERCENT", help="default: 95")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: each round, then the answer")
    parser.set_defaults(force=False, tensorboard=False)
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    with stop.quick_imports():
        source = options.source(args)
        candidates = [candidate(word, args, project, source) for word in args.names]
        question = Question(
            candidates=candidates, within=args.within, max_seeds=args.max_seeds, confidence=args.confidence
        )
        options.print_notes(args, source, [as_run(args, project, each, 0) for each in candidates])
    if args.dry_run:
        options.no_effect(args, **options.reasons_without_effect(args))
        return dry_run(args, question, project, source, stop)
    return decide(args, question, project, source, stop)[0]


def candidate(word: str, args: argparse.Namespace, project: Project, source: Source) -> Candidate:
    """The experiment that a word of the command line means, with its changes."""
    words = [options.current_name(each, project) for each in word.split()]
    given = plan.split_words(words, plan.catalog(project.named))
    if len(given.names) != 1:
        raise UserError(f"{word!r} names {len(given.names)} experiments, expected one: {EXAMPLE}")
    if "seed" in given.values or "seed" in given.axes:
        raise UserError(f"{word!r} has a seed, but all candidates have the same seeds, which compare chooses")
    runs = plan.chosen(project, words, {} if source.own is None else {"dataset": source.own_name}, None, args.out)
    if len(runs) != 1:
        raise UserError(f"{word!r} stands for {len(runs)} experiments, expected one: name each as a candidate")
    return Candidate(" ".join(words), runs[0].name, runs[0].spec)


def as_run(args: argparse.Namespace, project: Project, of: Candidate, seed: int) -> Run:
    return Run(of.name, {**of.spec, "seed": seed}, args.out, former_names(of.name, project.former), of.label)


def existing(args: argparse.Namespace, question: Question, project: Project) -> list[Record]:
    """The records that the comparison need not make: of this code and data, with or without weights.

    Raises:
        core.runs.run.OtherData, core.runs.run.OtherCode, core.runs.record.RecordError: see `Run.finished`.
    """
    in_progress, records = files.in_progress(args.out), []
    for each in question.candidates:
        for seed in question.seeds:
            run = as_run(args, project, each, seed)
            record = run.finished(question.data or None, in_progress, weights=False) or run.read()
            if record is None or (run.is_in_progress(in_progress) and not compare.diverged(record)):
                continue  # it is being trained again; of a run that diverged, the resume points are left
            if record.data == question.data and same_numbers(record.environment.code):
                records.append(record)
    return records


def decide(
    args: argparse.Namespace, question: Question, project: Project, source: Source, stop: Stop, first: bool = True
) -> tuple[int, list[Record]]:
    """Train until a question has an answer, and print it. Returns the exit status and all records.

    Args:
        args: as `train` takes them, and `json`.
        first: this process has trained nothing yet.
    """
    dataset, catalog = question.candidates[0].spec["dataset"], project.catalog()
    prepare(args.out, catalog)  # fails now, not after the training, if --out cannot be written
    status, display = 0, Display(Tally([]), args.verbose, args.ray is not None, first)

    def more(todo: list[tuple[Candidate, int]]) -> Iterable[Record] | None:
        nonlocal status
        runs = [as_run(args, project, *each) for each in todo]
        display.tally.expect(runs)
        status, records = train(argparse.Namespace(**{**vars(args), "json": False}), runs, source, display, stop)
        for record in records:
            if isinstance(record, Failed) and not record.diverged:
                raise UserError(f"{record.name} seed {record.seed} failed, so there is no answer: {record.error}")
        return None if status == 130 else records

    question.data = source.identity(dataset, fetch=True) or ""
    known_before, found = existing(args, question, project), None
    if first:
        labels = [each.label for each in question.candidates]
        left = compare.missing(question, compare.assign(question, known_before), labels, question.max_seeds)
        say_no_effect(args, [as_run(args, project, *each) for each in left], several=True)
    with files.lock_results(args.out):  # without it, another process may delete the temporary file
        question.write(args.out)
    for found in compare.rounds(question, known_before, more):
        say(questions.line(found))
        if args.json:
            terminal.as_json(about(found))
    records = rebuild(args.out, catalog, args.data)
    if status == 130 or found is None:
        return 130, records
    asked = questions.asked(args.out, records, project.former)
    known = next((each.known for each in asked if each.question.file == question.file), {})
    answer = {"sentence": questions.sentence(question, found), "test": questions.on_test(found, known)}
    for line in filter(None, answer.values()):
        say(line)
    if args.json:
        terminal.as_json({**about(found), **answer})
    return 0 if found.answer else 1, records


def about(found: Look) -> dict[str, Any]:
    """A look for other programs. Without an interval, `half` is null."""
    pairs = [
        {
            "better": pair.better,
            "worse": pair.worse,
            "mean": pair.difference.mean,
            "half": pair.difference.half if pair.difference.half < math.inf else None,
            "seeds": pair.difference.n,
        }
        for pair in found.pairs
    ]
    return {"answer": found.answer, "left": found.left, "pairs": pairs, "diverged": found.diverged}


def dry_run(args: argparse.Namespace, question: Question, project: Project, source: Source, stop: Stop) -> int:
    """Show the time and disk space of the first round and of all seeds; write nothing."""
    measurements = measured(stop, args.out, args.device, 1 if args.ray else None)
    question.data = source.identity(question.candidates[0].spec["dataset"]) or ""
    known = compare.assign(question, existing(args, question, project))
    rounds = {}
    for name, count in (("first round", compare.first_count(question, known)), ("all seeds", question.max_seeds)):
        todo = compare.missing(question, known, [each.label for each in question.candidates], count)
        specs = [{**each.spec, "seed": seed} for each, seed in todo]
        found = measurements.estimate(specs, not args.no_compile)
        total = count * len(question.candidates)
        rounds[name] = {"seeds": count, "runs": total, "to_train": len(todo), "estimated_seconds": found.seconds}
        if not args.json:
            time = f": {terminal.estimate(found, while_trained=True)}" if todo else ""
            say(f"{name}: {count} seeds, {total:,} runs, {len(todo):,} to train{time}")
    if args.json:
        terminal.as_json(rounds)
    return 0
