"""A functional training core for fully connected networks on CIFAR-10. DESIGN: imports point downward only."""

import os
import sys

# MKL then sums the products of a matrix in the same order with one thread as with two, at no cost in speed
# (tests/test_reproducible.py). It is read at the first product; elsewhere than on a CPU it says nothing.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def _use_one_thread() -> None:
    """In a fork: it has none of the threads of torch's pool, and would wait for them for ever."""
    if set_num_threads := getattr(sys.modules.get("torch"), "set_num_threads", None):
        set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)
