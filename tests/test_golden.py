"""The numbers that no refactoring may change: results of tiny networks in float64, and losses of the default network.

A test that passes adds the hash of the code to core/same_numbers.txt, so that the results of the code before count as
results of this code. With CI set it demands that the hash is there.

uv run python tests/test_golden.py      makes tests/golden.json anew; where a number has changed it begins a new list,
                                        and the results of all code before count as results of other code
"""

import ast
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import code_hash  # noqa: E402
from core.compile import fused  # noqa: E402
from core.data import cifar10 as dataset  # noqa: E402
from core.events import EpochDone  # noqa: E402
from core.functional import augment, model, step  # noqa: E402
from core.functional.tree import leaves, tree_map  # noqa: E402
from core.mode import Mode  # noqa: E402
from core.spec import CIFAR10, FIELDS, Choice, resolve, static  # noqa: E402
from core.train import Training, fit  # noqa: E402
from tests.conftest import MUON, inputs_of_default  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 15
TOLERANCE = 1e-8  # relative: kinds of CPU and numbers of threads differ by a fiftieth of it

BASE = {"widths": [12, 8], "batch_size": 48, "epochs": 2}
CASES = {
    "default": {},
    "residual": {
        "widths": [8, 8, 6],
        "expansion": 2,
        "norm": "layer",
        "activation": "gelu",
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "ema": 0.9,
        "label_smoothing": 0.1,
        "seed": 3,
    },
    "sampled": {
        "augment": "flip+shift",
        "shift": 3,
        "shift_fill": "reflect",
        "rotate": 15,
        "zoom": 0.1,
        "cutout": 8,
        "mixup": 0.4,
        "activation": "relu",
        "optimizer": "sgd",
        "clip": 0.1,
        "schedule": "linear",
        "weight_decay": 0.01,
    },
    "rotated": {"rotate": 15, "warmup_epochs": 0.5},
    "moved": {
        "augment": "flip+shift",
        "norm": "none",
        "activation": "tanh",
        "optimizer": "nesterov",
        "weight_decay": 0.01,
        "lr": 0.1,
        "dropout": 0,
    },
    "reflected": {
        "augment": "flip+shift",
        "shift": 8,
        "shift_fill": "reflect",
        "train_on": "all",
        "batch_size": 150,
        "epochs": 1,
        "norm": "layer",
        "schedule": "one-cycle",
        "lr": 3,  # so large that the last step, at a 250,000th of it, shows
    },
    "local": {"locality": [2, 5], "optimizer": "adamw", "weight_decay": 0.1, "clip": 0.5, "ema": 0.9},
    "whitened": {"augment": "flip", "whiten": 4, "whiten_eps": 0.1},
    "local, whitened": {"locality": [3], "whiten": 4},
    "muon": {"widths": [8, 12, 8], "optimizer": "muon", "precision": "bfloat16", "weight_decay": 0.1},
    "muon, no gradient": {"widths": [8, 12, 8], "optimizer": "muon", "clip": 1e-9},
}


class Float64(TorchDispatchMode):
    """All arithmetic in float64, whatever the code asks for. What becomes bfloat16 is rounded and stays float64.

    In float32, rounding grows to a thousandth of the loss in 15 steps (Adam divides by the gradient's size, however
    small that is), and each kind of CPU rounds in its own way. In float64 all of them agree.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return type(found)(map(in_float64, found)) if isinstance(found, list | tuple) else in_float64(found)


def in_float64(value):
    reduced = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
    return value.double() if reduced else value


def pictures():
    """Images made of integers, so that they are the same everywhere: 5,200 to train on or to validate with, 60 to test.

    Each is a sum of ten patterns, which differ in strength, and of noise; there is more of the pattern of its class.
    """
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(5260) % 10
    patterns = torch.randint(-6, 7, (10, 3072), generator=generator) * torch.arange(2, 12)[:, None] // 4
    shares = torch.randint(0, 2, (5260, 10), generator=generator) + 2 * torch.nn.functional.one_hot(labels, 10)
    noise = torch.randint(-40, 41, (5260, 3072), generator=generator, dtype=torch.int16)
    sums = (shares.float() @ patterns.float()).short()  # exact: small integers
    images = (128 + sums + noise).clamp(0, 255).to(torch.uint8)
    return dataset.Data(images[:5200], labels[:5200], images[5200:], labels[5200:])


def numbers(data, spec):
    """(name, number) of each result of a run: its epochs, the evaluation, a norm of each tensor."""
    with Float64():
        training = Training(resolve({**BASE, **spec}), data, torch.device("cpu"), Mode("eager"))
        if training.whitening and "back" not in training.whitening:
            # A principal component has no sign of its own. One for all machines: that of its product with a ramp.
            sign = (training.whitening["weight"] @ torch.arange(3072, dtype=torch.float64)).sign()
            for one in (training.whitening, training.data["whitening"]):
                one.update(weight=one["weight"] * sign[:, None], bias=one["bias"] * sign)
        for _, event in fit([training]):
            keys = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
            for key in keys if isinstance(event, EpochDone) else ():
                if getattr(event, key) is not None:
                    yield f"epoch {event.epoch} {key}", getattr(event, key)
        for tta in ("none", "flip"):
            evaluated = step.summary(training.answers("test", tta))
            for key in ("loss", "accuracy"):
                yield f"test {key}, flip {tta == 'flip'}", evaluated[key]
        for name, t in training.weights.items():
            yield f"norm of {name}", t.double().norm().item()
            yield f"norm of {name} + 1", (t.double() + 1).norm().item()  # another one with another sign


def same(one, other):
    return one is not None and one == pytest.approx(other, rel=TOLERANCE, abs=0)


def differences(found, golden):
    """The names of the numbers that differ, or that one of the two lacks."""
    return sorted(name for name in found.keys() | golden.keys() if not same(found.get(name), golden.get(name)))


def steps_in_float64(data, **changes):
    """The state before each of the first steps of the default network with some changes, and the summed loss of it."""
    spec, state, *others = inputs_of_default(data, **{**changes, "precision": "float32"})
    state = tree_map(in_float64, state)
    normalise = augment.normalise
    states, losses = [], []
    with mock.patch.object(augment, "normalise", lambda *images: normalise(*images).double()):
        train_step = step.make_train_step(static(spec))
        for _ in range(STEPS):
            states.append(state)
            state = train_step(state, *others)
            losses.append((state["metrics"]["loss"] - states[-1]["metrics"]["loss"]).item())
    return states, losses


@pytest.fixture(scope="module")
def exact(cifar10):
    return steps_in_float64(cifar10)


@pytest.fixture(scope="module")
def exact_muon(cifar10):
    return steps_in_float64(cifar10, **MUON)


@pytest.fixture(scope="module")
def invented_pictures():
    return pictures()


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


# The numbers


@pytest.mark.slow
def test_the_numbers_are_the_golden_ones(exact, invented_pictures, golden):
    """One test, since the hash of the code is added where all of it passes."""
    found = {name: dict(numbers(invented_pictures, spec)) for name, spec in CASES.items()}
    assert found.keys() == golden["cases"].keys(), "a new case: `uv run python tests/test_golden.py` adds it"
    moved = {name: differences(found[name], golden["cases"][name]) for name in found}
    assert not any(moved.values()), moved
    assert exact[1] == pytest.approx(golden["losses"], rel=TOLERANCE)
    remember(code_hash.CODE)


def remember(code):
    """Add a hash to the list of those that give the golden numbers; with CI set, demand that it is there."""
    listed = code_hash.LIST.read_text()
    if code in listed.split():
        return
    if os.environ.get("CI"):
        pytest.fail(f"{code} is not in {code_hash.LIST}: run `uv run pytest tests/test_golden.py` and commit that file")
    code_hash.LIST.write_text(f"{listed}{code}\n")


def test_the_hash_is_added_once_and_required_in_ci(monkeypatch, tmp_path):
    monkeypatch.setattr(code_hash, "LIST", tmp_path / "list.txt")
    code_hash.LIST.write_text("# Hashes.\n000000000000\n")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="111111111111 is not in"):
        remember("1" * 12)
    monkeypatch.delenv("CI")
    for code in ("1" * 12, "0" * 12, "1" * 12):
        remember(code)
    assert code_hash.LIST.read_text() == "# Hashes.\n000000000000\n111111111111\n"
    monkeypatch.setenv("CI", "true")
    remember("1" * 12)


def make_anew():
    """Write the golden numbers. A new list begins where one of them has changed, but not where a case is new."""
    golden, data = json.loads(GOLDEN.read_text()), pictures()
    found = {name: dict(numbers(data, spec)) for name, spec in CASES.items()}
    losses = steps_in_float64(dataset.load(ROOT / "data"))[1]
    kept = found.keys() & golden["cases"].keys()
    if losses != pytest.approx(golden["losses"], rel=TOLERANCE) or any(
        differences(found[name], golden["cases"][name]) for name in kept
    ):
        code_hash.LIST.write_text(code_hash.LIST.read_text().split("\n")[0] + "\n")
    GOLDEN.write_text(json.dumps({"losses": losses, "cases": found}, indent=1) + "\n")
    remember(code_hash.CODE)


# What the numbers cover

TO_BASE = {"widths": [12], "batch_size": 40, "epochs": 1}  # a default would take long
BY_DEVICE = {"precision": {"tf32"}}  # a mode of GPUs
KEYS = {key: field for key, field in FIELDS.items() if key != "dataset"}  # the data is an argument; see DATA_INFO


def test_every_key_and_every_choice_is_in_a_case():
    specs = [resolve({**BASE, **spec}) for spec in CASES.values()]
    for key, field in KEYS.items():
        assert any(spec[key] != field.default for spec in specs), f"no case has another {key} than by default"
        if isinstance(field.values, Choice):
            missing = set(field.values.options) - {spec[key] for spec in specs}
            assert missing == BY_DEVICE.get(key, set()), f"choices of {key} in no case: {missing}"


def is_noticed(data, spec, golden):
    """Whether a number differs; the first one is enough."""
    return any(not same(number, golden[name]) for name, number in numbers(data, spec))


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_noticed(invented_pictures, golden, key):
    """A case that has another value than by default has other numbers with the default."""
    name = next(name for name, spec in CASES.items() if key in {**TO_BASE, **spec})
    value = TO_BASE.get(key, FIELDS[key].default)
    assert is_noticed(invented_pictures, {**CASES[name], key: value}, golden["cases"][name])


# Of each constant that decides a number, a case that notices another value.
NOTICED = {
    "functional.model.EPS": "default",
    "functional.model.MOMENTUM": "default",
    "functional.model.NEGATIVE_SLOPE": "default",
    "functional.optim.BETA1": "default",
    "functional.optim.BETA2": "default",
    "functional.optim.EPS": "muon, no gradient",
    "functional.optim.MOMENTUM": "sampled",
    "functional.optim.MUON_MOMENTUM": "muon",
    "functional.optim.MUON_A": "muon",
    "functional.optim.MUON_B": "muon",
    "functional.optim.MUON_C": "muon",
    "functional.optim.MUON_ITERATIONS": "muon",
    "functional.optim.MUON_EPS": "muon, no gradient",
    "functional.locality.FLOOR": "local",
    "functional.optim.RISING": "reflected",
    "functional.optim.FIRST_DIVISOR": "reflected",
    "functional.optim.LAST_DIVISOR": "reflected",
    "functional.prng.DROPOUT": "default",
    "functional.prng.AUGMENT": "reflected",
    "functional.prng.AFFINE": "rotated",
    "functional.prng.CUTOUT": "sampled",
    "functional.prng.MIXUP": "sampled",
    "functional.prng.CENTRES": "local",
    "functional.prng._PARITY": "default",
    "functional.prng._ROTATIONS": "default",
}
DECIDE_NOTHING = {
    "functional.step.NEVER",  # a mark
    "train.PAUSE",  # of a clock
    "data.whitening.CHUNK",  # sums of integers, exact in any order
}


def constants():
    """The numbers that the modules behind a run name: "functional.optim.EPS"."""
    files = [*(ROOT / "core" / "functional").glob("*.py"), *(ROOT / "core" / "data").glob("[lw]*.py")]
    for path in [*files, ROOT / "core" / "train.py"]:
        place = ".".join(path.relative_to(ROOT / "core").with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for name in (each.id for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)):
                if is_number(getattr(importlib.import_module(f"core.{place}"), name)):
                    yield f"{place}.{name}"


def is_number(value):
    return all(map(is_number, value)) if isinstance(value, tuple) and value else isinstance(value, int | float)


def another(value):
    if isinstance(value, tuple):
        return (*value[:-1], another(value[-1]))
    return value + 1 if isinstance(value, int) else value * 1.01


def test_every_constant_has_a_case_or_decides_nothing():
    assert set(constants()) == NOTICED.keys() | DECIDE_NOTHING


@pytest.mark.slow
@pytest.mark.parametrize("constant", NOTICED)
def test_another_constant_is_noticed(invented_pictures, golden, monkeypatch, constant):
    place, name = constant.rsplit(".", 1)
    module = importlib.import_module(f"core.{place}")
    monkeypatch.setattr(module, name, another(getattr(module, name)))
    with contextlib.suppress(RuntimeError, IndexError):  # shapes that do not fit are noticed, too
        assert is_noticed(invented_pictures, CASES[NOTICED[constant]], golden["cases"][NOTICED[constant]])


DATA_INFO = {
    "classes": (*CIFAR10.classes, "zebra"),
    "shape": (1, 32, 96),
    "mean": another(CIFAR10.mean),
    "std": another(CIFAR10.std),
    "held_out": 501,
}


def test_every_field_of_the_data_set_is_in_the_table():
    assert DATA_INFO.keys() == {field.name for field in dataclasses.fields(CIFAR10)}


@pytest.mark.slow
@pytest.mark.parametrize("field", DATA_INFO)
def test_another_value_of_the_data_set_is_noticed(invented_pictures, golden, field):
    changes = {field: DATA_INFO[field]} | ({"mean": (0.5,), "std": (0.25,)} if field == "shape" else {})
    data = invented_pictures._replace(info=dataclasses.replace(CIFAR10, **changes))
    assert is_noticed(data, CASES["default"], golden["cases"]["default"])


# The compiled step, and other precisions


# Any change of meaning is far larger than these bounds. Muon shares its compilation with other tests.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "compiled"),
    [({}, False), ({}, True), ({"precision": "bfloat16"}, False), (MUON, True)],
    ids=["float32", "float32 compiled", "bfloat16", "Muon in bfloat16 compiled"],
)
def test_each_step_gives_the_golden_loss(cifar10, request, changes, compiled):
    """Two steps from each second state of the run in float64; the second one shows the update of the first."""
    spec, buffers, *others = inputs_of_default(cifar10, **changes)
    advance = fused.fuse(spec, buffers, *others, compiled).advance
    states, golden = request.getfixturevalue("exact_muon" if changes is MUON else "exact")
    found = []
    for n in range(STEPS):
        if n % 2 == 0:
            start = {**states[n], "effective": model.effective(states[n]["params"], spec)}
            for buffer, value in zip(leaves(buffers), leaves(start), strict=True):
                buffer.copy_(value)
        before = buffers["metrics"]["loss"].item()
        advance()
        found.append(buffers["metrics"]["loss"].item() - before)
    reduced = spec["precision"] == "bfloat16"
    assert found == pytest.approx(golden, rel=1e-2 if reduced else 1e-4)
    if reduced:  # the negative control: it is bfloat16 that was used
        assert found != pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    make_anew()
