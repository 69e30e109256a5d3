"""Commit and uncommitted changes of the code: what a record says of them, and what is kept beside it."""

import gzip
import hashlib
import os
import random
import shutil
import subprocess

import pytest
import torch

from core import run_experiment
from core.mode import Mode
from core.runs import checkout, provenance
from core.runs.checkout import Checkout, keep_diff, read
from core.runs.files import sweep_all
from core.runs.record import read_record, read_records
from core.runs.run import Run

SPEC = {"widths": [8], "epochs": 1, "batch_size": 100}


def git(folder, *arguments, **options):
    author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    return subprocess.run(("git", "-C", folder, *author, *arguments), check=True, capture_output=True, **options).stdout


def commit(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "HEAD").decode()[:12]


@pytest.fixture(autouse=True)
def _no_settings_of_git(monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "core").mkdir(parents=True)
    (root / "experiments").mkdir()
    for name in ("main.py", "pyproject.toml", "core/model.py", "core/optim.py", "experiments/ours.py"):
        (root / name).write_text(f"name = {name!r}\n")
    (root / ".gitignore").write_text("*.tmp.py\n")
    git(root, "init", "--quiet")
    commit(root)
    return root


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and ".git" not in p.parts}


def test_the_commit_is_that_of_the_code_whatever_the_variables_of_git_say(project, tmp_path, monkeypatch):
    head = git(project, "rev-parse", "HEAD").decode()[:12]
    other = tmp_path / "other"
    shutil.copytree(project, other)
    (other / "core" / "model.py").write_text("")
    commit(other)
    for variables in (
        {"GIT_DIR": other / ".git"},
        {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other},
        {"GIT_INDEX_FILE": other / ".git" / "index"},
        {"GIT_CEILING_DIRECTORIES": project.parent, "GIT_NAMESPACE": "x"},
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        assert read(project) == Checkout(head, b"")
        for name in variables:
            monkeypatch.delenv(name)


def test_without_git_and_in_the_repository_of_something_else_the_commit_is_unknown(project, monkeypatch):
    shutil.rmtree(project / ".git")
    assert read(project) == Checkout("unknown", b"")
    git(project.parent, "init", "--quiet")
    (project.parent / "notes.txt").write_text("")
    git(project.parent, "add", "notes.txt")
    git(project.parent, "commit", "--quiet", "--message", "x")
    assert read(project) == Checkout("unknown", b"")
    monkeypatch.setenv("PATH", "/nowhere")
    assert read(project) == Checkout("unknown", b"")


@pytest.mark.parametrize("place", [".", "deep/er"])
def test_commit_and_diff_bring_the_code_back(project, tmp_path, place):
    """Changed, deleted, staged, binary and new files; in a repository of its own, or in a folder of a larger one."""
    if place != ".":
        outer = tmp_path / "outer"
        shutil.move(project, outer / place)
        shutil.rmtree(outer / place / ".git")
        git(outer, "init", "--quiet")
        commit(outer)
        project = outer
    root, clone = project / place, tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", project, clone)
    (root / "core" / "model.py").write_text("name = 'another'\n")
    (root / "core" / "optim.py").unlink()
    (root / "core" / "staged.py").write_text("x = 1\n")
    git(root, "add", "core/staged.py")
    (root / "core" / "model.py").chmod(0o755)
    (root / "core" / "list.txt").write_bytes(bytes(range(256)))
    git(root, "add", "core/list.txt")
    (root / "core" / "new").mkdir()
    (root / "core" / "new" / "[a] file ü.py").write_text("y = 2\n")
    for name in ("core/ignored.tmp.py", "notes.py", "core/large.bin"):  # not code
        (root / name).write_text("")
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(root, "config", key, value)
    before = git(root, "status", "--porcelain"), (project / ".git" / "index").read_bytes()
    found = read(root)
    assert (git(root, "status", "--porcelain"), (project / ".git" / "index").read_bytes()) == before
    assert found.commit == git(root, "rev-parse", "HEAD").decode()[:12] + "+"
    git(clone, "apply", "-", input=found.diff)
    expected = files(root)
    for name in ("core/ignored.tmp.py", "notes.py", "core/large.bin"):
        del expected[name]
    assert files(clone / place) == expected
    assert os.access(clone / place / "core" / "model.py", os.X_OK)
    assert read(root) == found


@pytest.fixture
def changed(monkeypatch):
    """A function that gives this code such uncommitted changes."""

    def change(diff):
        for module in (checkout, provenance):
            monkeypatch.setattr(module, "checkout", lambda: Checkout("0" * 12 + "+", diff))

    return change


def test_the_diff_is_kept_beside_the_record_that_has_its_hash(changed, invented, tmp_path):
    """A run without changes, or one that cannot keep them, leaves none of an earlier run."""

    def train(diff):
        changed(diff)
        record = run_experiment("x", SPEC, tmp_path, invented, "cpu", compiled=False, force=True)
        assert read_record(run.record) == record
        return record.environment.diff

    run = Run("x", SPEC, tmp_path)
    diffs = [b"--- a\n+++ b\n", b"--- b\n+++ a\n"]
    for diff in diffs:
        assert train(diff) == hashlib.sha256(diff).hexdigest()
        assert gzip.decompress(run.diff.read_bytes()) == diff
    packed = run.diff.read_bytes()
    train(diffs[1])
    assert run.diff.read_bytes() == packed, "the same changes are the same file"
    assert sorted(path.name for path in run.folder.iterdir() if path.suffix != ".lock") == [
        run.diff.name,
        run.record.name,
        run.weights.name,
    ]
    left = run.diff.with_name(f"{run.diff.name}.123.tmp")  # by a process that was killed
    left.touch()
    sweep_all(tmp_path)
    assert not left.exists()
    assert [record.spec_id for record in read_records(tmp_path)] == [run.id]
    assert train(b"") == ""
    assert not run.diff.exists()
    train(diffs[0])
    too_large = random.Random(0).randbytes(checkout.LARGEST)
    assert train(too_large) == hashlib.sha256(too_large).hexdigest()
    assert not run.diff.exists()


def test_a_diff_of_another_machine_is_not_kept(changed, tmp_path):
    """A worker says in its record which changes it had; this process keeps its own if they are the same."""
    run, mine = Run("x", {}, tmp_path), b"--- a\n+++ b\n"
    run.folder.mkdir(parents=True)
    changed(b"other")
    elsewhere = provenance.environment(torch.device("cpu"), Mode("eager"))
    changed(mine)
    here = provenance.environment(torch.device("cpu"), Mode("eager"))
    keep_diff(run, here)
    assert gzip.decompress(run.diff.read_bytes()) == mine
    keep_diff(run, elsewhere)
    assert not run.diff.exists()


def test_this_process_reads_its_code_once():
    """Later changes do not count."""
    assert checkout.checkout() is checkout.checkout()
