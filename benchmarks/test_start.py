"""From the start of main.py to the end of its first training step, with an empty and a filled compile cache."""

import os
import re
import statistics
import subprocess
import sys

import pytest

from benchmarks import harness
from core.data.archive import ROOT

# The kernel counts a child's peak from that of the process which starts it, so a small one stands between.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory, choose):
    """An empty compile cache for each cold start; the warm ones use what the cold ones made."""
    return [tmp_path_factory.mktemp("cache") for _ in range(choose(3, 1))]


RUN = ("lr-1e-3", "--epochs", "1", "--batch-size", "128")


def start(cache, out, words=RUN):
    """Train one epoch at batch 128, or another run; the seconds to the first step, and the peak gigabytes of the
    largest process."""
    command = [sys.executable, "main.py", "run", *words, "--out", str(out)]
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command],
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"first step ([0-9.]+) s after the start of the process", result.stdout)
    assert found, result.stdout
    kilobytes = int(result.stdout.split()[-1]) // (1024 if sys.platform == "darwin" else 1)
    return float(found[1]), kilobytes * 1024 / 1e9


@pytest.mark.benchmark(group="start", timer=harness.replay)
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_first_step(state, caches, data, tmp_path, benchmark, board):
    if state == "warm" and not any(caches[0].iterdir()):
        pytest.skip("needs the cold run before it")
    starts = [start(cache, tmp_path / str(i)) for i, cache in enumerate(caches)]
    seconds, gigabytes = map(list, zip(*starts, strict=True))
    benchmark.extra_info |= {"peak_gigabytes": round(max(gigabytes), 3)}
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
    board.lines.append(
        f"First step of main.py, caches {state}: {statistics.median(seconds):.1f} s (of {len(caches)}: {spread}); "
        f"peak memory of its largest process over the whole run {max(gigabytes):.2f} GB"
    )
    harness.replay.report(benchmark, seconds)
