"""What DVC shows of the runs, with real commands in copies of the project; weights on your own remote."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from msgspec.structs import replace

from core import predict
from core.data import cifar10
from core.data.identity import data_identity
from core.functional import model, step
from core.report import rebuild, tables, text
from core.report.catalog import Catalog
from core.runs import checkpoint
from core.runs.record import Finished, Metrics
from core.runs.run import Run
from tests.conftest import OFFLINE, REMOTE, ROOT, lacking
from tests.test_predict import metadata
from tests.test_report import failed, make, on_all, write

# An experiment of a grid, and one of the suite `ablation`.
GRID, PLUS = "wide-lr=0.001-dropout=0.2", "baseline+norm"


def command(project, *argv):
    """Run it there with no settings of this machine; returns its output."""
    home = project.parent / "home"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "DVC_", "XDG_"))}
    env |= {**OFFLINE, "HOME": str(home), "DVC_SITE_CACHE_DIR": str(home / "dvc"), "DVC_TEST": "true", "COLUMNS": "500"}
    env |= {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run([*map(str, argv)], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(project, *argv):
    return command(project, sys.executable, "-m", "dvc", *argv)


def git(project, *argv):
    return command(project, "git", *argv)


def commit(project):
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "runs")


@pytest.fixture
def project(tmp_path):
    """What DVC and Git read of the project, in a folder without Git."""
    folder = tmp_path / "project"
    for name in ("dvc.yaml", "data.dvc", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore", ".gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    return folder


@pytest.fixture
def with_data(project):
    """The same, with the remote of the data beside it."""
    if not REMOTE.exists():
        lacking(f"the DVC remote {REMOTE} is not there")
    shutil.copytree(REMOTE, project.parent / "shared" / "dvc-remote", copy_function=os.symlink)
    return project


def train(project, spec, data):
    """Write the files of a finished run; returns the path of its weights."""
    params, stats = model.init(spec, spec["seed"])
    weights = {**params, **stats}
    test = Metrics(**step.evaluate(params, stats, data.test_images, data.test_labels, spec))
    about = metadata(spec, weights, test, data)
    record = replace(make("x", **spec), digest=about.digest, data=about.data)
    write(project, [replace(record, metrics=replace(record.metrics, test=test))])
    path = Run("x", about.spec, project).weights
    checkpoint.save(path, weights, about)
    rebuild.rebuild(project, Catalog())
    return path


def columns(table):
    """The second line of a table, by the words of the first."""
    headings, values = (line.split() for line in table.splitlines())
    return dict(zip(headings, values, strict=True))


def drawn(project):
    """The pictures on the page that `dvc plots` wrote."""
    page = (project / "dvc_plots" / "index.html").read_text()
    return [json.loads(found) for found in re.findall(r"var spec = (.*);", page)]


# The file


def found(out):
    return json.loads((out / tables.METRICS_JSON).read_text())


def test_metrics_are_the_means_of_the_rows_of_the_tables(tmp_path):
    for seed in (0, 1):
        write(tmp_path, [make(f"x{i}", seed=seed, validation=0.3 + i / 100, test=0.5 + seed / 100) for i in range(40)])
    write(tmp_path, [on_all("record", seed=seed, test=0.7 + seed / 100) for seed in (0, 1)])
    rebuild.rebuild(tmp_path, Catalog())
    best = {f"x{i}" for i in range(40 - text.ROWS, 40)}
    means = found(tmp_path)
    assert means.pop(tables.TRAINED_ON_ALL) == {"record": 0.705}
    assert {split: values.keys() for split, values in means.items()} == {"test": best, "validation": best}
    assert (means["test"]["x39"], means["validation"]["x39"]) == (0.505, 0.69)


def test_failed_runs_have_no_metrics(tmp_path):
    write(tmp_path, [failed("a")])
    rebuild.rebuild(tmp_path, Catalog())
    assert found(tmp_path) == {"test": {}, tables.TRAINED_ON_ALL: {}, "validation": {}}


# The commands


@pytest.mark.slow
def test_dvc_compares_two_commits(project):
    git(project, "init", "--quiet")
    for more in (0, 0.05):
        write(project, [make(GRID, test=0.5 + more, validation=0.5 + more, lr=0.01), make(PLUS, test=0.4, epochs=12)])
        write(project, [on_all("record", test=0.7)])
        rebuild.rebuild(project, Catalog())
        commit(project)
    # Names with dots, equals and plus signs are whole.
    shown = columns(dvc(project, "metrics", "show"))
    assert (shown[f"test.{GRID}"], shown[f"validation.{GRID}"], shown[f"test.{PLUS}"]) == ("0.55", "0.55", "0.4")
    assert shown[f"{tables.TRAINED_ON_ALL}.record"] == "0.7"
    changes = [line.split() for line in dvc(project, "metrics", "diff", "HEAD~1").splitlines()[1:]]
    assert changes == [
        [tables.METRICS_JSON, f"{split}.{GRID}", "0.5", "0.55", "0.05"] for split in ("test", "validation")
    ]
    _, last, before = csv.DictReader(dvc(project, "exp", "show", "-n", 2, "--csv").splitlines())
    assert (before[f"test.{GRID}"], last[f"test.{GRID}"], last[f"test.{PLUS}"]) == ("0.5", "0.55", "0.4")

    dvc(project, "plots", "show")
    accuracy, loss, train_loss = drawn(project)
    assert [each["title"] for each in (accuracy, loss, train_loss)] == [
        *("validation accuracy", "validation loss", "train loss")
    ]
    values = train_loss["data"]["values"]
    assert {row["experiment"] for row in values if row[train_loss["encoding"]["y"]["field"]]} == {GRID, PLUS, "record"}
    x, y, color = (accuracy["encoding"][channel]["field"] for channel in ("x", "y", "color"))
    assert [(row[x], row[y]) for row in accuracy["data"]["values"] if row[color] == "record"] == [("1", ""), ("2", "")]
    assert accuracy["transform"] == [{"filter": f"datum['{y}'] !== ''"}]
    lines = {name: [row for row in accuracy["data"]["values"] if row[color] == name] for name in (GRID, PLUS)}
    assert [row[x] for row in lines[PLUS]] == [str(epoch) for epoch in range(1, 13)]
    assert [float(row[y]) for row in lines[GRID]] == pytest.approx([0.45, 0.5])
    dvc(project, "plots", "diff", "HEAD~1")
    accuracy, *_ = drawn(project)
    ends = {row["rev"]: float(row[y]) for row in accuracy["data"]["values"] if row[color] == GRID}
    assert ends == pytest.approx({"HEAD~1": 0.45, "workspace": 0.5})
    assert accuracy["encoding"]["strokeDash"]["field"] == "rev"
    assert git(project, "status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.parametrize("in_git", [True, False])
def test_data_comes_beside_finished_runs(with_data, in_git, small_spec, invented):
    project = with_data
    if in_git:
        git(project, "init", "--quiet")
    else:
        dvc(project, "config", "--local", "core.no_scm", "true")
    train(project, small_spec(), invented)
    before = {path: path.read_bytes() for path in (project / "checkpoints").rglob("*") if path.is_file()}
    dvc(project, "pull")
    assert not cifar10.ARCHIVE.missing(project / "data")
    assert {path: path.read_bytes() for path in (project / "checkpoints").rglob("*") if path.is_file()} == before
    train(project, small_spec(seed=1), invented)
    assert dvc(project, "status") == "Data and pipelines are up to date.\n"
    if not in_git:
        assert columns(dvc(project, "metrics", "show"))["test.x"]
        dvc(project, "plots", "show")
        assert len(drawn(project)) == 3


@pytest.mark.slow
def test_weights_go_through_a_remote(project, small_spec, invented, tmp_path):
    (project / "data.dvc").unlink()  # the data have a remote of their own here
    git(project, "init", "--quiet")
    path = train(project, small_spec(), invented)
    saved = path.read_bytes()
    dvc(project, "remote", "add", "--default", "team", tmp_path / "remote")
    dvc(project, "add", "--glob", "checkpoints/*/*.safetensors")
    dvc(project, "push")
    commit(project)
    kept = set(git(project, "ls-files", "checkpoints/x").split())
    assert {path for path in kept if not path.endswith(".diff.gz")} == {
        f"checkpoints/x/{path.stem}.json",
        f"checkpoints/x/{path.name}.dvc",
    }
    assert dvc(project, "status") == "Data and pipelines are up to date.\n"

    clone = tmp_path / "clone"
    git(project, "clone", "--quiet", project, clone)
    there = clone / path.relative_to(project)
    run = Run("x", small_spec(), clone)
    assert run.finished(data_identity(invented)) is None
    dvc(clone, "pull")
    assert there.read_bytes() == saved
    assert isinstance(run.finished(data_identity(invented)), Finished)
    network = predict.load(there)
    assert predict.evaluate(there, network, invented).same
    rebuild.rebuild(clone, Catalog())
    assert git(clone, "status", "--porcelain") == ""
    assert all(torch.equal(network.params[name], t) for name, t in model.init(small_spec(), 0)[0].items())
