"""Optimizers as pairs of pure functions, (init, update), and learning-rate schedules as functions of the step.

An update takes and returns dicts of tensors; hyper-parameters that vary between experiments are 0-d tensors, so one
compilation serves all their values.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.functional import prng

Tensors = dict[str, Tensor]
OptState = dict[str, Tensors]
Update = Callable[[Tensors, OptState, Tensors, dict[str, Tensor], Tensor], tuple[Tensors, OptState]]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam
MOMENTUM = 0.9


def _zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(p) for name, p in params.items()}


def adam_init(params: Tensors) -> OptState:
    return {"exp_avg": _zeros(params), "exp_avg_sq": _zeros(params)}


def _adam(grads: Tensors, opt: OptState, params: Tensors, hyper: Tensors, step: Tensor, decoupled: bool):
    lr, decay = hyper["lr"], hyper["weight_decay"]
    t = (step + 1).to(lr.dtype)
    # Bias corrections, once a step rather than once an element: written with exp, inductor keeps them in a buffer of
    # their own; written as BETA ** t, it evaluates the power in the loop over the weights.
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


OPTIMIZERS: dict[str, tuple[Callable[[Tensors], OptState], Update]] = {
    "adam": (adam_init, adam),
    "adamw": (adam_init, adamw),
    "sgd": (sgd_init, sgd),
}


def scheduled_lr(kind: str, hyper: Tensors, step: Tensor) -> Tensor:
    """The learning rate of a step, 0-d: a linear warm-up over `warmup_steps`, then constant, or decaying to zero at
    `total_steps` linearly or as half a cosine.

    Args:
        kind: constant, linear or cosine.
        hyper: 0-d tensors lr, warmup_steps and total_steps.
    """
    lr = hyper["lr"]
    t = step.to(lr.dtype)
    ramp = ((t + 1) / (hyper["warmup_steps"] + 1)).clamp(max=1)
    if kind == "constant":
        return lr * ramp
    done = ((t - hyper["warmup_steps"]) / (hyper["total_steps"] - hyper["warmup_steps"]).clamp(min=1)).clamp(0, 1)
    return lr * ramp * ((1 - done) if kind == "linear" else (1 + torch.cos(done * math.pi)) / 2)


def hyper_tensors(spec: dict[str, Any], steps_per_epoch: int, device: torch.device) -> Tensors:
    """The values of a resolved spec that may differ between experiments of one compilation, as 0-d tensors,
    and the quantiles that `mixup` draws from, [1025].

    Those of the optimizer are float64 (float32 on MPS, which has none), the rates float32, the seed int32.
    """
    wide = torch.float32 if device.type == "mps" else torch.float64
    values = {
        "lr": (spec["lr"], wide),
        "weight_decay": (spec["weight_decay"], wide),
        "warmup_steps": (spec["warmup_epochs"] * steps_per_epoch, wide),
        "total_steps": (spec["epochs"] * steps_per_epoch, wide),
        "dropout": (spec["dropout"], torch.float32),
        "label_smoothing": (spec["label_smoothing"], torch.float32),
        "ema": (spec["ema"], wide),
        "rotate": (spec["rotate"], torch.float32),
        "zoom": (spec["zoom"], torch.float32),
        "cutout": (spec["cutout"], torch.float32),
        "mixup": (prng.beta_quantiles(spec["mixup"]), torch.float32),
        "seed": (spec["seed"], torch.int32),
    }
    return {name: torch.tensor(value, dtype=dtype, device=device) for name, (value, dtype) in values.items()}
