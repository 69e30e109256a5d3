"""Where a run was made: the versions and the hardware that decide its bits, and those that only explain its speed."""

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]

# The code that a training consists of, as it is when this process imports it.
SOURCES = (
    *(f"compile/{name}" for name in ("cache", "device", "fused", "inductor")),
    "data/loader",
    *(f"functional/{name}" for name in ("augment", "model", "optim", "prng", "step", "tree")),
    "train",
)
CODE = hashlib.sha256(b"".join((ROOT / "core" / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()[:12]

# A run repeats bit for bit where these agree. The number of threads is not among them (tests/test_reproducible.py).
DECIDE_BITS = ("code", "torch", "device", "hardware", "mode")


def environment(device: torch.device, compiled: bool) -> dict[str, str | int]:
    """The provenance of a run that starts now on `device`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        hardware = f"{name}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    else:
        name, hardware = _cpu(), f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "code": CODE,
        "torch": torch.__version__,
        "device": device.type,
        "hardware": hardware,
        "mode": "compiled" if compiled else "eager",
        "device_name": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "git": _commit(),
    }


def difference(then: dict, now: dict) -> str | None:
    """What decides the bits and has changed, in words; None where a run would repeat."""
    changed = [f"{key} {then.get(key)} (now {now[key]})" for key in DECIDE_BITS if then.get(key) != now[key]]
    return ", ".join(changed) or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit of the code, with a plus where the code differs from it; "unknown" outside Git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + "+" * bool(
            git("status", "--porcelain", "--", "core", "experiments", "main.py", "pyproject.toml")
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
