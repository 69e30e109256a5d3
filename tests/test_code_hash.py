"""Whether code gives the same numbers as other code, and whether it is the same byte for byte."""

import shutil

import pytest

from core import code_hash
from core.code_hash import CODE, SAME_NUMBERS, core_bytes_hash, same_numbers

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


def test_the_list_is_read_whole_and_nothing_else_of_its_file():
    lines = [line for line in code_hash.LIST.read_text().splitlines() if not line.startswith("#")]
    assert sorted(lines) == sorted(SAME_NUMBERS)
    assert all(same_numbers(code, lines[0]) for code in lines)
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
