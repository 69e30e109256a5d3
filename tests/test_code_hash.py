"""Whether code gives the same numbers as other code, and whether it is the same byte for byte."""

import shutil

import msgspec
import pytest

from core import code_hash, run_experiment
from core.code_hash import CODE, SAME_NUMBERS, core_bytes_hash, same_numbers
from core.runs.record import read_record, write_record
from core.runs.run import OtherCode
from core.spec import resolve, spec_id

LISTED = ("0" * 12, "1" * 12)


@pytest.mark.parametrize(
    ("code", "other", "same"),
    [
        ("2" * 12, "2" * 12, True),
        ("2" * 12, "3" * 12, False),
        (*LISTED, True),
        (LISTED[0], "2" * 12, False),
        ("2" * 12, LISTED[0], False),
        ("", "2" * 12, False),
        ("", "", False),  # two records without a hash may be of any two versions
    ],
)
def test_the_same_hash_or_two_of_the_list_give_the_same_numbers(monkeypatch, code, other, same):
    monkeypatch.setattr(code_hash, "SAME_NUMBERS", frozenset(LISTED))
    assert same_numbers(code, other) is same


def test_only_the_hashes_of_the_list_are_read():
    lines = [line for line in code_hash.LIST.read_text().splitlines() if not line.startswith("#")]
    assert set(lines) >= SAME_NUMBERS > set()  # the golden test may have added one since
    assert all(same_numbers(code, lines[0]) for code in SAME_NUMBERS)
    assert same_numbers(CODE)


@pytest.mark.parametrize("name", ["session.py", "report/text.py", "functional/model.py"])
def test_every_byte_and_name_counts_in_the_hash_of_the_bytes(tmp_path, name):
    core = shutil.copytree(code_hash.CORE, tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__"))
    hashes = [core_bytes_hash(core)]
    with open(core / "same_numbers.txt", "ab") as file:  # as the golden test may do while a worker starts
        file.write(b"000000000000\n")
    assert core_bytes_hash(core) == core_bytes_hash() == hashes[0]
    with open(core / name, "ab") as file:
        file.write(b"\n")
    hashes.append(core_bytes_hash(core))
    (core / name).rename((core / name).with_name("a_new_name.py"))
    hashes.append(core_bytes_hash(core))
    assert len(set(hashes)) == 3


# What follows for finished runs


def of_code(path, code):
    """Say in a record that other code has made it."""
    record = read_record(path)
    environment = msgspec.structs.replace(record.environment, code=code)
    write_record(path, msgspec.structs.replace(record, environment=environment))


@pytest.mark.parametrize("code", ["2" * 12, ""])
def test_a_run_of_other_code_is_no_result_of_this_code_and_stays_until_it_is_replaced(invented, tmp_path, code):
    spec = {"widths": [8], "epochs": 1, "batch_size": 100}

    def train(**options):
        return run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False, **options)

    first = train()
    path = tmp_path / "checkpoints" / "x" / f"{spec_id(resolve(spec))}.json"
    of_code(path, code)
    before = path.read_bytes()
    with pytest.raises(OtherCode, match=f"of other code .{code or 'unknown'}, now {CODE}.*--force"):
        train()
    assert path.read_bytes() == before
    assert train(force=True).digest == first.digest
    assert read_record(path).environment.code == CODE
    assert train() == read_record(path)


def test_a_run_of_code_that_gives_the_same_numbers_is_finished(invented, tmp_path, monkeypatch):
    """Only its hash is another one: then it is not trained again."""
    monkeypatch.setattr(code_hash, "SAME_NUMBERS", frozenset((CODE, "1" * 12)))
    spec = {"widths": [8], "epochs": 1, "batch_size": 100}
    run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False)
    path = tmp_path / "checkpoints" / "x" / f"{spec_id(resolve(spec))}.json"
    of_code(path, "1" * 12)
    again = run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False)
    assert again.environment.code == "1" * 12
