"""search: trains specs of a space that Optuna proposes, then compares the best of them with the base on fresh seeds."""

import argparse
import math

from core import plan, space, terminal
from core.commands import options
from core.commands.compare import decide
from core.commands.run import executor, measured
from core.compare import MAX_SEEDS, Candidate, Question, first_look
from core.errors import UserError
from core.estimate import RESUME_POINTS, Estimate
from core.listeners.progress import Bars
from core.plan import Project
from core.report import questions, searches, stats
from core.report.rebuild import prepare, rebuild
from core.runs.record import Failed, Finished, Partial, Record
from core.runs.run import Run
from core.signals import Stop
from core.space import Space
from core.terminal import say, warn

HELP = "search a space of specs with Optuna, then compare the best on fresh seeds"
BEST = 3  # trials that are compared with each other and with the base
CONFIDENCE = 95  # percent, of that comparison


def add_parser(commands: argparse._SubParsersAction, project: Project) -> argparse.ArgumentParser:
    parents = [options.shared(), options.machine(project), options.training()]
    parser = commands.add_parser("search", parents=parents, help=HELP)
    parser.add_argument("name", metavar="NAME", help=f"a space of experiments/: {', '.join(project.searches)}")
    parser.add_argument("--trials", type=int, default=60, metavar="N", help="with those of earlier calls (default: 60)")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no trial after so many minutes")
    parser.add_argument(
        "--max-seeds", type=int, default=20, metavar="N", help="fresh seeds of the comparison (default: 20)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line: each trial, then the answer")
    parser.set_defaults(force=False, tensorboard=False)
    return parser


def execute(args: argparse.Namespace, project: Project, stop: Stop) -> int:
    found = space.parse(args.name, project.searches, plan.experiments(project.suites))
    if args.trials < 1 or (args.minutes is not None and not args.minutes > 0):
        raise UserError(f"--trials {args.trials} --minutes {args.minutes}, expected at least 1 trial, and time for it")
    least = first_look((1 - CONFIDENCE / 100) / math.comb(BEST + 1, 2))
    if not least <= args.max_seeds <= MAX_SEEDS:
        raise UserError(
            f"--max-seeds {args.max_seeds}, expected {least} to {MAX_SEEDS:,}: {BEST + 1} candidates need {least}"
        )
    with stop.quick_imports():
        source = options.source(args)
        from core.schedule import Interrupted, Skipped
        from core.search import Search, import_optuna
    if source.own is not None:
        found = found._replace(spec={**found.spec, "dataset": source.own_name})
    options.print_notes(args, source, [Run(found.name, found.spec, args.out)])
    options.no_effect(args, **options.reasons_without_effect(args))
    if args.dry_run:
        return dry_run(args, found, stop)
    if "cohort" in args.given:
        terminal.note("no two trials are trained together; cohorts are for the comparison")
    import_optuna(found.name)  # fails now, not after the data is fetched
    catalog = project.catalog()
    prepare(args.out, catalog)
    data = source.identity(found.spec["dataset"], fetch=True)
    stopped = False
    with Search(found, args.out, data) as search:
        if search.count:
            say(f"{len(search.told):,} of {args.trials:,} trials are known already")
        trains = executor(args, source, stop, falls_behind=search.falls_behind)
        seconds = math.inf if args.minutes is None else 60 * args.minutes
        with Bars(args.verbose, args.trials, args.ray is not None) as display:
            display.tally.done = search.count
            for result in search.train(trains, args.trials, seconds, [display, stop.listen], stop):
                display.tally.done = search.count
                match result:
                    case Skipped():
                        warn(f"{result.run.label} is being trained by {result.reason}; taking the next one")
                    case Interrupted():
                        stopped = True
                    case Finished() | Partial() | Failed():
                        show(args, result, search.told.index(result.spec_id) + 1, found, search.best(1))
        best = {search.told.index(r.spec_id) + 1: r for r in search.best(BEST + 1) if r.spec != found.spec}
        question = compared(found, list(best.items())[:BEST], args.max_seeds) if best else None
        search.write(question.file if question and not stopped else "")
    if stopped:
        rebuild(args.out, catalog, args.data)
        warn(f"stopped with {search.count:,} of {args.trials:,} trials; the same command goes on from there")
        return 130
    if question is None:
        raise UserError(f"no trial of {found.name} has a result; more trials (--trials) may have one")
    status, records = decide(args, question, project, source, stop, first=False)
    if status != 130:
        answer(args, project, found.name, records)
    return status


def show(args: argparse.Namespace, record: Record, number: int, found: Space, best: list[Finished]) -> None:
    """Print a trial that has ended."""
    values = {key: record.spec[key] for key in found.axes}
    if args.json:
        numbers = (None, None) if isinstance(record, Failed) else (space.accuracy(record), len(record.history))
        terminal.as_json(
            {
                "trial": number,
                "spec_id": record.spec_id,
                "status": record.__struct_config__.tag,
                "validation_accuracy": numbers[0],
                "epochs_trained": numbers[1],
                **values,
            }
        )
        return
    if isinstance(record, Failed):
        result = f"failed: {record.error}"
    elif isinstance(record, Partial):
        epochs = f"{len(record.history)} of {record.spec['epochs']} epochs"
        result = f"behind with {stats.percent(space.accuracy(record))}, stopped after {epochs}"
    else:
        result = f"validation {stats.percent(space.accuracy(record))}"
    leader = f" (best so far {stats.percent(space.accuracy(best[0]))})" if best else ""
    words = ", ".join(f"{key} {stats.shown(value)}" for key, value in values.items())
    say(f"trial {number} of {args.trials:,}: {result}{leader}: {words}")


def compared(found: Space, best: list[tuple[int, Finished]], max_seeds: int) -> Question:
    """The question which of the best trials, by their numbers, and the base is best on seeds that no trial had."""
    words = (f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in found.fixed.items())
    candidates = [Candidate(searches.label(found.name, number), found.name, r.spec) for number, r in best]
    candidates.append(Candidate(" ".join([found.base, *words]), found.base, found.spec))
    return Question(
        candidates=candidates, max_seeds=max_seeds, confidence=CONFIDENCE, first_seed=found.spec["seed"] + 1
    )


def answer(args: argparse.Namespace, project: Project, name: str, records: list[Record]) -> None:
    """Say how good the best trial is, and print its spec."""
    asked = questions.asked(args.out, records, project.former)
    [search] = [s for s in searches.searched(args.out, records, asked) if s.trials.name == name]
    number = search.winner
    assert number is not None  # a comparison needs a finished trial
    spec = searches.pasted(search.finished[number].spec)
    say(searches.sentence(search))
    if not search.is_beaten:
        say(f"to paste into experiments/: {spec}")
    if args.json:
        about = {"search": name, "trial": number, "is_beaten": search.is_beaten, "spec": spec}
        terminal.as_json({**about, "sentence": searches.sentence(search)})


def dry_run(args: argparse.Namespace, found: Space, stop: Stop) -> int:
    """Show the time and disk space of all trials and of the comparison; write nothing."""
    known = measured(stop, args.out, args.device, 1 if args.ray else None)
    of_trials = [known.estimate([spec], not args.no_compile) for spec in found.sample(args.trials)]
    # A trial that stops early keeps a resume point, which is larger than the weights of a whole one.
    kept = sum(each.kept if args.ray else max(each.kept, each.meanwhile // RESUME_POINTS) for each in of_trials)
    times = [each.seconds for each in of_trials]
    seconds = None if None in times else sum(filter(None, times))
    trials = Estimate(seconds, kept, max(each.meanwhile for each in of_trials))
    seeds = known.estimate([found.spec] * ((BEST + 1) * args.max_seeds), not args.no_compile)
    if args.json:
        lines = {"trials": (args.trials, trials), "comparison": ((BEST + 1) * args.max_seeds, seeds)}
        terminal.as_json({k: {"runs": n, "seconds": e.seconds, "bytes": e.kept} for k, (n, e) in lines.items()})
        return 0
    say(f"{args.trials:,} trials, at most: {terminal.estimate(trials, while_trained=True)}")
    say(f"comparison of {BEST + 1} with {args.max_seeds} seeds, at most: {terminal.estimate(seeds)}")
    return 0
