"""What looks back at finished runs: --json, records() and histories()."""

import json
import re

import pandas
import pytest

import main
from core import histories, records
from core.report import plots, tables
from tests.conftest import ROOT
from tests.test_report import failed, make, on_all, write


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys):
    """Runs main.py in this process on `--out tmp_path`, without pictures; returns status, stdout and stderr."""
    monkeypatch.setattr(plots, "draw", lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture))
    monkeypatch.setenv("COLUMNS", "80")

    def ask(*argv):
        status = main.main([*map(str, argv), "--out", str(tmp_path)])
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


def test_json_of_list_has_each_experiment_and_each_key(ask):
    status, out, _ = ask("list", "--json")
    found = {(row["suite"], row["experiment"]): row for row in map(json.loads, out.splitlines())}
    assert status == 0
    assert found["learning-rate", "lr-5e-4"]["lr"] == 5e-4
    assert found["learning-rate", "lr-5e-4"]["estimated_bytes"] > 10e6
    keys = [json.loads(line)["key"] for line in ask("list", "--keys", "--json")[1].splitlines()]
    assert keys[:2] == ["widths", "expansion"]


def test_all_records_are_dicts_and_frames(tmp_path):
    write(tmp_path, [make("a", epochs=3, lr=0.5), failed("b"), on_all("b", 0.6, seed=1)])
    a, b, without = sorted(records(tmp_path), key=lambda row: (row["experiment"], row["seed"]))
    assert (a["status"], a["lr"], a["widths"], a["test_accuracy"]) == ("finished", 0.5, [1024, 512, 256], 0.57)
    assert (b["status"], b["test_accuracy"], b["error"]) == ("failed", None, "the loss is NaN since step 7 (epoch 1)")
    assert (without["validation_accuracy"], without["error"]) == (None, None)
    frame = pandas.DataFrame(records(tmp_path))
    assert frame.groupby("experiment").test_accuracy.count().to_dict() == {"a": 1, "b": 1}
    epochs = pandas.DataFrame(histories(tmp_path))
    assert epochs[epochs.experiment == "a"].epoch.tolist() == [1, 2, 3]
    assert len(epochs) == 5
    assert records(tmp_path / "nothing") == []


def test_the_page_of_json_has_every_key():
    text = (ROOT / "docs" / "json.md").read_text()
    spec = make("x").spec
    assert {key for key in tables.row(make("x")) if key not in spec} <= set(re.findall(r"`(\w+)`", text))
