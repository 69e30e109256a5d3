"""Checkpoints are read bit for bit as they were written. A damaged or hostile file is refused before it is used."""

import ast
import json
import os
import random
import struct
import tracemalloc

import pytest
import torch

from core.functional import model, step
from core.functional.tree import flatten
from core.mode import Mode
from core.runs import checkpoint, resume
from core.runs.checkpoint import CheckpointError, OtherVersion
from core.runs.record import About, Epoch, Progress, ResumePoint
from core.runs.run import Run
from core.spec import resolve, spec_id
from tests.conftest import ROOT
from tests.test_report import make

TENSORS = {"1.weight": torch.linspace(-1, 1, 600).view(20, 30), "2.num_batches_tracked": torch.tensor(7)}
SHAPES = checkpoint.shapes_of(TENSORS)
SPEC = resolve({"widths": [8]})
ABOUT = {
    "name": "x",
    "spec": SPEC,
    "spec_id": spec_id(SPEC),
    "data": "15fc275e5cae.dir",
    "environment": make("x").environment,
    "seed": 0,
}
META = About(**ABOUT)


def load(path, schema=About, shapes=SHAPES):
    return checkpoint.load(path, schema, lambda _: shapes)


def sentence(refused):
    """The message of an error, if it is one line that a terminal may show."""
    message = str(refused.value)
    assert message.isprintable(), f"{message!r} is more than a sentence"
    return message


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, TENSORS, META)
    return path


def header_length(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


def signed(tensors, about, path, header=None, meta=None):
    """A file with a valid signature, and with any entries of the header and of the metadata."""
    checkpoint.save(path, tensors, about)
    data = path.read_bytes()
    end = header_length(data)
    raw = json.loads(data[8:end])
    inner = {**json.loads(raw["__metadata__"][checkpoint.KEY]), **(meta or {}), "sha256": checkpoint.ZEROS}
    raw["__metadata__"][checkpoint.KEY] = json.dumps(inner, sort_keys=True, separators=(",", ":"))
    sign(path, json.dumps({**raw, **(header or {})}, separators=(",", ":")).encode(), data[end:])
    return path


def sign(path, text, body):
    """Write a file with this text as its header, in which zeros stand for the signature."""
    data = struct.pack("<Q", len(text)) + text + body
    total = checkpoint.hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(checkpoint._signature(checkpoint.ZEROS), checkpoint._signature(total), 1))


def test_round_trip(path):
    tensors, meta = load(path)
    assert all(torch.equal(tensors[name], t) and tensors[name].dtype == t.dtype for name, t in TENSORS.items())
    assert list(tensors) == list(SHAPES)  # the library has its own order
    assert meta == META
    assert checkpoint.digest(tensors) == checkpoint.digest(TENSORS)


def test_equal_tensors_give_equal_bytes(path, tmp_path):
    again = tmp_path / "b.safetensors"
    checkpoint.save(again, TENSORS, META)
    assert again.read_bytes() == path.read_bytes()


def test_these_tests_sign_files_as_the_program_does(path, tmp_path):
    """Otherwise the tests below would only test the signature."""
    load(signed(TENSORS, META, tmp_path / "b.safetensors", meta={"name": "y"}))


def flip(file, bit):
    """Flip one bit of an open file in its place, which is faster than to write the file again."""
    byte = os.pread(file.fileno(), 1, bit // 8)[0]
    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)


def test_every_flipped_bit_of_the_header_is_refused(path):
    with open(path, "r+b") as file:
        for bit in range(8 * header_length(path.read_bytes())):
            flip(file, bit)
            with pytest.raises(CheckpointError):
                load(path)
            flip(file, bit)
    load(path)


def test_a_thousand_flipped_bits_of_the_data_are_refused(path):
    data, draw = path.read_bytes(), random.Random(0)
    with open(path, "r+b") as file:
        for _ in range(1000):
            bit = draw.randrange(8 * header_length(data), 8 * len(data))
            flip(file, bit)
            with pytest.raises(CheckpointError, match="sha256"):
                load(path)
            flip(file, bit)
    load(path)


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="too long"):
        load(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {**TENSORS, "1.weight": TENSORS["1.weight"].int()},
        {**TENSORS, "1.weight": TENSORS["1.weight"].view(30, 20)},
        {**TENSORS, "odd/../name": torch.tensor(1)},
        {"1.weight": TENSORS["1.weight"]},
        {**TENSORS, "1.weight": TENSORS["1.weight"] * float("nan")},
        {**TENSORS, "1.weight": TENSORS["1.weight"] / 0},
        {**TENSORS, "2.num_batches_tracked": torch.tensor(-1)},
    ],
    ids=["dtype", "shape", "odd name", "missing", "nan", "infinity", "negative"],
)
def test_a_signed_file_with_other_tensors_is_refused(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor|NaN|negative"):
        load(signed(tensors, META, tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    "offsets",
    [[0, 2399], [-8, 2392], [0, 2**62], ["0", 2400], None, [0, 2400], [0, 2408], [16, 2416]],
    ids=["short", "negative", "huge", "text", "none", "overlap", "too many", "hole"],
)
def test_wrong_offsets_are_refused(offsets, tmp_path):
    entry = {"dtype": "F32", "shape": [20, 30], "data_offsets": offsets}
    with pytest.raises(CheckpointError):
        load(signed(TENSORS, META, tmp_path / "b.safetensors", {"1.weight": entry}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"2.num_batches_tracked"', b'"1.weight"'),
        (b'{"__metadata__"', b'{"__metadata__":{"cifar10-mlp":"{}"},"__metadata__"'),
        (b'{"cifar10-mlp"', b'{"cifar10-mlp":"{}","cifar10-mlp"'),
        (rb"\"seed\":0", rb"\"seed\":1,\"seed\":0"),
        (b'"dtype"', b'"dtype":"I8","dtype"'),
    ],
    ids=["tensor", "metadata", "key", "key of the metadata", "key of a tensor"],
)
def test_duplicate_names_are_refused(path, old, new):
    """The signature is valid. Two programs may read different values."""
    data = path.read_bytes()
    end = header_length(data)
    meta = json.loads(json.loads(data[8:end])["__metadata__"][checkpoint.KEY])
    text = data[8:end].replace(meta["sha256"].encode(), checkpoint.ZEROS.encode())
    sign(path, text, data[end:])
    load(path)
    assert old in text
    sign(path, text.replace(old, new, 1), data[end:])
    with pytest.raises(CheckpointError, match="duplicate"):
        load(path)


@pytest.mark.parametrize("claim", [0, 1, 2**18 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_wrong_size_of_the_header_is_refused(path, claim):
    path.write_bytes(struct.pack("<Q", claim) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError):
        load(path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 40_000, b"null", b"\xff\xfe", b"{}"], ids=range(5))
def test_an_invalid_header_is_refused(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError):
        load(path)


def test_refusing_costs_little_memory(tmp_path):
    """A sparse file of 4 GB."""
    path = tmp_path / "big.safetensors"
    checkpoint.save(path, TENSORS, META)
    with open(path, "r+b") as file:
        file.truncate(1 << 32)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="too long"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """A sparse file of 4 GB on a machine with 4 GB of memory."""
    monkeypatch.setattr(checkpoint, "MEMORY", 1 << 32)
    entry = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [8, 8 + (1 << 32)]}
    path = signed(TENSORS, META, tmp_path / "big.safetensors", {"1.weight": entry})
    with open(path, "r+b") as file:
        file.truncate(header_length(file.read(8)) + 8 + (1 << 32))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"^{path} needs more memory than there is$"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["bit", "nan"])
def test_refusing_a_resume_point_of_the_default_network_costs_little_memory(tmp_path, damage):
    """The file has 46 MB. A flipped bit needs them once, a signed NaN twice: as bytes and as tensors."""
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
            load(path, shapes=shapes)
        assert tracemalloc.get_traced_memory()[1] < (50e6 if damage == "bit" else 100e6)
    finally:
        tracemalloc.stop()


def test_loaded_tensors_share_no_memory_with_the_file(path):
    tensors, _ = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    path.write_bytes(b"")
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_the_tensors_come_from_the_bytes_that_were_hashed(path, monkeypatch):
    """The file is overwritten while its hash is computed."""
    data, sha256 = path.read_bytes(), checkpoint.hashlib.sha256

    def overwrite(start):
        path.write_bytes(data[:-4] + b"\0" * 4)
        return sha256(start)

    monkeypatch.setattr(checkpoint.hashlib, "sha256", overwrite)
    tensors, _ = load(path)
    assert path.read_bytes() != data
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_a_failing_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(checkpoint.StoreError, match=f"cannot write {path}: No space left"):
        checkpoint.save(path, {"1.weight": torch.zeros(3)}, META)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nothing_else_is_unpickled():
    """torch.load is nowhere, and pickle is only where the batches of CIFAR-10 have just been hashed."""
    for path in [ROOT / "main.py", *ROOT.glob("core/**/*.py")]:
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls, path
        assert path.name == "archive.py" or not any("pickle" in name for name in calls), path


# Invalid content with a valid signature

HUGE = 10**400
DEEP: list = []
for _ in range(300):
    DEEP = [DEEP]


def environment(**changes):
    return {"environment": {**checkpoint.msgspec.to_builtins(META.environment), **changes}}


def progress(**changes):
    return {"progress": {**checkpoint.msgspec.to_builtins(Progress()), **changes}}


@pytest.mark.parametrize(
    "meta",
    [
        *({"name": f"x{end}"} for end in ("\x1b[31m", "\n", "\x9b", "\u202e", "\ud800", "/../y", "|", "y" * 100)),
        {"name": ""},
        {"name": 5},
        {"spec": None},
        {"spec": "x"},
        {"spec": DEEP},
        {"spec": {**SPEC, "lr": HUGE}},
        {"spec": {**SPEC, "lr": float("nan")}},
        {"spec": {**SPEC, "widths": DEEP}},
        {"spec": {**SPEC, "\x1b[31m": 1}},
        {"spec": {**SPEC, "norm": "\x1b[31m\ud800"}},
        {"spec_id": "../../../etc"},
        {"data": "a\nb"},
        {"seed": 1},
        {"seed": -1},
        {"seed": HUGE},
        {"seed": 0.0},
        {"schema_version": 2},
        {"schema_version": HUGE},
        {"environment": {}},
        environment(threads=HUGE),
        environment(threads=-1),
        environment(git="\x1b]0;"),
        environment(hardware="\ud800"),
        {"progress": None},
        *(progress(seconds=value) for value in (float("nan"), float("inf"), -1.0, HUGE, "1", True)),
        *(progress(first_step_seconds=value) for value in (float("nan"), -1.0, HUGE)),
        *(progress(timed=value) for value in (-1, HUGE, 0.5, float("nan"))),
        progress(bitwise=1),
    ],
    ids=lambda meta: ascii(meta)[:50],
)
def test_invalid_metadata_is_refused(meta, tmp_path):
    about = ResumePoint(**ABOUT, progress=Progress())
    path = tmp_path / "b.safetensors"
    load(signed(TENSORS, about, path, meta={"name": "y"}), ResumePoint)
    with pytest.raises(CheckpointError) as refused:
        load(signed(TENSORS, about, path, meta=meta), ResumePoint)
    undamaged = f"{path} is a checkpoint of another version of this program: "
    assert sentence(refused).startswith((undamaged, f"{path} is damaged or not a checkpoint of this program: "))


@pytest.mark.parametrize(
    "meta",
    [{"schema_version": 2}, {"spec": {**SPEC, "lookahead": 5}}, {"spec": {**SPEC, "optimizer": "lion"}}],
    ids=str,
)
def test_a_checkpoint_of_another_version_is_not_reported_as_damaged(meta, tmp_path):
    path = signed(TENSORS, META, tmp_path / "b.safetensors", meta=meta)
    with pytest.raises(OtherVersion, match=rf"^{path} is a checkpoint of another version of this program: "):
        load(path)
    with open(path, "r+b") as file:
        flip(file, 8 * path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint of this program: its sha256"):
        load(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"\x1b[31m": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}},
        {"1.weight": {"dtype": "\x1b[31m\ud800", "shape": [20, 30], "data_offsets": [8, 2408]}},
        {"1.weight": {"dtype": ["F32"], "shape": [20, 30], "data_offsets": [8, 2408]}},
        {"1.weight": {"dtype": "F32", "shape": ["\n\x1b", "\u202e"], "data_offsets": [8, 2408]}},
        {"1.weight": {"dtype": "F32", "shape": [HUGE, 30], "data_offsets": [8, 2408]}},
        {"1.weight": {"dtype": "F32", "shape": [20, 30], "data_offsets": ["\x1b"]}},
        {"1.weight": []},
        {"x": {"dtype": "F4", "shape": [0], "data_offsets": [2408, 2408]}},
        {"x": {"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [2408, 2408]}},
        {"x": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [2408, 2408]}},
    ],
    ids=["name", "dtype", "list", "shape", "huge", "offsets", "none", "four bits", "no integer", "overflow"],
)
def test_control_characters_in_a_header_do_not_reach_the_terminal(entry, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        load(signed(TENSORS, META, tmp_path / "b.safetensors", entry))
    sentence(refused)


# Resume points

STEPS = 4  # an epoch


@pytest.fixture
def go_on(tmp_path):
    """A function that writes the resume point of two epochs, with a tensor and metadata changed, and reads it as a
    resumed run does."""
    run, state = Run("x", SPEC, tmp_path), flatten(step.init_state(SPEC))
    run.folder.mkdir(parents=True)
    state["step"] += 2 * STEPS
    history = torch.tensor([[n, 1.5, 0.4, 1.4, 0.5, 3.25, 9000] for n in (1, 2)], dtype=torch.float64)

    def go_on(name="step", change=lambda t: t, meta=None, spec=SPEC):
        tensors = {key: t.clone() for key, t in {**state, "history": history}.items()}
        tensors[name] = change(tensors[name])
        about = {**ABOUT, "spec": spec}
        signed(tensors, ResumePoint(**about, progress=Progress()), run.resume_point(2 * STEPS), meta=meta)
        return resume.newest(run, About(**about), state, STEPS, False, said.append)

    said: list[str] = []
    go_on.said = said
    return go_on


def refuses(go_on, *arguments, **options):
    with pytest.raises(resume.ResumeError, match=r"^every resume point of x is damaged; --force starts anew$"):
        go_on(*arguments, **options)
    (said,) = go_on.said
    assert said.isprintable(), f"{said!r} is more than a sentence"
    assert said.endswith("; looking for the one before")


def test_a_resume_point_is_restored(go_on):
    found = go_on()
    assert not go_on.said
    assert (found.step, found.mode, found.inexact) == (2 * STEPS, Mode("compiled"), None)
    assert found.history == [Epoch(n, 1.5, 0.4, 1.4, 0.5, 3.25, 9000) for n in (1, 2)]


def put(row, column, value):
    def change(history):
        history[row, column] = value
        return history

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("history", put(0, 0, 2)),
        ("history", put(1, 0, 1.5)),
        ("history", put(0, 1, -1)),
        ("history", put(0, 2, 5)),
        ("history", put(1, 4, 5)),
        ("history", put(1, 5, -0.5)),
        ("history", put(1, 6, 0.5)),
        ("history", put(1, 6, 1e300)),
        ("history", put(1, 6, float("nan"))),
        ("history", lambda t: t[:1]),
        ("history", lambda t: t.float()),
        ("step", lambda t: t + 1),
        ("stats/2.running_var", lambda t: t - 2),
        ("stats/2.num_batches_tracked", lambda t: t - 2),
        ("opt/exp_avg_sq/1.weight", lambda t: t - 1),
        ("metrics/loss", lambda t: t - 1),
        ("metrics/loss", lambda t: t + 1e305),
        ("metrics/correct", lambda t: t - 1),
        ("metrics/correct", lambda t: t + STEPS * SPEC["batch_size"] + 1),
        ("params/1.weight", lambda t: t / 0),
    ],
)
def test_an_invalid_resume_point_is_refused(go_on, name, change):
    refuses(go_on, name, change)


def test_a_resume_point_of_another_version_is_not_deleted(go_on, tmp_path):
    """This version could go on from the older one beside it, but then the newer one would be lost."""
    with pytest.raises(resume.ResumeError, match=r"of another version .*; go on with that version, or start anew with"):
        go_on(meta={"schema_version": 2})
    assert len(list(tmp_path.rglob("*.step-*"))) == 1
    assert not go_on.said


def test_more_timed_steps_than_an_epoch_has_are_refused(go_on):
    go_on(meta=progress(timed=STEPS))
    refuses(go_on, meta=progress(timed=STEPS + 1))


def test_a_resume_point_beyond_the_end_of_the_run_is_refused(go_on):
    go_on(spec=resolve({**SPEC, "epochs": 2}))
    refuses(go_on, spec=resolve({**SPEC, "epochs": 1}))
