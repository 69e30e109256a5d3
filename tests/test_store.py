"""Files are written completely or not at all, locks end with their process, and special files are refused."""

import errno
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest
from PIL import Image

from core import images, predict, run_experiment, store
from core.data import cifar10
from core.errors import UserError
from core.report.catalog import Catalog
from core.report.rebuild import rebuild
from core.runs import checkpoint, files
from core.runs.record import ResumePoint, read_record, read_records, write_record
from core.runs.run import Run
from core.store import Held, StoreError, locked
from core.verify import check_finished
from tests.conftest import FORK, ROOT
from tests.test_report import failed, make

FINISHED = make("x")
ID = FINISHED.spec_id


def python(source, *arguments):
    """A process of its own, which takes a moment since it needs no torch."""
    return subprocess.Popen(
        (sys.executable, "-c", source, *map(str, arguments)),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run(tmp_path):
    run = Run("x", FINISHED.spec, tmp_path)
    run.folder.mkdir(parents=True)
    return run


# Writing


@pytest.mark.parametrize("fails", ["open", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, fails):
    path = tmp_path / "a"
    store.atomic_write(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "open":
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(store.os, fails, full)
    with pytest.raises(StoreError, match=f"cannot write {path}: No space left on device"):
        store.atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.atomic_write(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut a renamed file may else be empty."""
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(store.os, name, lambda *a, name=name, call=call: (calls.append(name), call(*a)))
    store.atomic_write(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the last one is the folder's


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced_is_no_failure_and_a_broken_disk_is(tmp_path, monkeypatch, code, kind):
    """Some network file systems have no fsync for folders."""
    fsync = os.fsync

    def fails(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (kind == "folder"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(store.os, "fsync", fails)
    path = tmp_path / "a"
    if kind == "folder" and code != errno.EIO:
        store.atomic_write(path, b"new")
        assert path.read_bytes() == b"new"
    else:
        with pytest.raises(StoreError, match=f"^cannot write {path}: {os.strerror(code)}$"):
            store.atomic_write(path, b"new")


def test_missing_disk_space_is_reported_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "a"
    store.reserve(path, 1 << 20, 3)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage(9, 0, 3 << 20))
    store.reserve(path, 1 << 20, 3)
    with pytest.raises(StoreError, match=rf"cannot write {path}: 4,194,304 bytes are needed, 3,145,728 are free"):
        store.reserve(path, 1 << 20, 4)
    with pytest.raises(StoreError, match="cannot write"):
        store.reserve(tmp_path / "missing" / "a", 1, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EFBIG])
def test_a_failed_reservation_is_ignored_and_a_limit_is_not(tmp_path, monkeypatch, code):
    """musl and some file systems cannot reserve; a quota, or a limit on the size of files, still refuses."""

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store.os, "posix_fallocate", fails)
    if code == errno.EFBIG:
        with pytest.raises(StoreError, match=r"cannot write .*: File too large"):
            store.reserve(tmp_path / "a", 10, 1)
    else:
        store.reserve(tmp_path / "a", 10, 1)
    assert not list(tmp_path.iterdir())


def test_a_file_that_only_its_owner_may_replace_is_reported_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.touch()
    tmp_path.chmod(0o1777)  # as /tmp has it
    store.reserve(path, 1, 1)
    monkeypatch.setattr(store.os, "geteuid", lambda: 12345)
    with pytest.raises(StoreError, match=rf"cannot write {path}: it belongs to another user"):
        store.reserve(path, 1, 1)
    store.reserve(tmp_path / "b", 1, 1)
    tmp_path.chmod(0o777)
    store.reserve(path, 1, 1)


def busy(call, times, winerror=32):
    """A call that fails so many times, as on Windows where a program has the file open."""
    tries = []

    def fails(*arguments, **options):
        tries.append(arguments)
        if len(tries) <= times:
            error = PermissionError(errno.EACCES, "in use")
            error.winerror = winerror
            raise error
        call(*arguments, **options)

    return fails, tries


@pytest.mark.parametrize("winerror", store.OPEN_ELSEWHERE)
def test_a_file_that_a_virus_scanner_has_open_is_replaced_and_deleted_a_moment_later(tmp_path, monkeypatch, winerror):
    path = tmp_path / "a"
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, busy(getattr(os, name), 3, winerror)[0])
    store.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    store.delete(path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_stays_open_in_another_program_is_named(tmp_path, monkeypatch):
    """As long as Excel shows results.csv."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    reason = "another program has it open, or it is read-only"
    monkeypatch.setattr(os, "replace", busy(os.replace, 10**9)[0])
    with pytest.raises(StoreError, match=f"^cannot write {path}: {reason}$"):
        store.atomic_write(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "unlink", busy(os.unlink, 10**9)[0])
    with pytest.raises(StoreError, match=f"^cannot delete {path}: {reason}$"):
        store.delete(path)
    assert path.read_bytes() == b"old"


def test_what_may_not_be_replaced_is_not_tried_again(tmp_path, monkeypatch):
    fails, tries = busy(os.replace, 10**9, winerror=None)  # no such attribute elsewhere than on Windows
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StoreError, match="in use"):
        store.atomic_write(tmp_path / "a", b"new")
    assert len(tries) == 1


# Locks


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_before_anything_starts(tmp_path, monkeypatch, invented, code):
    """As on some Lustre and NFS. Without a lock, two processes could train one run."""
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def fails(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            raise OSError(code, os.strerror(code))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", fails)
    said = rf"^the file system of {tmp_path}/checkpoints\S* has no locks \({os.strerror(code)}\), .*: choose a folder"
    for start in (
        lambda: files.sweep_all(tmp_path),
        lambda: run_experiment("x", {"widths": [8]}, tmp_path, invented, "cpu", compiled=False),
    ):
        with pytest.raises(StoreError, match=said):
            start()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


HOLD = """
import json, sys, time
from pathlib import Path
from core.runs.run import Run
with Run("x", json.loads(sys.argv[2]), Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(run, tmp_path):
    holder = python(HOLD, tmp_path, json.dumps(FINISHED.spec))
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"^process {holder.pid} on "), run.lock():
        pass
    with Run("x", {"seed": 1}, tmp_path).lock():  # another run of the same experiment
        pass
    holder.kill()
    holder.wait()
    with run.lock():
        pass
    assert not run.folder.joinpath(f"{ID}.owner").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_process_that_waits_for_a_stopped_one_shows_how_to_wake_it(tmp_path, caplog):
    """Ctrl-Z while results.md is written: another `run` or `report` waits, and names the process."""
    locked = 'Run("x", json.loads(sys.argv[2]), Path(sys.argv[1])).lock()'
    hold = HOLD.replace(locked, "lock_results(Path(sys.argv[1]))").replace("time.sleep(60)", "input()")
    holder = python(hold.replace("core.runs.run import Run", "core.runs.files import lock_results"), tmp_path)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    waiter = threading.Thread(target=files.sweep_all, args=(tmp_path,))
    waiter.start()
    end = time.monotonic() + 30
    while not caplog.messages:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert caplog.messages == [
        f"waiting for process {holder.pid} on {platform.node()}, which holds {tmp_path}/checkpoints/results.lock; "
        f"if it is stopped, `kill -CONT {holder.pid}` lets it go on"
    ]
    holder.send_signal(signal.SIGCONT)
    holder.communicate("\n")
    waiter.join(timeout=30)
    assert not waiter.is_alive()
    assert not (tmp_path / "checkpoints" / "results.owner").exists()


COUNT = """
import sys
from pathlib import Path
from core import store
path = Path(sys.argv[1])
for _ in range(50):
    with store.locked(path.with_suffix(".lock")):
        store.atomic_write(path, str(int(path.read_text()) + 1).encode())
"""


def test_no_update_under_a_lock_is_lost(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    counters = [python(COUNT, path) for _ in range(4)]
    assert [counter.wait(timeout=60) for counter in counters] == [0] * 4
    assert path.read_text() == "200"


REPORT = """
import sys
from pathlib import Path
from core.report.catalog import Catalog
from core.report.rebuild import rebuild
from core.runs.run import Run
from core.runs.record import write_record
from tests.test_report import make
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 4):
    record = make(f"x{seed}", seed=seed)
    run = Run(record.name, record.spec, Path(sys.argv[1]))
    run.folder.mkdir(parents=True)
    write_record(run.record, record)
    rebuild(Path(sys.argv[1]), Catalog())
"""


@pytest.mark.slow
def test_processes_that_rebuild_at_once_lose_no_row(tmp_path):
    writers = [python(REPORT, tmp_path, first) for first in (0, 4, 8)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 3
    text = (tmp_path / "results.md").read_text()
    assert all(f"| x{seed} |" in text for seed in range(12))


# Paths


def test_a_tilde_is_the_home_folder_from_python_too(monkeypatch, tmp_path, invented):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record = run_experiment(
        "x", {"widths": [8], "epochs": 1, "batch_size": 500}, "~/a", invented, "cpu", compiled=False
    )
    path = f"~/a/checkpoints/x/{record.spec_id}.safetensors"
    network = predict.load(path)
    assert predict.evaluate(path, network, invented).same
    assert check_finished(Run("x", record.spec, "~/a"), record.data) == record
    assert list(read_records("~/a")) == [record]
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    assert images.read("~/b.png").shape == (3, 32, 32)
    assert images.find(["~/b.png"]) == [tmp_path / "b.png"]
    rebuild("~/a", Catalog())
    assert (tmp_path / "a" / "results.md").exists()
    assert not (tmp_path / "~").exists()


# What killed processes left


def test_the_sweep_deletes_leftovers_and_nothing_else(run, tmp_path):
    other = Run("y", FINISHED.spec, tmp_path)
    other.folder.mkdir()
    kept = [run.weights, run.record, run.resume_point(7), other.resume_point(5)]
    kept += [tmp_path / "checkpoints" / "notes.md", tmp_path / "a.tmp", tmp_path / "results.md.mine.tmp"]
    swept = [
        run.folder / f"{ID}.json.77.tmp",
        other.folder / f"{ID}.step-0000000005.safetensors.77.tmp",
        other.folder / f"{'0' * 12}.owner.77.tmp",
        other.folder / f"{'1' * 12}.owner",
        tmp_path / "results.md.77.tmp",
        tmp_path / "checkpoints" / "learning-curves.svg.77.tmp",
        tmp_path / "checkpoints" / "metrics.json.77.tmp",
        tmp_path / "checkpoints" / "search-s.svg.77.tmp",
        tmp_path / "checkpoints" / "search-s.journal.77.tmp",
        tmp_path / "checkpoints" / "search-s.owner",
    ]
    for path in kept + swept:
        path.write_text("{}")
    files.sweep_all(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in swept)


def test_the_sweep_skips_a_search_in_progress(tmp_path):
    folder = tmp_path / "checkpoints"
    with locked(folder / "search-s.2.lock", folder / "search-s.2.owner"):
        kept, swept = folder / "search-s.2.json.77.tmp", folder / "search-s.2.svg.77.tmp"
        for path in (kept, swept):
            path.touch()
        files.sweep_all(tmp_path)
        assert kept.exists()
        assert (folder / "search-s.2.owner").exists()
        assert not swept.exists(), "the report draws the picture"


def test_the_sweep_skips_a_run_in_progress(run, tmp_path):
    temporary, owner = run.folder / f"{ID}.json.77.tmp", run.folder / f"{ID}.owner"
    temporary.touch()
    holder = python(HOLD, tmp_path, json.dumps(FINISHED.spec))
    assert holder.stdout.readline() == "held\n"
    files.sweep_all(tmp_path)
    assert temporary.exists()
    assert owner.exists()
    holder.kill()
    holder.wait()
    files.sweep_all(tmp_path)
    assert not temporary.exists()
    assert not owner.exists()


# Records and resume points


def test_resume_points_come_newest_first(run):
    for step in (99_999_999, 100_000_000, 2_250_000_000, 5):
        run.resume_point(step).touch()
    steps = [int(path.name.split("-")[1].split(".")[0]) for path in run.resume_points()]
    assert steps == [2_250_000_000, 100_000_000, 99_999_999, 5]


def test_an_experiment_beside_one_whose_name_differs_only_in_case_is_refused(run, tmp_path, invented):
    """On Windows and macOS both would write into one folder; here a link makes it one."""
    write_record(run.record, FINISHED)
    said = f"^{run.folder} differs from the name X only in case"
    with pytest.raises(UserError, match=said):
        run_experiment("X", {"widths": [8]}, tmp_path, invented, "cpu", compiled=False)
    assert not (tmp_path / "checkpoints" / "X").exists()
    (tmp_path / "checkpoints" / "X").symlink_to(run.folder)
    with pytest.raises(UserError, match=said):
        Run("X", FINISHED.spec, tmp_path).finished(FINISHED.data)


def test_a_run_is_finished_with_its_record_and_its_weights(run):
    assert run.finished(FINISHED.data) is None
    write_record(run.record, FINISHED)
    assert run.finished(FINISHED.data) is None
    run.weights.touch()
    assert run.finished(FINISHED.data) == run.result() == FINISHED
    run.resume_point(7).touch()  # it is being trained again
    assert run.finished(FINISHED.data) is None
    assert run.result() == FINISHED
    run.resume_point(7).unlink()
    write_record(run.record, failed("x"))
    assert run.finished(FINISHED.data) is None


# What is no file, or too large for one


def refusal(read):
    """What is said where something is refused. A fork of this process reads it, with a minute and 2 GB more than it
    has: to wait for a pipe, or to read a device to its end, fails the test and does nothing worse."""
    import resource

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            signal.alarm(60)
            with open("/proc/self/statm") as file:
                has = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (has + (2 << 30),) * 2)
            read()
        except UserError as error:
            said = str(error)
        except BaseException as error:
            said = f"{type(error).__name__} rather than a sentence"
        finally:
            os.write(writer, said.encode(errors="backslashreplace"))
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    os.waitpid(child, 0)
    return said or "nothing, within a minute"


def sparse(path):
    path.touch()
    os.truncate(path, 200 << 30)


def make_pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs pipes in folders")
    os.mkfifo(path)


STRANGE = {
    "pipe": (make_pipe, "it is not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
    "folder": (os.mkdir, "Is a directory"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "200 GB": (sparse, "214,748,364,800 bytes"),
}
PLACES = {
    "record": (f"checkpoints/x/{ID}.json", read_record),
    "weights": (f"checkpoints/x/{ID}.safetensors", predict.load),
    "resume point": (
        f"checkpoints/x/{ID}.step-0000000005.safetensors",
        lambda path: checkpoint.load(path, ResumePoint, lambda _: {}),
    ),
    "batch": (
        f"{cifar10.ARCHIVE.folder}/test_batch",
        lambda path: cifar10.ARCHIVE.verified(path.parents[1], path.name),
    ),
}


@FORK
@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("place", PLACES)
def test_a_special_file_is_refused_before_it_is_read(tmp_path, place, strange):
    name, read = PLACES[place]
    make_strange, reason = STRANGE[strange]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    make_strange(path)
    said = refusal(lambda: read(path))
    assert said.isprintable()
    assert str(path) in said
    assert reason in said


@pytest.fixture
def ask(tmp_path):
    """Asks for a lock that somebody holds, who is named in tmp_path/owner."""

    def ask():
        with store.locked(tmp_path / "lock", tmp_path / "owner", timeout=0):
            pass

    with store.locked(tmp_path / "lock"):
        yield ask


@FORK
@pytest.mark.parametrize("strange", STRANGE)
def test_a_holder_in_an_unreadable_file_is_another_process(ask, tmp_path, strange):
    STRANGE[strange][0](tmp_path / "owner")
    assert refusal(ask) == "another process"


@pytest.mark.parametrize("words", [b"", b"\xff", b"a\nb", b"\x1b[31m", "\u202e".encode(), b"x" * 1001])
def test_a_holder_with_an_invalid_name_is_another_process(ask, tmp_path, words):
    (tmp_path / "owner").write_bytes(words)
    with pytest.raises(Held, match=r"^another process$"):
        ask()
