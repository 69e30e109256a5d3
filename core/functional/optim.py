"""Optimizers as pairs of pure functions, and learning-rate schedules as functions of the step.

An update takes and returns dicts of tensors. Hyper-parameters that vary between experiments are 0-d tensors, so one
compilation serves all their values.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
OptState = dict[str, Tensors]


class Optimizer(NamedTuple):
    """A rule that computes updates.

    Attributes:
        init: params -> the state of the optimizer before the first step.
        update: (gradients, state, params, hyper, step) -> new params, new state. `hyper` holds 0-d tensors, among them
            the scheduled `lr` and `weight_decay`; `step` counts from 0 (int32). All dtypes stay as they are.
    """

    init: Callable[[Tensors], OptState]
    update: Callable[[Tensors, OptState, Tensors, Tensors, Tensor], tuple[Tensors, OptState]]


BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam
MOMENTUM = 0.9

# The defaults of torch.optim.Muon: the quintic polynomial of the iteration, the number of iterations, and the smallest
# norm that a matrix is divided by.
MUON_MOMENTUM = 0.95
MUON_A, MUON_B, MUON_C = 3.4445, -4.7750, 2.0315
MUON_ITERATIONS, MUON_EPS = 5, 1e-7

# The defaults of torch.optim.lr_scheduler.OneCycleLR: the share of the steps in which the rate rises, the largest rate
# divided by the first, and the first divided by the last.
RISING, FIRST_DIVISOR, LAST_DIVISOR = 0.3, 25, 1e4


def _zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def adam_init(params: Tensors) -> OptState:
    return {"exp_avg": _zeros(params), "exp_avg_sq": _zeros(params)}


def _adam(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor, decoupled: bool):
    lr, decay = hyper["lr"], hyper["weight_decay"]
    t = (step + 1).to(lr.dtype)
    # Bias corrections. With exp, inductor computes them once a step and keeps them in a buffer; with BETA ** t, it
    # computes the power again for every weight.
    step_size = lr / (1 - torch.exp(t * math.log(BETA1)))
    root_correction = torch.rsqrt(1 - torch.exp(t * math.log(BETA2)))
    dtype = next(iter(params.values())).dtype
    step_size, root_correction = step_size.to(dtype), root_correction.to(dtype)
    decay, kept = decay.to(dtype), (1 - lr * decay).to(dtype)
    new_params, exp_avg, exp_avg_sq = {}, {}, {}
    for name, p in params.items():
        g = grads[name]
        if decoupled:
            p = p * kept
        else:
            g = torch.addcmul(g, decay, p)
        m = torch.lerp(opt["exp_avg"][name], g, 1 - BETA1)
        v = torch.addcmul(opt["exp_avg_sq"][name] * BETA2, g, g, value=1 - BETA2)
        new_params[name] = torch.addcdiv(p, m * -step_size, v.sqrt() * root_correction + EPS)
        exp_avg[name], exp_avg_sq[name] = m, v
    return new_params, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def adam(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor):
    """Adam (Kingma and Ba 2015), the arithmetic of torch.optim.Adam; weight decay is added to the gradient."""
    return _adam(grads, opt, params, hyper, step, decoupled=False)


def adamw(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor):
    """AdamW (Loshchilov and Hutter 2019), the arithmetic of torch.optim.AdamW."""
    return _adam(grads, opt, params, hyper, step, decoupled=True)


def sgd_init(params: Tensors) -> OptState:
    return {"momentum": _zeros(params)}


def sgd(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor):
    """Gradient descent with momentum 0.9, the arithmetic of torch.optim.SGD."""
    momentum = {
        name: opt["momentum"][name] * MOMENTUM + grads[name] + hyper["weight_decay"].to(p.dtype) * p
        for name, p in params.items()
    }
    return {name: p - hyper["lr"].to(p.dtype) * momentum[name] for name, p in params.items()}, {"momentum": momentum}


def nesterov(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor):
    """Gradient descent with Nesterov momentum 0.9 (Sutskever, Martens, Dahl and Hinton 2013), the arithmetic of
    torch.optim.SGD(nesterov=True)."""
    new_params, momentum = {}, {}
    for name, p in params.items():
        g = grads[name] + hyper["weight_decay"].to(p.dtype) * p
        m = opt["momentum"][name] * MOMENTUM + g
        new_params[name] = p - hyper["lr"].to(p.dtype) * (g + m * MOMENTUM)
        momentum[name] = m
    return new_params, {"momentum": momentum}


def muon_init(params: Tensors) -> OptState:
    """`momentum` for the weights of the hidden layers, that is, all matrices [outputs, inputs] but the first and the
    last; Adam's moments for everything else."""
    hidden = [name for name, p in params.items() if p.ndim == 2][1:-1]
    others = {name: p for name, p in params.items() if name not in hidden}
    return {"momentum": _zeros({name: params[name] for name in hidden}), **adam_init(others)}


def muon(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the weights of the hidden layers, the
    arithmetic of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"); AdamW for everything else.

    AdamW trains the first and the last layer, too; Jordan found that better. Here it also saves most of the time, since
    the first layer has most of the weights. A network with fewer than two hidden layers is trained by AdamW alone.
    "match_rms_adamw" (Liu et al. 2025, https://arxiv.org/abs/2502.16982) makes a step of Muon as large as a step of
    AdamW. So both use the same learning rate and the same decoupled weight decay.
    """
    others = {name: p for name, p in params.items() if name not in opt["momentum"]}
    new_params, moments = adamw(grads, opt, others, hyper, step)
    momentum = {}
    for name, m in opt["momentum"].items():
        p, g = params[name], grads[name]
        m = torch.lerp(m, g, 1 - MUON_MOMENTUM)
        direction = orthogonalised(torch.lerp(g, m, MUON_MOMENTUM)).to(p.dtype)
        kept = (1 - hyper["lr"] * hyper["weight_decay"]).to(p.dtype)
        new_params[name] = p * kept - (hyper["lr"] * (0.2 * math.sqrt(max(p.shape)))).to(p.dtype) * direction
        momentum[name] = m
    return {name: new_params[name] for name in params}, {"momentum": momentum, **moments}


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximately U V^T of a matrix U S V^T, bfloat16: five Newton-Schulz iterations bring the singular values to
    numbers from 0.7 to 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.t() if tall else x
    x = x / _square_sum(x.float()).sqrt().to(x.dtype).clamp(min=MUON_EPS)
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=MUON_B, alpha=MUON_C), x, beta=MUON_A)
    return x.t() if tall else x


def _square_sum(t: Tensor) -> Tensor:
    """The sum of all squares, 0-d. It is summed row by row, so that several threads can work on different rows."""
    return (t * t).sum(-1).sum()


OPTIMIZERS = {
    "adam": Optimizer(adam_init, adam),
    "adamw": Optimizer(adam_init, adamw),
    "sgd": Optimizer(sgd_init, sgd),
    "nesterov": Optimizer(sgd_init, nesterov),
    "muon": Optimizer(muon_init, muon),
}


def clipped(grads: Tensors, largest: Tensor) -> Tensors:
    """Gradients whose norm together is at most `largest` (0-d): larger ones are scaled down. The arithmetic of
    torch.nn.utils.clip_grad_norm_ (Pascanu, Mikolov and Bengio 2013)."""
    norm = torch.stack([_square_sum(g) for g in grads.values()]).sum().sqrt()
    scale = (largest / (norm + 1e-6)).clamp(max=1)
    return {name: g * scale.to(g.dtype) for name, g in grads.items()}


def scheduled_lr(kind: str, hyper: Tensors, step: Tensor) -> Tensor:
    """The learning rate of a step, 0-d.

    After a linear warm-up over `warmup_steps` it is constant, or it decays to zero at `total_steps`, linearly or along
    half a cosine. "one-cycle" has a warm-up of its own.

    Args:
        kind: constant, linear, cosine or one-cycle.
        hyper: 0-d tensors `lr`, `warmup_steps` and `total_steps`.
    """
    lr = hyper["lr"]
    t = step.to(lr.dtype)
    if kind == "one-cycle":
        return _one_cycle(lr, t, hyper["total_steps"])
    ramp = ((t + 1) / (hyper["warmup_steps"] + 1)).clamp(max=1)
    if kind == "constant":
        return lr * ramp
    done = ((t - hyper["warmup_steps"]) / (hyper["total_steps"] - hyper["warmup_steps"]).clamp(min=1)).clamp(0, 1)
    return lr * ramp * ((1 - done) if kind == "linear" else (1 + torch.cos(done * math.pi)) / 2)


def _one_cycle(lr: Tensor, t: Tensor, total: Tensor) -> Tensor:
    """From lr / 25 up to lr at 30% of the steps, then down to lr / 250,000 in the last step, each along half a cosine:
    the arithmetic of torch.optim.lr_scheduler.OneCycleLR (Smith and Topin 2018)."""

    def between(start: Tensor, end: Tensor, done: Tensor) -> Tensor:
        return end + (start - end) * (1 + torch.cos(done.clamp(0, 1) * math.pi)) / 2

    first, peak = lr / FIRST_DIVISOR, total * RISING - 1
    falling = between(lr, first / LAST_DIVISOR, (t - peak) / (total - 1 - peak))
    return torch.where(t <= peak, between(first, lr, t / peak), falling)


def derived(spec: dict[str, Any], steps_per_epoch: int) -> dict[str, float]:
    """Hyper-parameters of the schedule that are computed from several keys of a resolved spec."""
    return {
        "warmup_steps": spec["warmup_epochs"] * steps_per_epoch,
        "total_steps": spec["epochs"] * steps_per_epoch,
    }
