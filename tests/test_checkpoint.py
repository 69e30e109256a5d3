"""Checkpoints come back bit for bit, and a damaged or hostile file is refused before anything is made of it."""

import ast
import json
import random
import struct
import tracemalloc

import pytest
import torch

from core.functional import model
from core.runs import checkpoint
from core.runs.checkpoint import CheckpointError
from core.spec import resolve
from tests.conftest import ROOT

TENSORS = {"1.weight": torch.linspace(-1, 1, 600).view(20, 30), "2.num_batches_tracked": torch.tensor(7)}
META = {"spec": {"lr": 1e-3}, "name": "x"}
SHAPES = checkpoint.shapes_of(TENSORS)


def template(_):
    return SHAPES


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, TENSORS, META)
    return path


def header_length(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


def signed(tensors, meta, path, header=None, body=None):
    """A file as its author would sign it, with a header or body of the author's choice."""
    checkpoint.save(path, tensors, meta)
    data = path.read_bytes()
    end = header_length(data)
    raw = json.loads(data[8:end])
    inner = json.loads(raw["__metadata__"][checkpoint.KEY])
    inner["sha256"] = checkpoint.ZEROS
    raw["__metadata__"][checkpoint.KEY] = json.dumps(inner, sort_keys=True, separators=(",", ":"))
    text = json.dumps({**raw, **(header or {})}, separators=(",", ":")).encode()
    data = struct.pack("<Q", len(text)) + text + (data[end:] if body is None else body)
    total = checkpoint.hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(checkpoint._signature(checkpoint.ZEROS), checkpoint._signature(total), 1))
    return path


def test_round_trip(path):
    tensors, meta = checkpoint.load(path, template)
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in TENSORS.items())
    assert {key: meta[key] for key in META} == META
    assert checkpoint.digest(tensors) == checkpoint.digest(TENSORS)


def test_equal_tensors_give_equal_bytes(path, tmp_path):
    again = tmp_path / "b.safetensors"
    checkpoint.save(again, TENSORS, META)
    assert again.read_bytes() == path.read_bytes()


def test_the_signing_of_these_tests_is_that_of_the_program(path, tmp_path):
    """Else what follows would be refused for its signature and prove nothing."""
    checkpoint.load(signed(TENSORS, META, tmp_path / "b.safetensors"), template)


def test_every_flipped_bit_of_the_header_is_refused(path):
    data = path.read_bytes()
    for bit in range(8 * header_length(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.load(path, template)


def test_a_thousand_flipped_bits_of_the_data_are_refused(path):
    data = path.read_bytes()
    draw = random.Random(0)
    for _ in range(1000):
        bit = draw.randrange(8 * header_length(data), 8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="sha256"):
            checkpoint.load(path, template)


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path, template)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="too long"):
        checkpoint.load(path, template)


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "1.weight": TENSORS["1.weight"].int()},
        {**TENSORS, "1.weight": TENSORS["1.weight"].view(30, 20)},
        {**TENSORS, "odd/../name": torch.tensor(1)},
        {"1.weight": TENSORS["1.weight"]},
        {**TENSORS, "1.weight": TENSORS["1.weight"] * float("nan")},
        {**TENSORS, "1.weight": TENSORS["1.weight"] / 0},
    ],
    ids=["dtype", "shape", "odd name", "missing", "nan", "infinity"],
)
def test_rightly_signed_but_not_the_network(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor|NaN"):
        checkpoint.load(signed(tensors, META, tmp_path / "b.safetensors"), template)


@pytest.mark.parametrize(
    "offsets", [[0, 2399], [-8, 2392], [0, 2**62], ["0", 2400], None], ids=["short", "negative", "huge", "text", "none"]
)
def test_offsets_that_lie(offsets, tmp_path):
    entry = {"dtype": "F32", "shape": [20, 30], "data_offsets": offsets}
    with pytest.raises(CheckpointError):
        checkpoint.load(signed(TENSORS, META, tmp_path / "b.safetensors", {"1.weight": entry}), template)


def test_duplicate_names(path):
    data = path.read_bytes()
    end = header_length(data)
    text = data[8:end].rstrip().replace(b'"2.num_batches_tracked"', b'"1.weight"')
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    with pytest.raises(CheckpointError, match="duplicate"):
        checkpoint.load(path, template)


@pytest.mark.parametrize("claim", [0, 1, 2**18 + 1, 2**40, 2**63, 2**64 - 1])
def test_the_header_claims_a_size(path, claim):
    path.write_bytes(struct.pack("<Q", claim) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError):
        checkpoint.load(path, template)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 40_000, b"null", b"\xff\xfe", b"{}"], ids=range(5))
def test_headers_that_are_no_header(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError):
        checkpoint.load(path, template)


def test_refusing_costs_little_memory(tmp_path):
    """A file that claims and has 4 GB, without a byte of it on the disk."""
    path = tmp_path / "big.safetensors"
    checkpoint.save(path, TENSORS, META)
    with open(path, "r+b") as file:
        file.truncate(1 << 32)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="too long"):
            checkpoint.load(path, template)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["bit", "nan"])
def test_refusing_a_resume_point_of_the_default_network_costs_little_memory(tmp_path, damage):
    """Of its 46 MB, a flipped bit keeps all from being held, and a NaN that is rightly signed from being held twice."""
    path = tmp_path / "big.safetensors"
    params, stats = model.init(resolve({}), 0)
    tensors = {f"{i}/{name}": t for i, part in enumerate((params, stats, params, params)) for name, t in part.items()}
    tensors = {name: t.clone() for name, t in tensors.items()}
    if damage == "nan":
        tensors["3/1.weight"][-1, -1] = torch.nan
    checkpoint.save(path, tensors, META)
    if damage == "bit":
        data = bytearray(path.read_bytes())
        data[-100] ^= 4
        path.write_bytes(data)
    shapes = checkpoint.shapes_of(tensors)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="sha256" if damage == "bit" else "NaN"):
            checkpoint.load(path, lambda _: shapes)
        assert tracemalloc.get_traced_memory()[1] < (3e6 if damage == "bit" else 50e6)
    finally:
        tracemalloc.stop()


def test_what_was_loaded_shares_nothing_with_the_file(path):
    tensors, _ = checkpoint.load(path, template)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.write_bytes(b"")
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_a_failing_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(checkpoint.StoreError, match=f"cannot write {path}: No space left"):
        checkpoint.save(path, {"1.weight": torch.zeros(3)}, META)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_other_way_to_unpickle():
    """torch.load is nowhere, and pickle is only where the batches of CIFAR-10 have just been hashed."""
    for path in [ROOT / "main.py", *ROOT.glob("core/*.py")]:
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls
        assert path.name == "dataset.py" or not any("pickle" in name for name in calls)
