"""Files that are whole or as they were, locks that die with their process, records that say when they are damaged."""

import copy
import errno
import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from core.runs import files, record, store
from core.runs.files import Run
from core.runs.store import Held, StoreError
from tests.conftest import ROOT
from tests.test_report import make

ID = "0123456789ab"
FINISHED = {**make("x"), "spec_id": ID}


def python(source, *arguments):
    """A process of its own, which takes a moment since it needs no torch."""
    return subprocess.Popen(
        (sys.executable, "-c", source, *map(str, arguments)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, "x", ID)
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


def test_room_is_known_beforehand(tmp_path, monkeypatch):
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


# Locks

HOLD = """
import sys, time
from pathlib import Path
from core.runs.files import Run
with Run(Path(sys.argv[1]), "x", sys.argv[2]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_dies_with_it(run, tmp_path):
    holder = python(HOLD, tmp_path, ID)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"^process {holder.pid} on "), run.lock():
        pass
    with Run(tmp_path, "x", "0" * 12).lock():  # another run of the same experiment
        pass
    holder.kill()
    holder.wait()
    with run.lock():
        pass
    assert not run.folder.joinpath(f"{ID}.owner").exists()


COUNT = """
import sys
from pathlib import Path
from core.runs import store
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
import json, sys
from pathlib import Path
from core.report import rebuild
from core.runs import files, store
out, source, first = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
for seed in range(first, first + 4):
    run = files.Run(out, f"x{seed}", f"{seed:012x}")
    run.folder.mkdir(parents=True)
    store.write_json(run.record, {**source, "name": f"x{seed}", "spec_id": run.spec_id, "seed": seed})
    rebuild.rebuild(out, {})
"""


@pytest.mark.slow
def test_processes_that_rebuild_at_once_lose_no_row(tmp_path):
    source = next((ROOT / "checkpoints").glob("*/*.json"), None)
    if source is None:
        pytest.skip("there is no record in checkpoints/ to make others of: `uv run main.py` leaves some")
    writers = [python(REPORT, tmp_path, source, first) for first in (0, 4, 8)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 3
    text = (tmp_path / "results.md").read_text()
    assert all(f"| x{seed} |" in text for seed in range(12))


# What killed processes left


def test_the_sweep_takes_what_nobody_needs_and_nothing_else(run, tmp_path):
    other = Run(tmp_path, "y", ID)
    other.folder.mkdir()
    kept = [run.weights, run.record, run.resume_point(7), other.resume_point(5)]
    kept += [tmp_path / "checkpoints" / "notes.md", tmp_path / "a.tmp", tmp_path / "results.md.mine.tmp"]
    swept = [
        run.folder / f"{ID}.json.77.tmp",
        other.folder / f"{ID}.step-0000000005.safetensors.77.tmp",
        other.folder / f"{'0' * 12}.owner.77.tmp",
        tmp_path / "results.md.77.tmp",
        tmp_path / "checkpoints" / "learning-curves.svg.77.tmp",
    ]
    for path in kept + swept:
        path.write_text(json.dumps(FINISHED))
    files.sweep_all(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in swept)


def test_the_sweep_leaves_a_run_alone_that_is_under_way(run, tmp_path):
    temporary = run.folder / f"{ID}.json.77.tmp"
    temporary.touch()
    holder = python(HOLD, tmp_path, ID)
    assert holder.stdout.readline() == "held\n"
    files.sweep_all(tmp_path)
    assert temporary.exists()
    holder.kill()
    holder.wait()
    files.sweep_all(tmp_path)
    assert not temporary.exists()


# Records and resume points


def test_resume_points_come_newest_first(run):
    for step in (99_999_999, 100_000_000, 2_250_000_000, 5):
        run.resume_point(step).touch()
    steps = [int(path.name.split("-")[1].split(".")[0]) for path in run.resume_points()]
    assert steps == [2_250_000_000, 100_000_000, 99_999_999, 5]


def test_a_run_is_finished_with_its_record_and_its_weights(run):
    assert run.finished() is None
    store.write_json(run.record, FINISHED)
    assert run.finished() is None
    run.weights.touch()
    assert run.finished() == run.result() == FINISHED
    run.resume_point(7).touch()  # it is being trained again
    assert run.finished() is None
    assert run.result() == FINISHED
    run.resume_point(7).unlink()
    store.write_json(run.record, {**FINISHED, "status": "failed", "error": "NaN"})
    assert run.finished() is None


def changed(value, *where):
    """A finished record with another value somewhere, or without it."""
    record = copy.deepcopy(FINISHED)
    inner = record
    for key in where[:-1]:
        inner = inner[key]
    if value is None:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return record


WRONG = [
    changed({}, "metrics"),
    changed([], "history"),
    changed([{}], "history"),
    changed(None, "spec", "lr"),
    changed("fast", "spec", "lr"),
    changed({}, "environment"),
    changed(None, "environment", "threads"),
    changed("x", "metrics", "test", "accuracy"),
    changed(7.5, "metrics", "test", "accuracy"),
    changed(float("nan"), "metrics", "test", "loss"),
    changed(0, "metrics", "validation", "n"),
    changed(True, "metrics", "validation", "n"),
    changed(5, "digest"),
    changed([], "name"),
    changed(None, "bitwise"),
]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "null",
        '"finished"',
        "{}",
        '{"status": "finished"}',
        '{"status": []}',
        "\0",
        "\x80",
        *(json.dumps(record) for record in WRONG),
    ],
    ids=range(11 + len(WRONG)),
)
def test_a_damaged_record_is_named_rather_than_left_out(run, tmp_path, text):
    run.record.write_bytes(text.encode("latin-1"))
    run.weights.touch()
    for read in (run.finished, lambda: record.records(tmp_path)):
        with pytest.raises(StoreError, match=f"{run.record} is damaged or not a record .* delete it"):
            read()


def test_a_record_has_no_nan(run):
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(run.record, {"loss": float("nan")})
    assert not run.record.exists()
