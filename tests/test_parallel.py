"""Forks and threads of one Python, as a process pool or a thread pool makes them."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from core import run_experiment, session
from core.session import ForkError
from tests.conftest import FORK
from tests.fork_server import wait

TINY = {"widths": [8], "epochs": 1, "batch_size": 500}


def in_fork(work, seconds=60):
    """The exit status of a fork that does some work."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            faulthandler.dump_traceback(all_threads=True)
        finally:
            os._exit(status)
    status = wait(child, seconds)
    if status == "it hangs":
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status


@FORK
def test_a_fork_works_where_its_parent_has_used_several_threads(invented, tmp_path):
    """Each thread of Python has a pool of its own, so no other test is affected."""
    numbers = torch.ones(1 << 18)

    def train(seed):
        def work():
            assert torch.get_num_threads() == 1
            run_experiment("x", {**TINY, "seed": seed}, tmp_path, invented, "cpu", compiled=False)

        return work

    def parent():
        torch.set_num_threads(2)
        (numbers * 2).sum()
        assert in_fork(lambda: (numbers * 2).sum(), 20) == 0
        assert [in_fork(train(seed), 100) for seed in (0, 1)] == [0, 0]
        assert torch.get_num_threads() == 2

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(parent).result()
    finally:
        torch.set_num_threads(threads)
    assert len(list(tmp_path.glob("checkpoints/x/*.json"))) == 2


@pytest.mark.parametrize(
    "message",
    [
        "Unable to handle autograd's threading in combination with fork-based multiprocessing. See https://...",
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use 'spawn'",
    ],
)
def test_a_fork_that_torch_refuses_to_work_in_is_one_sentence(invented, tmp_path, monkeypatch, message):
    def refuse(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(session, "_train", refuse)
    with pytest.raises(ForkError, match="start the workers with the method 'spawn'"):
        run_experiment("x", TINY, tmp_path, invented, "cpu", compiled=False)
    assert not list(tmp_path.glob("checkpoints/x/*.json"))


def test_threads_train_at_once_what_they_train_alone(invented, tmp_path):
    def train(seed, out):
        return run_experiment("x", {**TINY, "seed": seed}, tmp_path / out, invented, "cpu", compiled=False)

    alone = train(0, "alone").digest
    barrier = threading.Barrier(4)

    def train_with_others(seed):
        barrier.wait()
        return train(seed, "together")

    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(train_with_others, range(4)))
    assert records[0].digest == alone
    assert len({record.digest for record in records}) == 4


# msgspec crashes the process, once in sixty times, where two threads build what it needs for a type.
TYPES = """
import gc, msgspec
import core.runs.record
def types(of):
    return [t for each in of.__subclasses__() for t in (each, *types(each))]
for each in types(msgspec.Struct):
    ours = each.__module__.startswith("core.") and each.__name__ != "About"
    if ours and "StructInfo" not in [type(r).__name__ for r in gc.get_referents(each)]:
        print(each.__name__)
"""


def test_types_are_built_when_they_are_imported():
    done = subprocess.run((sys.executable, "-c", TYPES), capture_output=True, text=True, check=True)
    assert done.stdout == ""
