"""Where a run was made: versions, settings and hardware that decide its bits or its speed."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

import torch

from core.code_hash import CODE
from core.mode import Mode
from core.runs.checkout import checkout
from core.runs.record import Environment

# Environment variables that change the arithmetic of MKL, oneDNN, cuBLAS or ATen.
SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

# A run repeats bit for bit if these agree. The number of threads matters only in two cases: see `environment` and
# `deciding`.
DECIDE_BITS = ("code", "torch", "device", "hardware", "mode", "settings")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpuinfo('model name')}, {os.cpu_count()} cores"


def environment(device: torch.device, mode: Mode, bfloat16: bool = False) -> Environment:
    """The environment of a run that starts now on `device`.

    Args:
        bfloat16: Whether it multiplies matrices in bfloat16; see core.spec.reads_bfloat16.
    """
    name = device_name(device)
    if device.type == "cuda":
        hardware = f"{name}, compute capability {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    else:
        hardware = _instructions()
        if bfloat16 and "amx" in hardware:  # There oneDNN shares the terms of a sum between threads.
            hardware += f", {torch.get_num_threads()} threads"
    return Environment(
        code=CODE,
        torch=str(torch.__version__),
        device=device.type,
        hardware=hardware,
        mode=str(mode),
        device_name=name,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        git=checkout().commit,
        settings=_settings(),
        diff=checkout().digest,
    )


def deciding(made: Environment) -> tuple[str, ...]:
    """The keys that decide the bits of a run that was made in this environment."""
    # Unpatched, inductor shares the terms of a sum between threads.
    return (*DECIDE_BITS, "threads") if Mode.parse(made.mode).kind == "unpatched" else DECIDE_BITS


def difference(then: Environment, now: Environment) -> str | None:
    """The changes that decide bits, in words; None if a run would repeat bit for bit."""
    pairs = [(key, getattr(then, key), getattr(now, key)) for key in deciding(then)]
    return ", ".join(f"{key} {old or 'unknown'} (now {new})" for key, old, new in pairs if old != new) or None


def _settings() -> str:
    values = [(name, os.environ.get(name)) for name in SETTINGS]
    compiler = os.environ.get("CXX", "")
    if " -" in compiler:  # It has options, which reach the compiled step.
        values.append(("CXX", compiler))
    text = ", ".join(f"{name}={value}" for name, value in values if value)
    return text.encode("unicode_escape").decode()[:1000]


def _instructions() -> str:
    """The instructions that a CPU multiplies with, and its maker: MKL treats another maker's CPU differently."""
    bfloat16 = [name for name in ("amx_bf16", "avx512_bf16") if torch.cpu.get_capabilities().get(name)]
    maker, capability = _cpuinfo("vendor_id"), torch.backends.cpu.get_cpu_capability()
    return " ".join((platform.machine(), maker, capability, *bfloat16[:1]))


def _cpuinfo(key: str) -> str:
    """A property of the first processor, as Linux names it on x86; elsewhere what tells one chip from another."""
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
        found = {name.strip(): value.strip() for name, _, value in reversed(lines)}
        arm = [f"{name} {found[name]}" for name in ("CPU implementer", "CPU part") if name in found]
        if arm or key in found:
            return ", ".join(arm) or found[key]
    with contextlib.suppress(OSError):  # macOS, where platform.processor() is "arm" for each generation
        sysctl = ("sysctl", "-n", "machdep.cpu.brand_string")
        if name := subprocess.run(sysctl, capture_output=True, encoding="utf-8", check=False).stdout.strip():
            return name
    return platform.processor() or platform.machine()
