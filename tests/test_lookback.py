"""What looks back at runs: --json, records(), diff, clean; and options without an effect."""

import importlib.util
import json
import mmap
import os
import re

import pytest
from msgspec.structs import replace

import main
from core import code_hash, histories, records
from core.compile import cache
from core.report import plots, tables
from core.runs.run import Run
from experiments import SUITES
from tests.conftest import ROOT, lacking
from tests.test_report import failed, make, on_all, write


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Runs main.py in this process, without pictures; returns status, stdout and stderr. The folder is tmp_path."""
    monkeypatch.setattr(plots, "draw", lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture))
    monkeypatch.setenv("COLUMNS", "80")

    def ask(*argv):
        status = main.main([*map(str, argv), *(() if "--out" in argv else ("--out", str(tmp_path)))])
        return status, *capsys.readouterr()

    return ask


def test_json_of_runs_is_one_object_a_line_and_everything_else_is_on_stderr(ask):
    command = ("run", "demo", "widths=8", "epochs=1", "--seeds", 2, "--json")
    _, plan, said = ask(*command, "--dry-run")
    assert "2 runs, 2 to train" in said
    assert [json.loads(line)["status"] for line in plan.splitlines()] == ["to train"] * 2
    status, first, said = ask(*command)
    assert (status, "first step" in said, "samples/s" in said) == (0, True, False)
    rows = [json.loads(line) for line in first.splitlines()]
    assert [(row["experiment"], row["status"], row["seed"]) for row in rows] == [
        ("demo", "finished", 0),
        ("demo", "finished", 1),
    ]
    assert rows[0]["spec_id"] == json.loads(plan.splitlines()[0])["spec_id"]
    assert 0.1 < rows[0]["test_accuracy"] < 1
    status, again, said = ask(*command)
    assert (status, again) == (0, first)
    assert "2 of 2 runs are finished already" in said
    assert ask("report")[1].endswith("rebuilt from 2 records\n"), "the next call without --json"


def test_quiet_prints_errors_alone(ask):
    command = ("run", "demo", "widths=8", "epochs=1", "--quiet", "--force")
    assert ask(*command) == (0, "", ""), "neither the note on the data nor the option without effect"
    status, out, said = ask(*command, "seed=1", "lr=1e30")
    assert (status, out) == (1, "")
    assert said.startswith("demo seed 1 failed: ")
    status, out, said = ask(*command, "--json")
    assert (status, said, len(out.splitlines())) == (0, "", 1)
    assert ask("report")[1].endswith("rebuilt from 2 records\n"), "the next call without --quiet"
    status, _, said = ask(*command, "--verbose")
    assert (status, "not allowed with argument" in said) == (2, True)


def test_json_of_list_has_each_experiment_and_each_key(ask):
    status, out, _ = ask("list", "--json")
    found = {(row["suite"], row["experiment"]): row for row in map(json.loads, out.splitlines())}
    assert status == 0
    assert found["learning-rate", "lr-5e-4"]["lr"] == 5e-4
    assert found["learning-rate", "lr-5e-4"]["estimated_bytes"] > 10e6
    keys = [json.loads(line)["key"] for line in ask("list", "--keys", "--json")[1].splitlines()]
    assert keys[:2] == ["widths", "expansion"]


def in_environment(record, digest="0" * 64, exact=True, **changes):
    return replace(record, digest=digest, exact=exact, environment=replace(record.environment, **changes))


def test_diff_names_first_what_explains_other_weights(ask, tmp_path):
    run = make("lr-1e-3")
    other = in_environment(make("lr-5e-4", 0.5, lr=5e-4), torch="2.14.0", git="f" * 12, threads=4)
    write(tmp_path, [run, other, in_environment(make("a", seed=1)), in_environment(make("a", seed=2), exact=False)])
    status, out, said = ask("diff", "lr-1e-3", other.spec_id)
    assert (status, said) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "The weights differ. What explains it: lr, torch."
    assert [line.split() for line in lines[3:9]] == [
        ["decides", "weights"],
        ["lr", "0.001", "0.0005"],
        ["torch", "2.15.0", "2.14.0"],
        ["other"],
        ["threads", "2", "4"],
        ["git", "0123456789ab", "ffffffffffff"],
    ]
    assert "test_accuracy        57.00%          50.00%" in out
    assert max(map(len, lines)) <= 80
    path = tmp_path / "checkpoints" / "a" / f"{make('a', seed=1).spec_id}.safetensors"
    found = json.loads(ask("diff", path, make("a", seed=2).spec_id, "--json")[1])
    assert found["runs"][0] == {"experiment": "a", "spec_id": path.stem, "seed": 1}
    assert (found["same_weights"], found["decides_weights"]) == (True, {"seed": [1, 2], "bitwise": [True, False]})


def test_diff_of_other_code_unpatched_threads_and_a_failed_run(ask, tmp_path):
    same, equal = sorted(code_hash.SAME_NUMBERS)[:2]
    runs = [
        in_environment(make("a"), "1" * 64, code=same),
        in_environment(make("b"), "2" * 64, code=equal, threads=4),
        in_environment(make("c"), "3" * 64, code="0" * 12, mode="unpatched", threads=4),
        failed("d"),
    ]
    write(tmp_path, runs)
    assert ask("diff", "a", "b")[1].startswith("The weights differ, and nothing in the records explains it.")
    assert ask("diff", "a", "c")[1].startswith("The weights differ. What explains it: mode, threads, code.")
    status, out, _ = ask("diff", "a", "d")
    assert out.startswith("The weights cannot be compared, since only a finished run has weights.")
    assert ["error", "none", "the", "loss", "is", "NaN"] in [line.split()[:6] for line in out.splitlines()]
    status, _, said = ask("diff", "a", "z")
    assert (status, said) == (2, f"error: there is no record of z under {tmp_path}; names are in `main.py list`\n")


def test_all_records_are_dicts_and_frames(tmp_path):
    write(tmp_path, [make("a", epochs=3, lr=0.5), failed("b"), on_all("b", 0.6, seed=1)])
    a, b, without = sorted(records(tmp_path), key=lambda row: (row["experiment"], row["seed"]))
    assert (a["status"], a["lr"], a["widths"], a["test_accuracy"]) == ("finished", 0.5, [1024, 512, 256], 0.57)
    assert (b["status"], b["test_accuracy"], b["error"]) == ("failed", None, "the loss is NaN since step 7 (epoch 1)")
    assert (without["validation_accuracy"], without["error"]) == (None, None)
    assert records(tmp_path / "nothing") == []
    if importlib.util.find_spec("pandas") is None:
        lacking("pandas is not installed (`uv sync --group notebook`)")
    import pandas

    frame = pandas.DataFrame(records(tmp_path))
    assert frame.groupby("experiment").test_accuracy.count().to_dict() == {"a": 1, "b": 1}
    epochs = pandas.DataFrame(histories(tmp_path))
    assert epochs[epochs.experiment == "a"].epoch.tolist() == [1, 2, 3]
    assert len(epochs) == 5


def test_the_page_of_json_has_every_key():
    text = (ROOT / "docs" / "json.md").read_text()
    spec = make("x").spec
    assert {key for key in tables.row(make("x")) if key not in spec} <= set(re.findall(r"`(\w+)`", text))


# clean


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """The only folder of compiled steps."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(cache, "_candidates", lambda: [folder])
    return folder


def listed(out):
    """The files in a listing, largest first."""
    return [line.split()[-1] for line in out.splitlines()[:-1]]


def test_clean_lists_by_size_what_nothing_needs_and_deletes_it_with_yes(ask, caches, tmp_path):
    run, unfinished, again = (Run(name, {"epochs": 2}, tmp_path) for name in ("a", "b", "c"))
    write(tmp_path, [make("a"), make("c")])
    unfinished.folder.mkdir()
    old = [run.resume_point(step) for step in (1, 2)]
    needed = [unfinished.resume_point(1), again.resume_point(1)]
    for count, path in enumerate([*old, *needed], 5):
        path.write_bytes(bytes(1000 * count))
    for path in old:
        os.utime(path, (1, 1))
    dead, other, mine = run.folder / f"{run.id}.json.123.tmp", caches / f"{'0' * 32}.so", caches / f"{'1' * 32}.so"
    place, middle = cache._scratch_place(caches)
    scratch = place / f"{'2' * 32}.{middle}.x.scratch"
    scratch.mkdir()
    for path, count in ((dead, 1), (other, 9000), (mine, 1), (scratch / "x.cpp", 8000), (run.weights, 10**5)):
        path.write_bytes(bytes(count))
    mine.with_suffix(".json").write_text(json.dumps({"code": code_hash.CODE}))
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".lock"}
    status, out, said = ask("clean")
    assert (status, said) == (0, "")
    assert listed(out) == [str(path) for path in (other, scratch, old[1], old[0], dead)]
    assert out.splitlines()[0].split()[:3] == ["9.0", "kB", "compiled"]
    assert out.splitlines()[-1] == "28.0 kB in all; --yes deletes them"
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} == before
    assert ask("clean", "--yes")[1].splitlines()[-1] == "deleted, 28.0 kB in all"
    gone = {other, scratch, scratch / "x.cpp", *old, dead}
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} == before - gone
    assert ask("clean", "--yes")[1] == "nothing to delete\n"
    assert listed(ask("clean", "--weights", "a", "--yes")[1]) == [str(run.weights)]
    assert run.read() == make("a"), "its record stays"
    status, _, said = ask("clean", "--weights", "a")
    assert (status, said) == (2, f"error: there are no weights of a under {tmp_path}; names are in `main.py list`\n")


def test_clean_leaves_what_a_live_process_uses(ask, caches, tmp_path):
    run = Run("a", {"epochs": 2}, tmp_path)
    write(tmp_path, [make("a")])
    library = caches / f"{'0' * 32}.so"
    files = [run.folder / f"{run.id}.json.1.tmp", run.resume_point(1), run.weights, library]
    for path in files:
        path.write_bytes(b"0" * 4096)
        os.utime(path, (1, 1))
    with run.lock(), library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert ask("clean", "--weights", "a", "--yes")[1] == "nothing to delete\n"
        assert all(path.exists() for path in files)
    assert len(listed(ask("clean", "--weights", "a", "--yes")[1])) == 4


# Options without an effect


def test_an_option_that_changes_nothing_says_so(ask, tmp_path, monkeypatch):
    demo = ("run", "demo", "widths=8", "epochs=1")

    def without_effect(*argv, status=0):
        found, _, said = ask(*argv)
        assert found == status, said
        return [line[2:].replace(" has no effect", "") for line in said.splitlines() if " has no effect: " in line]

    assert without_effect(*demo, "--no-compile", "--data-url", "x", "--data", "y", "-v", "--force") == [
        "data: no published data is read",
        "data-url: no published data is read",
        "no-compile: for so little data, no step is compiled",
        "force: there is no result to replace",
        "verbose: a single run shows its epochs without it",
    ]
    training = ("--cohort", 2, "--checkpoint-every", 2, "--resume-anyway", "-v")
    pair = ("compare", "demo widths=8 epochs=1", "demo widths=9 epochs=1", "--max-seeds", 5)
    for words in (pair, demo, ("search", "search-default")):
        said = without_effect(*words, "--dry-run", *training)
        names = ("checkpoint-every", "cohort", "resume-anyway", "verbose")
        assert sorted(said) == [f"{name}: a dry run trains nothing" for name in names]
    monkeypatch.setattr("core.compare.rounds", lambda *rest: iter(()))  # as after a stop: nothing is trained
    there = ("--resume-anyway", "--out", tmp_path / "compared")
    assert without_effect(*pair, *there, status=130) == ["resume-anyway: there is nothing to resume"]
    point = Run("demo", {**SUITES["demo"]["demo"], "widths": [8], "epochs": 1}, tmp_path / "compared").resume_point(1)
    point.parent.mkdir(parents=True)
    point.touch()
    assert without_effect(*pair, *there, status=130) == []
    assert without_effect(*demo, "--force", "--resume-anyway", "--cohort", 2) == [
        "cohort: no two runs can be trained together",
        "resume-anyway: with --force, every run starts anew",
    ]
    assert without_effect(*demo, "--device", "cpu", "-v") == [], "a line says that the run is finished"
    assert without_effect("evaluate", "demo", "--seed", 0, "--test-share", 0.1, "--data-folder", tmp_path) == [
        "data-folder: no run has images of your own",
        "test-share: no run has images of your own",
    ]
    (path,) = tmp_path.glob("checkpoints/demo/*.safetensors")
    file, by_file = "out: every run is meant by a file", "seed: no run is meant by the name of its experiment"
    for argv in (
        ["evaluate", path],
        ["predict", path, ROOT / "checkpoints/best-first-layer.png"],
        ["diff", path, path],
    ):
        assert without_effect(*argv, "--seed", 1) == [by_file, file], argv
    assert without_effect("diff", path.stem, path, "--seed", 1) == [by_file]
    assert without_effect("list", "--keys") == ["out: the keys do not depend on runs"]
