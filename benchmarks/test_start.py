"""From the start of main.py to the end of its first training step, with an empty and a filled compile cache."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import arena
from core.dataset import ROOT

# The kernel counts a child's peak from that of the process which starts it, so a small one stands between.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.benchmark(group="start", timer=arena.replay)
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_first_step(state, cache, data, tmp_path, benchmark, board):
    """One epoch at batch 128; the warm one uses what the cold one compiled."""
    if state == "warm" and not any(cache.iterdir()):
        pytest.skip("needs the cold run before it")
    command = [sys.executable, "main.py", "run", "lr-1e-3", "--epochs", "1", "--batch-size", "128"]
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    [path] = tmp_path.glob("checkpoints/*/*.json")
    record = json.loads(path.read_text())
    kilobytes = int(result.stdout.split()[-1]) // (1024 if sys.platform == "darwin" else 1)
    seconds = record["first_step_seconds"]
    benchmark.extra_info |= {"peak_gigabytes": round(kilobytes * 1024 / 1e9, 3), "mode": record["environment"]["mode"]}
    board.lines.append(
        f"First step of main.py, caches {state}: {seconds:.1f} s; "
        f"peak memory of the whole run {kilobytes * 1024 / 1e9:.2f} GB"
    )
    arena.replay.report(benchmark, [seconds])
