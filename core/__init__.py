"""A functional training core for fully connected networks on CIFAR-10. docs/design.md has a map of its files."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.interactive import run_experiment as run_experiment
    from core.report.tables import histories as histories
    from core.report.tables import records as records

# MKL then sums the products of a matrix in the same order with one thread as with two, at no cost in speed
# (tests/test_reproducible.py). It is read at the first product; elsewhere than on a CPU it says nothing.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _use_one_thread() -> None:
    """In a fork: it has none of the threads of torch's pool, and would wait for them for ever."""
    if set_num_threads := getattr(sys.modules.get("torch"), "set_num_threads", None):
        set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


# What `from core import ...` offers beside the modules, and where it is. Each is imported when it is first asked for.
OFFERED = {
    "histories": "core.report.tables",
    "records": "core.report.tables",
    "run_experiment": "core.interactive",
}

if not TYPE_CHECKING:  # with it, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name in OFFERED:
            return getattr(importlib.import_module(OFFERED[name]), name)
        raise AttributeError(f"module 'core' has no attribute {name!r}")
