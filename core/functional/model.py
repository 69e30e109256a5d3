"""The multilayer perceptron as pure functions over dicts of tensors, named as in the equivalent torch.nn.Sequential.

Inside, activations are feature-major, [features, batch]: the matrix products run faster that way at small batches, and
batch norm reduces along the contiguous axis. Callers see [batch, features].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.spec import Spec

Tensors = dict[str, Tensor]

INPUTS, CLASSES = 3 * 32 * 32, 10
EPS, MOMENTUM, NEGATIVE_SLOPE = 1e-5, 0.1, 0.01  # the defaults of BatchNorm1d and LeakyReLU

ACTIVATIONS = {
    "leaky_relu": lambda h: F.leaky_relu(h, NEGATIVE_SLOPE),
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


def layers(spec: Spec) -> list[tuple[str, int, int]]:
    """(kind, inputs, outputs) of each layer; its place in the list is its index in the Sequential."""
    stack, inputs = [("flatten", INPUTS, INPUTS)], INPUTS
    for width in spec["widths"]:
        stack.append(("linear", inputs, width))
        if spec["norm"] == "batch":
            stack.append(("norm", width, width))
        stack.append((spec["activation"], width, width))
        if spec["dropout"] > 0:
            stack.append(("dropout", width, width))
        inputs = width
    return [*stack, ("linear", inputs, CLASSES)]


def shapes(spec: Spec) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape of every parameter, and of every batch-norm statistic. All are float32 but the int64 counters
    `num_batches_tracked`."""
    params: dict[str, tuple[int, ...]] = {}
    stats: dict[str, tuple[int, ...]] = {}
    for i, (kind, inputs, outputs) in enumerate(layers(spec)):
        if kind in ("linear", "norm"):
            params[f"{i}.weight"] = (outputs, inputs) if kind == "linear" else (outputs,)
            params[f"{i}.bias"] = (outputs,)
        if kind == "norm":
            stats |= {f"{i}.running_mean": (outputs,), f"{i}.running_var": (outputs,), f"{i}.num_batches_tracked": ()}
    return params, stats


def init(spec: Spec, seed: int) -> tuple[Tensors, Tensors]:
    """Parameters and batch-norm statistics on the CPU, as torch.nn.Linear and BatchNorm1d initialise them: weights and
    biases of a linear layer uniform within 1 / sqrt(inputs), batch norm the identity."""
    generator = torch.Generator().manual_seed(seed)
    params: Tensors = {}
    stats: Tensors = {}
    for i, (kind, inputs, outputs) in enumerate(layers(spec)):
        if kind == "linear":
            bound = inputs**-0.5
            params[f"{i}.weight"] = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
            params[f"{i}.bias"] = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
        elif kind == "norm":
            params[f"{i}.weight"], params[f"{i}.bias"] = torch.ones(outputs), torch.zeros(outputs)
            stats[f"{i}.running_mean"], stats[f"{i}.running_var"] = torch.zeros(outputs), torch.ones(outputs)
            stats[f"{i}.num_batches_tracked"] = torch.tensor(0)
    return params, stats


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a @ b in float32, or with bfloat16 operands; tf32 is a mode of the device, set in core/jit.py."""
    return (a.bfloat16() @ b.bfloat16()).float() if precision == "bfloat16" else a @ b


def batch_norm(z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each feature over the batch (Ioffe and Szegedy 2015; torch.nn.BatchNorm1d in training mode).

    Args:
        z: [features, batch]. weight, bias: [features].

    Returns:
        The output [features, batch]; the mean and the unbiased variance, [features].
    """
    n = z.shape[1]
    mean = z.mean(1, keepdim=True)
    centered = z - mean
    variance = (centered * centered).mean(1, keepdim=True)
    out = centered * (torch.rsqrt(variance + EPS) * weight[:, None]) + bias[:, None]
    return out, mean[:, 0], variance[:, 0] * (n / (n - 1))


def forward(
    params: Tensors, stats: Tensors, x: Tensor, spec: Spec, masks: Sequence[Tensor] = (), train: bool = False
) -> tuple[Tensor, Tensors]:
    """Logits, and the batch-norm statistics after this batch.

    Logits are unnormalised log-probabilities: softmax(logits) are the probabilities of the ten classes.

    Args:
        x: float32 [batch, 3072] (or [batch, 3, 32, 32]), normalised.
        masks: with `train`, the dropout mask of each hidden layer, float32 [width, batch]; without them nothing drops.
        train: normalise with the statistics of the batch and drop, rather than with the running statistics.

    Returns:
        float32 [batch, 10]; `stats`, updated when `train`.
    """
    h = x.flatten(1).t()  # [features, batch]
    stats, left = dict(stats), iter(masks)
    for i, (kind, _, _) in enumerate(layers(spec)):
        if kind in ("linear", "norm"):
            weight, bias = params[f"{i}.weight"], params[f"{i}.bias"]
        if kind == "linear":
            h = matmul(weight, h, spec["precision"]) + bias[:, None]
        elif kind == "norm" and train:
            h, mean, variance = batch_norm(h, weight, bias)
            for name, value in (("running_mean", mean), ("running_var", variance)):
                stats[f"{i}.{name}"] = torch.lerp(stats[f"{i}.{name}"], value, MOMENTUM)
            stats[f"{i}.num_batches_tracked"] = stats[f"{i}.num_batches_tracked"] + 1
        elif kind == "norm":
            scale = weight * torch.rsqrt(stats[f"{i}.running_var"] + EPS)
            shift = bias - stats[f"{i}.running_mean"] * scale
            h = torch.addcmul(shift[:, None], h, scale[:, None])
        elif kind in ACTIVATIONS:
            h = ACTIVATIONS[kind](h)
        elif kind == "dropout" and masks:
            h = h * next(left)
    return h.t(), stats
