"""Records are read as they were written, also those of older versions. Anything else is refused with a reason."""

import json
import re
from copy import deepcopy

import pytest

from core import run_experiment
from core.runs.record import (
    MAX_BYTES,
    SCHEMA_VERSION,
    Finished,
    RecordError,
    decode,
    encode,
    read_record,
    read_records,
    write_record,
)
from core.runs.run import Run
from core.spec import spec_id
from tests.conftest import EXPERIMENTS, ROOT, lacking
from tests.test_experiments import OFFICIAL
from tests.test_report import answered, failed, make, partial

FINISHED, FAILED, ANSWERED = (
    json.loads(encode(record)) for record in (make("x", epochs=2), failed("x"), answered(make("x")))
)
ID = FINISHED["spec_id"]
OF_ANOTHER_RUN = "it is the record of "


def leaves(value, where=()):
    """(place, value) of everything in JSON that is neither an object nor a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*where, key))
    else:
        yield where, value


def edited(record, *edits):
    """The JSON of a record with other text of JSON in some places; None takes a key away."""
    record, texts = deepcopy(record), []
    for (*path, last), text in edits:
        inner = record
        for key in path:
            inner = inner[key]
        if text is None:
            del inner[last]
        else:
            inner[last] = f"<{len(texts)}>"
            texts.append(text)
    data = json.dumps(record)
    for i, text in enumerate(texts):
        data = data.replace(f'"<{i}>"', text, 1)
    return data.encode()


@pytest.fixture
def put(tmp_path):
    """Writes bytes in the place of the record of experiment x, and returns the path."""
    path = Run("x", FINISHED["spec"], tmp_path).record
    path.parent.mkdir(parents=True)

    def put(data):
        path.write_bytes(data)
        return path

    return put


def refusal(path):
    """The sentence that refuses a record."""
    with pytest.raises(RecordError) as refused:
        read_record(path)
    said = str(refused.value)
    assert said.startswith(f"{path} is not a record that this version of the program can read: ")
    assert said.isprintable(), f"{said!r} is more than a sentence"
    return said


# What is read


@pytest.mark.parametrize(
    "record",
    [make("x"), answered(make("x")), failed("x"), partial("x")],
    ids=["finished", "with answers", "failed", "partial"],
)
def test_a_record_is_read_as_it_was_written(tmp_path, record):
    run = Run("x", record.spec, tmp_path)
    run.folder.mkdir(parents=True)
    write_record(run.record, record)
    assert read_record(run.record) == record
    assert list(read_records(tmp_path)) == [record]
    assert encode(read_record(run.record)) == run.record.read_bytes(), "equal records are equal bytes"


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_record_stays_valid(name):
    """As it is, as an older version of this program would have written it, and as a later one might."""
    path = Run(name, EXPERIMENTS[name], ROOT).record
    if not path.exists():
        lacking(f"{path}, which Git has, is not there")
    record, original = read_record(path), json.loads(path.read_bytes())
    assert isinstance(record, Finished)
    assert spec_id(record.spec) == OFFICIAL[name]
    older = deepcopy(original)
    del older["schema_version"], older["environment"]["settings"], older["environment"]["code"]
    old = decode(json.dumps(older).encode())
    assert (old.metrics, old.spec_id, old.schema_version) == (record.metrics, record.spec_id, SCHEMA_VERSION)
    assert (old.environment.settings, old.environment.code) == ("MKL_CBWR=AUTO,STRICT", "")
    later = {**original, "confusion": [[1, 2]], "environment": {**original["environment"], "planet": "Mars"}}
    assert decode(json.dumps(later).encode()) == record


def test_a_key_that_is_newer_than_the_record_has_its_default(put):
    record = read_record(put(edited(FINISHED, (("spec", "weight_decay"), None), (("spec", "seed"), None))))
    assert record == decode(json.dumps(FINISHED).encode())


def test_the_longest_run_has_a_record(tmp_path):
    record = make("x", epochs=100_000)
    path = Run("x", record.spec, tmp_path).record
    path.parent.mkdir(parents=True)
    write_record(path, record)
    assert path.stat().st_size < MAX_BYTES / 2
    assert read_record(path) == record


# What is refused


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b'"finished"',
            b"{}",
            b'{"status": "finished"}',
            b'{"status": []}',
            b"\0",
            b"\x80",
        ),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        edited(FINISHED, (("extra",), "[" * 100_000 + "]" * 100_000)),
        edited(FINISHED, (("spec", "widths"), "[" * 100_000 + "]" * 100_000)),
        edited(FINISHED, (("spec", "widths"), "[" * 500 + "]" * 500)),
        edited(FINISHED, (("status",), '"\\u001b[31m"')),
        edited(FINISHED)[:-1],
        edited(FINISHED) * 2,
    ],
    ids=lambda data: repr(data[:12]) + f", {len(data)} bytes",
)
def test_an_invalid_record_is_named_and_not_changed(put, tmp_path, data, caplog):
    """The report leaves it out; the run that would write it is refused, with or without weights."""
    path, good = put(data), Run("y", make("y").spec, tmp_path)
    said = refusal(path)
    good.folder.mkdir()
    write_record(good.record, make("y"))
    assert list(read_records(tmp_path)) == [make("y")]
    assert caplog.messages == [f"{said}; it is skipped and stays as it is"]
    run, aside = Run("x", FINISHED["spec"], tmp_path), re.escape(f"{path}.old")
    for in_progress in (None, {("x", ID)}):
        with pytest.raises(RecordError, match=rf"{re.escape(said)}; to train it anew, move that file to {aside}$"):
            run.finished(FINISHED["data"], in_progress)
    run.weights.touch()
    with pytest.raises(RecordError):
        run.result()
    assert path.read_bytes() == data


OTHER_VERSIONS = {
    "schema": [(("schema_version",), "2")],
    "key of the spec": [(("spec", "lookahead"), "5")],
    "optimizer": [(("spec", "optimizer"), '"lion"')],
    "status": [(("status",), '"paused"')],
}


@pytest.mark.parametrize("edits", OTHER_VERSIONS.values(), ids=OTHER_VERSIONS)
def test_a_run_never_replaces_the_record_of_another_version(put, tmp_path, invented, edits):
    """Not even with force: it may be the only copy of a result."""
    spec = {"widths": [8], "epochs": 1, "batch_size": 100}
    record = json.loads(encode(make("x", **spec)))
    run = Run("x", spec, tmp_path)
    run.record.write_bytes(edited(record, *edits))
    before = run.record.read_bytes()
    for force in (False, True):
        with pytest.raises(RecordError, match="to train it anew, move that file to "):
            run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False, force=force)
    assert run.record.read_bytes() == before
    assert not run.weights.exists()
    assert not run.resume_points()
    assert isinstance(run_experiment("y", spec, tmp_path, invented, "cpu", compiled=False), Finished)


NUMBERS = [where for where, value in leaves(FINISHED) if type(value) in (int, float)]
TEXTS = [(FINISHED, where) for where, value in leaves(FINISHED) if isinstance(value, str)]
TEXTS += [(FAILED, ("error",)), (FAILED, ("environment", "git"))]


@pytest.mark.parametrize(
    "text",
    ["1" * 400, "1" * 5000, "-1", "-0.5", "1e999", "-1e999", "NaN", "Infinity", "true", '"1"', "null", "[]", "{}"],
)
def test_an_invalid_number_is_refused_in_every_place(put, text):
    assert {("seed",), ("history", "seconds", 1), ("environment", "threads"), ("spec", "widths", 0)} < set(NUMBERS)
    for where in NUMBERS:
        said = refusal(put(edited(FINISHED, (where, text))))
        assert OF_ANOTHER_RUN not in said, f"{where}: {text[:9]} passed"


@pytest.mark.parametrize(
    "text",
    [
        *("\\u001b[31m", "\\n", "\\r", "\\u0000", "\\u007f", "\\u009b31m", "\\ud800", "\\udc80"),  # as escapes of JSON
        *("\x1b[31m", "\n", "\x9b", "\u061c", "\u200b", "\u200f", "\u202e", "\u2066", "\u2028", "\ufeff"),
    ],
    ids=ascii,
)
def test_an_invisible_character_is_refused_in_every_place(put, text):
    for record, where in TEXTS:
        value = record
        for key in where:
            value = value[key]
        refusal(put(edited(record, (where, f'"{value}{text}"'))))


@pytest.mark.parametrize("name", ["", "../x", "x/y", "..", ".x", "-x", "a|b", "a b", "<b>", "`x`", "ä", "x" * 101])
def test_a_name_that_cannot_be_a_folder_is_refused_in_a_record(put, name):
    said = refusal(put(edited(FINISHED, (("name",), json.dumps(name)))))
    assert "$.name" in said


@pytest.mark.parametrize("where", [where for where, _ in leaves(FINISHED) if len(where) == 1] + [("metrics", "test")])
def test_a_record_without_one_of_its_keys_is_refused(put, where):
    if where == ("schema_version",):
        read_record(put(edited(FINISHED, (where, None))))
    else:
        refusal(put(edited(FINISHED, (where, None))))


def test_a_history_as_a_list_of_epochs_is_read_forever():
    columns = FINISHED["history"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert decode(json.dumps({**FINISHED, "history": rows}).encode()) == decode(json.dumps(FINISHED).encode())


def test_a_record_is_short_and_readable():
    """A line for each column of the history, for each row of a matrix, and for a few plain values together."""
    for record in (answered(make("x", epochs=100)), make("x", epochs=5000)):
        lines = encode(record).decode().splitlines()
        assert len(lines) <= 100
        assert sum(line.startswith('  "val_loss": [') for line in lines) == 1
        assert lines[-1] == "}"


def counts(key, i, value):
    return ("metrics", "test", key, i), value


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([(("schema_version",), "2")], "it was written by a later version of this program (schema 2)"),
        ([(("spec", "learning_rate"), "1")], "unknown key 'learning_rate'; did you mean 'lr'?"),
        ([(("spec", "lr"), "0.5")], "it is the record of x, spec "),
        ([(("spec", "seed"), "7"), (("seed",), "7")], "it is the record of x, spec "),
        ([(("spec", "seed"), "7")], "the seed is 0, but 7 in the spec"),
        ([(("spec", "seed"), None), (("seed",), "7")], "the seed is 7, but 0 in the spec"),
        ([(("spec_id",), '"0123456789ab"')], "it is the record of x, spec "),
        ([(("name",), '"y"')], "it is the record of y, spec "),
        ([(("metrics", "test", "accuracy"), "0.9")], "the accuracy is 0.9, but 5700 of 10000 are correct"),
        ([(("metrics", "test", "accuracy"), "1.1")], "Expected `float` <= 1.0"),
        ([(("metrics", "test", "n"), "10001")], "the classes do not add up to n"),
        ([(("metrics", "test", "n"), "0")], "Expected `int` >= 1"),
        ([counts("correct", 0, "1001"), counts("correct", 1, "139")], "a class has more correct images than images"),
        ([(("metrics", "test", "count", 9), None)], "correct and count have different lengths"),
        ([(("history", "val_accuracy", 1), "5")], "Expected `float` <= 1.0"),
        ([(("history", "epoch", 1), "1")], "the history does not have the epochs 1 to 2"),
        ([(("history", "epoch", 1), None)], "the columns of the history are not lists of one length"),
        ([(("history", "seconds"), "7")], "the columns of the history are not lists of one length"),
        ([(("history", "seconds"), None)], "missing required field `seconds`"),
        ([(("history",), "{}")], "the columns of the history are not lists of one length"),
        ([(("history",), "[]")], "length >= 1"),
        ([(("digest",), '"abc"')], "$.digest"),
        ([(("environment", "git"), json.dumps("x" * 1001))], "length <= 1000"),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, list) else None,
)
def test_a_record_that_contradicts_itself_is_refused(put, edits, reason):
    assert reason in refusal(put(edited(FINISHED, *edits)))


def test_a_record_without_answers_is_rewritten_without_them(put):
    """An older one, which can say nothing of them: no key appears."""
    data = encode(make("x"))
    assert b"answers" not in data
    record = read_record(put(data))
    assert not record.answers
    assert encode(record) == data


RIGHT, CONFUSION, MISTAKES = (("answers", key) for key in ("right", "confusion", "mistakes"))


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([(RIGHT, '"*"')], "Invalid base64"),
        ([(RIGHT, '"a"')], "Invalid base64"),
        ([(RIGHT, '""')], "the bits of 10000 images are 0 bytes"),
        ([(RIGHT, json.dumps("/" * 1664))], "the bits of 10000 images are 1248 bytes"),
        ([(RIGHT, json.dumps("A" * 1668))], "are 1251 bytes"),
        ([(RIGHT, json.dumps("/" * 200_000))], "length <= 65536"),
        ([(RIGHT, json.dumps("/" * 1666 + "8="))], "the bits do not mark 5700 of 10000 images as right"),
        ([(RIGHT, "[1, 2]")], "Expected `bytes`"),
        ([(RIGHT, None)], "missing required field `right`"),
        ([((*CONFUSION, 0, 0), "1")], "the confusion matrix does not fit the test metrics"),
        ([((*CONFUSION, 0, 1), "431"), ((*CONFUSION, 1, 2), "429")], "the confusion matrix does not fit"),
        ([((*CONFUSION, 0, 0), "571"), ((*CONFUSION, 0, 1), "429")], "the confusion matrix does not fit"),
        ([((*CONFUSION, 0, 0), "-1")], "Expected `int` >= 0"),
        ([((*CONFUSION, 3, 9), None)], "the confusion matrix is not one of 10 classes"),
        ([((*CONFUSION, 9), None)], "the confusion matrix is not one of 10 classes"),
        ([((*MISTAKES, 0, "index"), "0")], "image 0 is not a mistake"),
        ([((*MISTAKES, 0, "index"), "10000")], "image 10000 is not a mistake"),
        ([((*MISTAKES, 0, "index"), "-1")], "Expected `int` >= 0"),
        ([((*MISTAKES, 0, "predicted"), "10")], "has a class that does not exist"),
        ([((*MISTAKES, 0, "label"), "1")], "is not a mistake"),
        ([((*MISTAKES, 0, "probability"), "1.5")], "Expected `float` <= 1.0"),
        ([(MISTAKES, json.dumps([ANSWERED["answers"]["mistakes"][0]] * 101))], "length <= 100"),
        ([(("answers",), "null")], "Expected `object`"),
    ],
    ids=lambda value: ascii(value)[:60] if isinstance(value, list) else None,
)
def test_answers_that_contradict_the_metrics_are_refused(put, edits, reason):
    read_record(put(edited(ANSWERED)))
    assert reason in refusal(put(edited(ANSWERED, *edits)))


def test_bits_beyond_the_last_image_are_refused(put):
    """Of eleven images there are two bytes, whose last five bits say nothing."""
    record = deepcopy(ANSWERED)
    record["metrics"]["test"] = {
        "accuracy": 1 / 11,
        "loss": 2.0,
        "n": 11,
        "correct": [1] + [0] * 9,
        "count": [2] + [1] * 9,
    }
    matrix = [[1, 1] + [0] * 8] + [[1] + [0] * 9 for _ in range(9)]
    record["answers"] = {"right": "gAA=", "confusion": matrix, "mistakes": []}
    read_record(put(edited(record)))
    assert "images as right" in refusal(put(edited(record, (RIGHT, '"ABA="'))))


def test_the_record_of_another_run_is_refused(put, tmp_path):
    """A file that was copied or renamed."""
    path = put(edited(FINISHED))
    for elsewhere in (path.with_name("0123456789ab.json"), tmp_path / "checkpoints" / "y" / path.name):
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.write_bytes(path.read_bytes())
        assert OF_ANOTHER_RUN in refusal(elsewhere)


def test_an_invalid_record_is_not_written(tmp_path):
    record = failed("x")
    record.error = "\x1b[31m"
    with pytest.raises(ValueError, match="matching regex"):
        write_record(tmp_path / "a.json", record)
    record = make("x")
    record.first_step_seconds = float("nan")
    with pytest.raises(ValueError, match="first_step_seconds"):
        write_record(tmp_path / "a.json", record)
    assert not list(tmp_path.iterdir())
