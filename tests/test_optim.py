"""Optimizers against torch.optim, and schedules against plain formulas."""

import math

import pytest
import torch

from core.functional import model, optim
from core.functional.step import hyper_tensors
from core.spec import resolve


class MuonAndAdamW:
    """torch.optim.Muon for the weights of the hidden layers, torch.optim.AdamW for the rest."""

    def __init__(self, params, **options):
        first, *hidden, last = (p for p in params if p.ndim == 2)
        rest = [first, last, *(p for p in params if p.ndim != 2)]
        muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options)
        self.peers = muon, torch.optim.AdamW(rest, **options)

    def step(self):
        for peer in self.peers:
            peer.step()


PEERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda params, **options: torch.optim.SGD(params, momentum=0.9, **options),
    "nesterov": lambda params, **options: torch.optim.SGD(params, momentum=0.9, nesterov=True, **options),
    "muon": MuonAndAdamW,
}
SHAPES = {
    "1.weight": (7, 5),
    "1.bias": (7,),
    "2.weight": (9, 7),
    "3.weight": (4, 9),
    "3.bias": (4,),
    "4.weight": (3, 4),
}


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
    peer = PEERS[name](list(theirs.values()), lr=lr, weight_decay=weight_decay)
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
    for group, old in ((new_params, params), *((new_state[key], state[key]) for key in state)):
        assert list(group) == list(old)  # the order of the buffers that they are written to
        assert {key: (t.dtype, t.shape) for key, t in group.items()} == {k: (dtype, t.shape) for k, t in old.items()}
    assert all(torch.equal(params[key], before[key]) for key in params)
    assert all(torch.count_nonzero(t) == 0 for group in state.values() for t in group.values())
    assert not any(torch.equal(new_params[key], params[key]) for key in params)


@pytest.mark.parametrize(("name", "lr"), [("adam", 0.1), ("adamw", 0.1), ("sgd", 0.02), ("nesterov", 0.02)])
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


def test_muon_solves_a_convex_problem():
    """The least squares of a product of which only the matrix in the middle, a hidden layer, is to be learnt."""
    init, update = optim.OPTIMIZERS["muon"]
    inputs, solution = torch.randn(30, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    first, last = torch.zeros(8, 3, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    params = {"first": first, "hidden": torch.zeros_like(solution), "last": last}
    gradient = torch.func.grad(lambda p: ((inputs @ (p["hidden"] - solution).t()) ** 2).sum())
    state = init(params)
    for step in range(300):
        rates = hyper(lr=0.1 * (1 - step / 300), weight_decay=0.0)
        params, state = update(gradient(params), state, params, rates, counter(step))
    torch.testing.assert_close(params["hidden"], solution, rtol=0, atol=1e-2)
    assert torch.equal(params["first"], first)
    assert torch.equal(params["last"], last)


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64)], ids=str)
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape):
    """And the singular vectors of the matrix, so it is near U V^T."""
    u, s, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.linspace(0.1, 3, len(s), dtype=torch.float64)
    found = optim.orthogonalised(u @ s.diag() @ v)
    assert (found.dtype, tuple(found.shape)) == (torch.bfloat16, shape)
    inside = u.t() @ found.double() @ v.t()  # diagonal, but for the rounding of bfloat16
    assert (inside.diag() > 0.6).all()
    assert (inside.diag() < 1.3).all()
    assert (inside - inside.diag().diag()).abs().max() < 0.05


def test_orthogonalisation_in_a_cohort_is_as_near_as_bfloat16_allows():
    """vmap rounds more results to bfloat16, and Newton-Schulz iterations enlarge what is rounded off: a matrix that is
    scaled by 1%, which changes nothing but the rounding, gives as large a difference."""
    matrices = torch.randn(3, 24, 64)
    together = torch.func.vmap(optim.orthogonalised)(matrices).float()
    for one, matrix in zip(together, matrices, strict=True):
        alone, scaled = optim.orthogonalised(matrix).float(), optim.orthogonalised(1.01 * matrix).float()
        assert 0 < (scaled - alone).norm() < 0.05 * alone.norm()
        assert (one - alone).norm() < 0.1 * alone.norm()


def test_muon_is_for_the_matrices_between_the_first_and_the_last(small_spec):
    for widths, hidden in (([], []), ([8], []), ([8, 8], ["5.weight"]), ([8, 8, 8], ["5.weight", "9.weight"])):
        params, _ = model.init(small_spec(widths=widths), 0)
        state = optim.OPTIMIZERS["muon"].init(params)
        assert list(state["momentum"]) == hidden
        assert list(state["exp_avg"]) == list(state["exp_avg_sq"]) == [name for name in params if name not in hidden]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("largest", [0.01, 3.0, 1e3])
def test_clipped_gradients_against_torch(dtype, rtol, largest):
    grads = {key: torch.randn(shape, dtype=dtype) for key, shape in SHAPES.items()}
    before = {key: g.clone() for key, g in grads.items()}
    peers = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for peer, g in zip(peers, grads.values(), strict=True):
        peer.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(peers, largest).item()
    found = optim.clipped(grads, torch.tensor(largest, dtype=torch.float64))
    for peer, g in zip(peers, found.values(), strict=True):
        torch.testing.assert_close(g, peer.grad, rtol=rtol, atol=0)
    assert torch.cat([g.flatten() for g in found.values()]).norm().item() == pytest.approx(min(norm, largest), rel=1e-4)
    assert all(torch.equal(g, before[key]) for key, g in grads.items())


def test_a_gradient_that_is_nan_is_not_clipped_away():
    grads = {"1.weight": torch.ones(3, 2), "1.bias": torch.tensor([1.0, math.nan, 1.0])}
    found = optim.clipped(grads, torch.tensor(1.0, dtype=torch.float64))
    assert all(g.isnan().all() for g in found.values())


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 400])
def test_one_cycle_against_torch(total):
    peer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(peer, max_lr=0.3, total_steps=total, cycle_momentum=False)
    values = hyper(lr=0.3, warmup_steps=0, total_steps=total)
    for step in range(total):
        found = optim.scheduled_lr("one-cycle", values, counter(step))
        assert found.shape == ()
        assert found.item() == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        if step < total - 1:
            peer.step()
            schedule.step()
    assert optim.scheduled_lr("one-cycle", values, counter(total)).item() == found.item()


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


def test_schedules_start_and_end_at_their_values():
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
    values = {"lr": 3e-4, "weight_decay": 0.1, "clip": 0.5, "dropout": 0.25, "label_smoothing": 0.1, "seed": 7}
    values |= {"ema": 0.9, "rotate": 5.0, "zoom": 0.1, "cutout": 8}
    spec = resolve({**values, "epochs": 6, "warmup_epochs": 1.5, "mixup": 1.0})
    tensors = hyper_tensors(spec, 10)
    # Beta(1, 1) is the uniform distribution.
    torch.testing.assert_close(tensors.pop("mixup"), torch.linspace(0, 1, 1025))
    found = {name: t.item() for name, t in tensors.items()}
    assert found == pytest.approx({**values, "warmup_steps": 15, "total_steps": 60})
    assert all(t.shape == () for t in tensors.values())
    assert tensors["seed"].dtype == torch.int32
    assert tensors["lr"].item() == 3e-4  # float64: the rate of the spec to the last bit
