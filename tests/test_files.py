"""The file of weights, or of the record, that a word of the command line means."""

import re

import msgspec
import pytest

from core.errors import UserError
from core.events import Resumed
from core.remote import keep as keep_from_worker
from core.runs.files import find_file, in_progress
from core.runs.record import former_names, new_name, read_records, write_record
from core.runs.run import Run
from core.session import run_cohort
from core.spec import CIFAR10, spec_id
from core.verify import check_finished
from tests.test_report import failed, make


@pytest.fixture
def keep(tmp_path):
    """Keeps a record under a folder, with a file of weights."""

    def do(record, weights=True):
        run = Run(record.name, record.spec, tmp_path)
        run.folder.mkdir(parents=True, exist_ok=True)
        write_record(run.record, record)
        if weights:
            run.weights.write_bytes(b"")
        return run.weights

    return do


def test_a_name_means_the_first_seed_unless_one_is_given(keep, tmp_path):
    third, first = keep(make("x", seed=3)), keep(make("x", seed=1))
    keep(make("x", seed=0), weights=False)
    keep(make("y", seed=0))
    assert find_file(tmp_path, "x") == first
    assert find_file(tmp_path, "x", 3) == third
    assert find_file(tmp_path, "x", suffix=".json") == Run("x", {"epochs": 2}, tmp_path).record, "it needs no weights"


def test_an_id_and_a_path_mean_themselves(keep, tmp_path):
    path = keep(make("x"))
    assert find_file(tmp_path, path.stem) == path
    assert find_file(tmp_path, str(path)) == path
    assert find_file(tmp_path, path.stem, suffix=".json") == path.with_suffix(".json")
    assert find_file(tmp_path, str(path), suffix=".json") == path.with_suffix(".json")
    for gone in ("gone.safetensors", str(tmp_path / "gone")):  # whoever reads it says that it is not there
        assert str(find_file(tmp_path, gone)) == gone


def test_the_spec_in_experiments_is_preferred(keep, tmp_path):
    keep(make("x", lr=0.1))
    official = make("x", lr=0.2, seed=5)
    path = keep(official)
    assert find_file(tmp_path, "x", spec={**official.spec, "seed": 0}) == path
    assert find_file(tmp_path, "x") != path


def test_a_name_with_runs_on_several_data_sets_is_refused(keep, tmp_path):
    """Even where one has the spec in experiments/: who trained it on images of their own may mean those."""

    def on_synthetic(seed):
        record = make("x", seed=seed)
        spec = {**record.spec, "dataset": "synthetic"}
        return msgspec.structs.replace(record, spec=spec, spec_id=spec_id(spec), info=CIFAR10)

    official, own = keep(make("x")), keep(on_synthetic(0))
    keep(on_synthetic(1))
    for suffix in (".safetensors", ".json"):
        with pytest.raises(UserError) as refused:
            find_file(tmp_path, "x", spec=make("x").spec, suffix=suffix)
        assert str(refused.value) == (
            "there are runs of x on several data sets: say which by its id, such as "
            f"{official.stem} (cifar10), {own.stem} (synthetic)"
        )
    assert find_file(tmp_path, "x", 1).parent == own.parent, "only one data set has this seed"
    assert find_file(tmp_path, "x", dataset=lambda: "synthetic") == own


def test_an_unknown_or_ambiguous_word_is_refused(keep, tmp_path):
    one, other = keep(make("x", lr=0.1)), keep(make("x", lr=0.2))
    keep(failed("z"))
    ids = ", ".join(sorted((one.stem, other.stem)))
    for arguments, words in (
        (("x",), f"there are several networks of x with seed 0: say which by its id: {ids}"),
        (("x", 7), f"there are no weights of x --seed 7 under {tmp_path}; names are in `main.py list`"),
        (("z", None, {}), f"there are no weights of z under {tmp_path}; `uv run main.py run z` trains it"),
        (("0123456789ab",), f"there are no weights of the id 0123456789ab under {tmp_path}"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
            find_file(tmp_path, *arguments)


FORMER = {"old": "new", "older": "new"}
OLD = former_names("new", FORMER)


def test_a_run_under_a_former_name_is_read_under_the_new_one(keep, tmp_path):
    record = make("older")
    weights = keep(record)
    run = Run("new", record.spec, tmp_path, OLD)
    assert (run.weights, run.record) == (weights, weights.with_suffix(".json"))
    assert run.folder == tmp_path / "checkpoints" / "new", "a new result goes to the folder of the new name"
    renamed = make("new")
    assert run.finished(record.data) == renamed
    assert list(read_records(tmp_path, FORMER)) == [renamed]
    assert check_finished(run, record.data) == renamed
    assert find_file(tmp_path, "new", former=OLD) == weights


def test_of_a_run_under_both_names_the_new_one_counts(keep, tmp_path):
    for name, test in (("old", 0.5), ("older", 0.51), ("new", 0.52)):
        keep(make(name, test=test))
    record = make("new", test=0.52)
    run = Run("new", record.spec, tmp_path, OLD)
    assert run.weights.parent.name == run.record.parent.name == "new"
    assert run.finished(record.data) == record
    assert list(read_records(tmp_path, FORMER)) == [record]
    assert find_file(tmp_path, "new", former=OLD) == run.weights


def test_weights_may_be_in_the_old_folder_and_the_record_in_the_new_one(keep, tmp_path):
    """As after a pull: Git moves the record, but it ignores the weights."""
    record = make("new")
    keep(record, weights=False)
    weights = keep(make("old"))
    weights.with_suffix(".json").unlink()
    assert Run("new", record.spec, tmp_path, OLD).finished(record.data) == record
    assert find_file(tmp_path, "new", former=OLD) == weights


def test_a_run_goes_on_from_a_resume_point_under_a_former_name(tmp_path, invented):
    spec = {"widths": [8], "epochs": 2, "batch_size": 500}
    old, run = Run("old", spec, tmp_path), Run("new", spec, tmp_path, ["old"])
    [stopped] = run_cohort([old], invented, "cpu", should_stop=lambda: bool(old.resume_points()), compiled=False)
    assert 0 < stopped.step < stopped.total
    assert run.is_in_progress()
    assert run.is_in_progress(in_progress(tmp_path))
    events = []
    [record] = run_cohort([run], invented, "cpu", [lambda run, event: events.append(event)], compiled=False)
    assert [event.step for event in events if isinstance(event, Resumed)] == [stopped.step]
    assert run.finished(record.data) == record
    assert not in_progress(tmp_path)
    [alone] = run_cohort([Run("alone", spec, tmp_path)], invented, "cpu", compiled=False)
    assert record.digest == alone.digest


def test_the_members_of_a_grid_are_renamed_with_it():
    for old, new in (("old", "new"), ("older-lr=0.001-dropout=0", "new-lr=0.001-dropout=0"), ("old-lr", "old-lr")):
        assert new_name(old, FORMER) == new
    assert former_names("new-lr=0.001", FORMER) == ("old-lr=0.001", "older-lr=0.001")
    assert former_names("new-lr", FORMER) == ()


def test_a_new_result_never_replaces_files_under_a_former_name(tmp_path, invented):
    """Else the old folder would have a record of another name, which is refused."""
    spec = {"widths": [8], "epochs": 1, "batch_size": 500}

    def train(run, **options):
        [record] = run_cohort([run], invented, "cpu", compiled=False, **options)
        return record

    old, run = Run("old", spec, tmp_path), Run("new", spec, tmp_path, ["old"])
    first = train(old)
    before = {path: path.read_bytes() for path in (old.weights, old.record)}
    first.name = "new"
    assert train(run) == first, "it is finished"
    assert not run.folder.exists() or not list(run.folder.glob("*.json"))
    for replace in (lambda: train(run, force=True), lambda: keep_from_worker(run, first, before[old.weights])):
        record = replace()
        assert run.read() == record
        assert run.weights.parent == run.record.parent == run.folder
        assert {path: path.read_bytes() for path in before} == before
        run.weights.unlink()
        run.record.unlink()
