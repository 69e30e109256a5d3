"""The border to the machine: compiled against eager, one compilation for many specs, and no compiler at all.

All compiled tests share one compilation, of the spec {"widths": [32, 16], "batch_size": 64}.
"""

import contextlib
import json

import pytest
import torch

from core import train
from core.compile import cache, fused, inductor
from core.compile.device import pick_device, to_device
from core.functional import step, tree
from core.runs import files, store

GRAPHS = torch._dynamo.utils.counters["stats"]  # "unique_graphs" counts what Dynamo has compiled in this process

compiles = pytest.mark.skipif(fused.compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler here")


def clone(tree):
    return {key: clone(value) if isinstance(value, dict) else value.clone() for key, value in tree.items()}


def libraries():
    return sorted(cache.CACHE.glob("*.so"))


@pytest.fixture(scope="module")
def compiled(small_spec, step_inputs, tmp_path_factory):
    """Compiles the step, whatever earlier runs have left; yields the inputs and the state after one compiled step."""
    spec = small_spec()
    state, data, hyper = step_inputs(spec)
    after = clone(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CACHE", tmp_path_factory.mktemp("compiled"))
        fused.fuse(spec, after, data, hyper, compiled=True)()
        assert len(libraries()) == 1
        yield spec, state, data, hyper, after


@pytest.fixture
def nothing_compiles(compiled, monkeypatch):
    before = libraries()

    def refuse(*_):
        raise AssertionError("a second compilation")

    monkeypatch.setattr(cache, "start", refuse)
    monkeypatch.setattr(cache, "_make_and_keep", refuse)
    yield
    assert libraries() == before


def assert_close(one, other):
    """Statistics, gradients and parameters after one step.

    Adam divides a gradient by its own size, so where that is mere rounding error (all of a bias before batch norm), the
    update is a whole step of either sign; such elements are left out of the parameters, not of the gradients.
    """
    gradients = {name: mean / 0.1 for name, mean in other["opt"]["exp_avg"].items()}
    compared = 0
    for name, value in one["params"].items():
        torch.testing.assert_close(one["opt"]["exp_avg"][name], gradients[name] * 0.1, rtol=1e-5, atol=1e-6)
        sure = gradients[name].abs() > 1e-5
        compared += int(sure.sum())
        torch.testing.assert_close(value[sure], other["params"][name][sure], rtol=1e-5, atol=1e-5)
    assert compared > 0.9 * sum(value.numel() for value in one["params"].values())
    for name, value in one["stats"].items():
        torch.testing.assert_close(value, other["stats"][name], rtol=1e-5, atol=1e-5)


@compiles
@pytest.mark.slow
def test_compiled_step_is_near_the_eager_one(compiled):
    """The dropout mask must be the same bits: another would be far outside the tolerance."""
    spec, state, data, hyper, after = compiled
    eager = step.make_train_step(spec)(state, data, hyper)
    assert_close(after, eager)
    assert int(after["step"]) == 1
    assert after["metrics"]["loss"].item() == pytest.approx(eager["metrics"]["loss"].item(), rel=1e-5)
    assert after["metrics"]["correct"].item() == eager["metrics"]["correct"].item()
    for name, second in eager["opt"]["exp_avg_sq"].items():
        torch.testing.assert_close(after["opt"]["exp_avg_sq"][name], second, rtol=1e-3, atol=1e-8)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 5e-4},
        {"lr": 1e-4},
        {"seed": 12345},
        {"dropout": 0.5},
        {"weight_decay": 0.1},
        {"label_smoothing": 0.1},
        {"epochs": 3, "warmup_epochs": 0.5},
    ],
    ids=str,
)
def test_another_spec_of_the_same_shape_compiles_nothing(nothing_compiles, small_spec, step_inputs, changes):
    """Two steps each, with new buffers, as the next experiment of a suite has; and they are its own steps."""
    spec = small_spec(**changes)
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(spec)(state, data, hyper)
    advance = fused.fuse(spec, state, data, hyper, compiled=True)
    advance()
    first = clone(state)
    advance()
    assert int(state["step"]) == 2
    assert_close(first, eager)


@compiles
@pytest.mark.slow
def test_a_new_order_of_the_same_epoch_length_compiles_nothing(compiled, nothing_compiles):
    """Each epoch copies its order into the same buffer."""
    spec, state, data, hyper, _ = compiled
    state, data = clone(state), {**data, "order": data["order"].clone()}
    advance = fused.fuse(spec, state, data, hyper, compiled=True)
    for _ in range(9):
        advance()
    data["order"].copy_(data["order"].flip(0))
    advance()
    assert int(state["step"]) == 10


@compiles
@pytest.mark.slow
def test_compiled_steps_repeat_bit_for_bit(compiled):
    spec, state, data, hyper, after = compiled
    again = clone(state)
    fused.fuse(spec, again, data, hyper, compiled=True)()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(again), strict=True))


@compiles
@pytest.mark.slow
def test_another_shape_compiles_and_in_this_process_too(compiled, small_spec, step_inputs, monkeypatch):
    """Where no process can be forked, this one compiles: one graph, counted by Dynamo."""
    monkeypatch.setattr(cache, "start", lambda *_: None)
    spec = small_spec(optimizer="sgd", augment="flip+shift")
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(spec)(state, data, hyper)
    before, graphs = libraries(), GRAPHS["unique_graphs"]
    fused.fuse(spec, state, data, hyper, compiled=True)()
    assert len(libraries()) == len(before) + 1
    assert GRAPHS["unique_graphs"] == graphs + 1
    for name, value in state["params"].items():
        torch.testing.assert_close(value, eager["params"][name], rtol=1e-5, atol=1e-5)


def swap(text):
    kept = json.loads(text)
    kept["inputs"][:2] = kept["inputs"][1::-1]
    return json.dumps(kept).encode()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".so", lambda data: data[: len(data) // 2]),
        (".so", lambda data: b""),
        (".so", lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        (".json", lambda text: b""),
        (".json", lambda text: b"[0, 1]"),
        (".json", lambda text: text[:-20]),
        (".json", swap),
        (".json", None),
        (".so", None),
    ],
    ids=range(9),
)
def test_a_damaged_library_is_made_anew(compiled, monkeypatch, suffix, damage):
    """It is never loaded: that could end the process, or train wrongly."""
    spec, state, data, hyper, after = compiled
    path = fused._recipe(spec, (state, data, hyper))[0].with_suffix(suffix)
    good = path.read_bytes()
    # By a new file, as the loaded one is mapped into this process.
    store.atomic_write(path, damage(good)) if damage else path.unlink()
    made = []
    monkeypatch.setattr(cache, "start", lambda *_: (made.append(1), store.atomic_write(path, good)))
    again = clone(state)
    fused.fuse(spec, again, data, hyper, compiled=True)()
    assert made == [1]
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(again), strict=True))


def test_eager_fuse_advances_the_standing_buffers(small_spec, step_inputs):
    """The state is replaced in place, by exactly what the pure step gives."""
    spec = small_spec()
    state, data, hyper = step_inputs(spec)
    pure = step.make_train_step(spec)(state, data, hyper)
    places = [t.data_ptr() for t in tree.leaves(state)]
    advance = fused.fuse(spec, state, data, hyper, compiled=False)
    assert int(state["step"]) == 0
    advance()
    assert [t.data_ptr() for t in tree.leaves(state)] == places
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(pure), strict=True))
    advance()
    assert int(state["step"]) == 2


def test_no_compiler_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert fused.compiler_problem(torch.device("cpu")) == "no C++ compiler (g++ or clang++) was found"
    compiler = tmp_path / "clang++"
    compiler.touch(0o755)
    assert fused.compiler_problem(torch.device("cpu")) is None
    compiler.rename(tmp_path / "mine")
    monkeypatch.setenv("CXX", "mine")
    assert fused.compiler_problem(torch.device("cpu")) is None


def test_a_compilation_that_fails_becomes_eager(monkeypatch, tmp_path, invented, small_spec):
    """One event with the reason, the same run to the end, and the record says in which mode it was made."""

    def broken(*_, **__):
        raise RuntimeError("the linker is missing\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(inductor, "compiling", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(cache, "CACHE", tmp_path / "nothing compiled yet")
    events = []
    spec = small_spec(epochs=1)
    run = files.Run(tmp_path, "x", "0" * 12)
    run.folder.mkdir(parents=True)
    record = train.Training(
        run, "x", spec, invented, torch.device("cpu"), compiled=True, listen=lambda *event: events.append(event)
    )()
    reasons = [details["reason"] for event, details in events if event == "eager"]
    assert reasons == ["torch.compile failed: the linker is missing"]
    assert record["environment"]["mode"] == "eager"
    assert record["status"] == "finished"


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"^device {name} is not there; present: cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_to_device_copies_the_tree():
    tree = {"a": {"b": torch.arange(3)}, "c": torch.tensor(1.0, dtype=torch.float64)}
    moved = to_device(tree, torch.device("cpu"))
    assert torch.equal(moved["a"]["b"], tree["a"]["b"])
    assert moved["c"].dtype == torch.float64
