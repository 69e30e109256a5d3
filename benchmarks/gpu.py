"""What a GPU can say, in one call that ends within eight minutes, on Linux:

    uv run --group peers python -m benchmarks.gpu [SECTION...] [--out DIR] [--work DIR] [--data DIR] [--small]

Each section is a process with a time limit. Whatever ends it, OUT/SECTION.json has the results so far and how the
section ended (`status`), and the next section begins. A section that no longer fits into the eight minutes is not
started: name it in another call. `recipe` needs a call of its own.

OUT is $OUT by default, or else gpu/. It gets these files alone; the records of the runs are in them. Logs and weights
are in WORK, by default .cache/gpu, where a recipe that was cut off goes on. With --small, the sections run on the CPU
in two minutes: this shows that the script works, and the numbers mean nothing.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks import harness, test_cohort, test_start
from core import store
from core.compile.device import pick_device
from core.data.archive import ROOT
from core.mode import COMPILED
from core.runs.provenance import environment

SECONDS = 480  # of a call
LIMITS = {  # seconds of each section, in the order in which they run
    "epoch-512": 125,
    "cohorts": 75,
    "verify": 80,
    "start": 60,
    "epoch-128": 125,
    "epoch-4096": 125,
    "recipe": 420,
}
BY_DEFAULT = [section for section in LIMITS if section != "recipe"]
SMALL_LIMIT = 60
WAITS = (50, 50)  # seconds to get ready: for all but torch.compile, then for torch.compile, which times kernels


class Size(NamedTuple):
    """How much is done.

    Attributes:
        contestants: names of harness.contestants; empty for all.
        steps: of a round of the epoch; 0 for an epoch.
        cohorts: network of test_cohort -> sizes.
        verified, started, recipe: what follows `main.py run` in the last three kinds of section.
    """

    device: str
    contestants: tuple[str, ...]
    steps: int
    rounds: int
    cohorts: dict[str, tuple[int, ...]]
    verified: tuple[str, ...]
    started: tuple[str, ...]
    recipe: tuple[str, ...]


FULL = Size(
    device="cuda",
    contestants=(),
    steps=0,
    rounds=3,
    cohorts=dict.fromkeys(test_cohort.NETWORKS, (1, 4, 16, 64)),
    verified=("lr-1e-3",),
    started=test_start.RUN,
    recipe=("gpu",),
)
DEMO = ("demo",)
SMALL = Size("cpu", ("eager float32", "products float32"), 2, 1, {"narrow": (1, 2)}, DEMO, DEMO, DEMO)

Results = Iterator[dict[str, Any]]


def epoch(batch: int, size: Size, data: Path) -> Results:
    """The epoch of every contestant in every precision, in turn."""
    entries = harness.contestants(size.device)
    absent = {name: harness.missing(entry.kind, size.device) for name, entry in entries.items()}
    taking_part = [name for name in size.contestants or entries if not absent[name]]
    workers = {name: harness.Worker(entries[name], size.device, data) for name in taking_part}
    failed: dict[str, str] = {}
    for seconds, late in zip(WAITS, (False, True), strict=True):
        wave = {name: worker for name, worker in workers.items() if (entries[name].kind == "compiled") == late}
        failed |= harness.prepare(wave, dict.fromkeys(wave, batch), seconds)
    names = [name for name in workers if name not in failed]
    yield {"left_out": failed | {name: reason for name, reason in absent.items() if reason}}
    steps = size.steps or 45_000 // batch
    seconds = dict[str, list[float]]()
    for seconds in harness.turns({n: functools.partial(workers[n].run, steps) for n in names}, size.rounds):
        yield {"steps": steps, "seconds": seconds}
    found = {name: harness.Result(seconds[name], steps * batch, workers[name].loss) for name in names}
    for name, result in found.items():
        speed = round(result.samples_per_second)
        yield {"contestant": name, "samples_per_second": speed, "seconds": result.seconds, "loss": result.loss}
    for name in found:
        yield {"contestant": name, "times_as_fast": harness.ratios(found, name)}


def cohorts(size: Size, data: Path) -> Results:
    """Cohorts against the same runs one by one. Each compiles in a process of its own, all at the same time."""
    build = functools.partial(test_cohort.build, compiled=size.device == "cuda")
    members = {f"{network} {n}": n for network, sizes in size.cohorts.items() for n in sizes}
    entries = {name: harness.Entry(name.split()[0], "float32") for name in members}
    workers = {name: harness.Worker(entry, size.device, data, build) for name, entry in entries.items()}
    failed = harness.prepare(workers, members, WAITS[0])
    yield {"left_out": failed}
    for network in size.cohorts:
        names = [name for name in workers if entries[name].kind == network and name not in failed]
        steps, images = 8, test_cohort.NETWORKS[network]["batch_size"]
        seconds = harness.interleave({n: functools.partial(workers[n].run, steps) for n in names}, 3 * size.rounds)
        found = {members[n]: harness.Result(seconds[n], steps * images * members[n], None) for n in names}
        ratios = test_cohort.against_one_by_one(found)
        for n, result in found.items():
            speed = round(result.samples_per_second)
            yield {
                "network": network,
                "cohort": n,
                "model_samples_per_second": speed,
                "times_one_by_one": ratios.get(n),
            }


def command(words: tuple[str, ...], where: list[str]) -> dict[str, Any]:
    """What a command of main.py says, and the records that there are then; the last of `where` is their folder.

    Raises:
        RuntimeError: it fails.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "main.py", *words, *where], cwd=ROOT, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()[-20:]
    if done.returncode:
        raise RuntimeError("\n".join([f"{' '.join(words)}: exit status {done.returncode}", *said]))
    records = [json.loads(file.read_bytes()) for file in Path(where[-1]).glob("checkpoints/*/*.json")]
    return {"command": " ".join(words), "seconds": time.perf_counter() - start, "said": said, "records": records}


def start(size: Size, where: list[str], out: Path) -> Results:
    """The seconds to the first step of main.py, with an empty compile cache and with a filled one."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            seconds, gigabytes = test_start.start(cache, out / state, (*size.started, *where))
            yield {"caches": state, "first_step_seconds": seconds, "peak_gigabytes": gigabytes}


def measure(section: str, size: Size, folder: Path, data: Path) -> Results:
    """The results of a section. Its runs are in a folder."""
    where = ["--device", size.device, *(["--data", str(data)] if data != harness.DATA else [])]
    kind, _, batch = section.partition("-")
    match kind:
        case "epoch":
            yield from epoch(int(batch), size, data)
        case "cohorts":
            yield from cohorts(size, data)
        case "verify":
            for word in ("run", "verify"):  # the same run twice, in two processes: the same bits?
                yield command((word, *size.verified), [*where, "--out", str(folder)])
        case "start":
            yield from start(size, where, folder)
        case "recipe":
            yield command(("run", *size.recipe), [*where, "--out", str(folder)])


def write(file: Path, content: Mapping[str, Any]) -> None:
    store.atomic_write(file, json.dumps(content, indent=1).encode())  # a section may be cut off at any time


def run_here(section: str, size: Size, file: Path, folder: Path, data: Path) -> None:
    """Run a section in this process, and write each result as soon as it is there."""
    machine = msgspec.to_builtins(environment(pick_device(size.device), COMPILED))
    content = {"section": section, "machine": machine, "results": []}
    for result in measure(section, size, folder, data):
        content["results"].append(result)
        write(file, content)


def run_apart(section: str, limit: float, file: Path, log: Path, options: list[str]) -> str:
    """Run a section in another process, and write how it ended into its file; returns that."""
    file.unlink(missing_ok=True)
    begin = time.perf_counter()
    with log.open("w", encoding="utf-8") as said:
        words = [sys.executable, "-m", "benchmarks.gpu", section, "--here", *options]
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = f"failed, exit status {code}: see the log" if (code := process.wait(limit)) else "finished"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:g} s"
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"section": section, "results": []}
    end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    seconds = round(time.perf_counter() - begin, 1)
    write(file, content | {"status": status, "seconds": seconds} | ({} if status == "finished" else {"log": end}))
    return status


def main(words: list[str] | None = None) -> int:
    """Returns 1 if a section has not finished."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="what a GPU can say")
    parser.add_argument("sections", nargs="*", choices=[[], *LIMITS], metavar="SECTION", help=", ".join(LIMITS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu")), help="default: $OUT, or gpu")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "gpu", help="default: .cache/gpu")
    parser.add_argument("--data", type=Path, default=harness.DATA, help="the folder of CIFAR-10")
    parser.add_argument("--small", action="store_true", help="everything in small, on the CPU")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a section, in this process
    args = parser.parse_args(words)
    out, work, data = args.out.resolve(), args.work.resolve(), args.data.resolve()
    if args.here:
        [section] = args.sections
        run_here(section, SMALL if args.small else FULL, out / f"{section}.json", work / section, data)
        return 0
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    end, statuses = time.monotonic() + SECONDS, {}
    options = ["--out", str(out), "--work", str(work), "--data", str(data), *(["--small"] if args.small else [])]
    for section in args.sections or BY_DEFAULT:
        file = out / f"{section}.json"
        limit = min(LIMITS[section], SMALL_LIMIT) if args.small else LIMITS[section]
        left = end - time.monotonic()
        if limit <= left:
            if section != "recipe":  # which goes on
                shutil.rmtree(work / section, ignore_errors=True)
            statuses[section] = run_apart(section, limit, file, work / f"{section}.log", options)
        else:
            statuses[section] = f"not started: it may take {limit:g} s, and {left:.0f} s are left"
            if not file.exists():
                write(file, {"section": section, "results": [], "status": statuses[section]})
        print(f"{section}: {statuses[section]}", flush=True)
    return int(any(status != "finished" for status in statuses.values()))


if __name__ == "__main__":
    sys.exit(main())
