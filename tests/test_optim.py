"""Optimizers against torch.optim, and schedules against plain formulas."""

import math

import pytest
import torch

from core.functional import optim
from core.spec import resolve

PEERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda params, **options: torch.optim.SGD(params, momentum=0.9, **options),
}
SHAPES = {"1.weight": (7, 5), "1.bias": (7,), "2.weight": (3, 7)}


def hyper(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def counter(step):
    return torch.tensor(step, dtype=torch.int32)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("lr", [1e-3, 0.1])
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-6), (torch.float64, 1e-12, 1e-12)], ids=str
)
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_twenty_steps_against_torch(name, dtype, rtol, atol, lr, weight_decay):
    init, update = optim.OPTIMIZERS[name]
    params = {key: torch.randn(shape, dtype=dtype) for key, shape in SHAPES.items()}
    theirs = {key: p.clone().requires_grad_() for key, p in params.items()}
    peer = PEERS[name](theirs.values(), lr=lr, weight_decay=weight_decay)
    state = init(params)
    for step in range(20):
        grads = {key: torch.randn(shape, dtype=dtype) * 10.0 ** (step % 5 - 3) for key, shape in SHAPES.items()}
        for key, parameter in theirs.items():
            parameter.grad = grads[key].clone()
        peer.step()
        params, state = update(grads, state, params, hyper(lr=lr, weight_decay=weight_decay), counter(step))
        for key, p in params.items():
            torch.testing.assert_close(p, theirs[key].detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_dtypes_and_shapes_are_kept_and_nothing_is_changed(name, dtype):
    """Hyper-parameters are float64: they must not promote what they meet."""
    init, update = optim.OPTIMIZERS[name]
    params = {key: torch.randn(shape, dtype=dtype) for key, shape in SHAPES.items()}
    grads = {key: torch.randn(shape, dtype=dtype) for key, shape in SHAPES.items()}
    state = init(params)
    assert all(torch.count_nonzero(t) == 0 for group in state.values() for t in group.values())
    before = {key: p.clone() for key, p in params.items()}
    new_params, new_state = update(grads, state, params, hyper(lr=0.1, weight_decay=0.1), counter(0))
    assert new_state.keys() == state.keys()
    for group in (new_params, *new_state.values()):
        assert {key: (t.dtype, tuple(t.shape)) for key, t in group.items()} == {
            k: (dtype, s) for k, s in SHAPES.items()
        }
    assert all(torch.equal(params[key], before[key]) for key in params)
    assert all(torch.count_nonzero(t) == 0 for group in state.values() for t in group.values())
    assert not any(torch.equal(new_params[key], params[key]) for key in params)


@pytest.mark.parametrize(("name", "lr"), [("adam", 0.1), ("adamw", 0.1), ("sgd", 0.02)])
def test_a_convex_problem_is_solved(name, lr):
    """The least squares of a well-conditioned system with a known solution."""
    init, update = optim.OPTIMIZERS[name]
    matrix = torch.eye(6, dtype=torch.float64) + 0.1 * torch.randn(6, 6, dtype=torch.float64)
    solution = torch.randn(6, dtype=torch.float64)
    params = {"x": torch.zeros(6, dtype=torch.float64)}
    gradient = torch.func.grad(lambda p: ((matrix @ (p["x"] - solution)) ** 2).sum())
    state = init(params)
    for step in range(600):
        rates = hyper(lr=lr * (1 - step / 600), weight_decay=0.0)
        params, state = update(gradient(params), state, params, rates, counter(step))
    torch.testing.assert_close(params["x"], solution, rtol=0, atol=1e-3)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_against_a_plain_formula(kind, warmup):
    total, lr = 40, 0.3

    def expected(step):
        ramp = min(1.0, (step + 1) / (warmup + 1))
        done = min(1.0, max(0.0, (step - warmup) / (total - warmup)))
        return lr * ramp * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]

    values = hyper(lr=lr, warmup_steps=warmup, total_steps=total)
    for step in range(total + 3):
        found = optim.scheduled_lr(kind, values, counter(step))
        assert found.shape == ()
        assert found.item() == pytest.approx(expected(step), rel=1e-12, abs=1e-15)


def test_schedules_begin_and_end_as_they_say():
    values = hyper(lr=1.0, warmup_steps=4, total_steps=20)
    for kind in ("constant", "linear", "cosine"):
        rates = [optim.scheduled_lr(kind, values, counter(step)).item() for step in range(21)]
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert max(rates) == 1.0
        assert rates[20] == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-15)


def test_a_warm_up_over_the_whole_run_stays_finite():
    values = hyper(lr=1.0, warmup_steps=10, total_steps=10)
    for kind in ("constant", "linear", "cosine"):
        assert all(math.isfinite(optim.scheduled_lr(kind, values, counter(step)).item()) for step in range(12))


def test_hyper_tensors_hold_the_values_of_the_spec():
    values = {"lr": 3e-4, "weight_decay": 0.1, "dropout": 0.25, "label_smoothing": 0.1, "seed": 7}
    spec = resolve({**values, "epochs": 6, "warmup_epochs": 1.5})
    tensors = optim.hyper_tensors(spec, 10, torch.device("cpu"))
    found = {name: t.item() for name, t in tensors.items()}
    assert found == pytest.approx({**values, "warmup_steps": 15, "total_steps": 60})
    assert all(t.shape == () for t in tensors.values())
    assert tensors["seed"].dtype == torch.int32
    assert tensors["lr"].item() == 3e-4  # float64: the rate of the spec to the last bit
