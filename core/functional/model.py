"""The multilayer perceptron as pure functions over dicts of tensors, named as in the equivalent torch.nn.Sequential.

Inside, activations are feature-major, [features, batch]: the matrix products run faster that way at small batches, and
batch norm reduces along the contiguous axis. Callers see [batch, features].
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from core.spec import Spec

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

INPUTS, CLASSES = 3 * 32 * 32, 10
EPS, MOMENTUM, NEGATIVE_SLOPE = 1e-5, 0.1, 0.01  # the defaults of BatchNorm1d and LeakyReLU


class Context(NamedTuple):
    """What a layer may need besides its own tensors and its input.

    Attributes:
        precision: of the matrix products, as in the spec.
        train: whether this is training or evaluation.
        masks: the dropout masks that the layers ahead have not used yet.
    """

    precision: str
    train: bool
    masks: Iterator[Tensor]


class Layer(NamedTuple):
    """A kind of layer. Names of tensors are local: "weight", not "1.weight".

    Attributes:
        shapes: (inputs, outputs) -> shapes of the parameters, and of the statistics.
        init: (inputs, outputs, generator) -> parameters and statistics in one dict.
        apply: (its tensors, h [inputs, batch], context) -> h [outputs, batch], and its statistics after this batch.
    """

    shapes: Callable[[int, int], tuple[Shapes, Shapes]]
    init: Callable[[int, int, Generator], Tensors]
    apply: Callable[[Tensors, Tensor, Context], tuple[Tensor, Tensors]]


def operand(t: Tensor, precision: str) -> Tensor:
    """A tensor as the matrix products read it; tf32 is a mode of the device, set in core/compile/fused.py."""
    return t.bfloat16() if precision == "bfloat16" else t


def copies(params: Tensors, spec: Spec) -> Tensors:
    """The weight matrices as the products read them, where that is not as they are trained: in bfloat16."""
    precision = spec["precision"]
    return {name: operand(p, precision) for name, p in params.items() if p.ndim == 2 and precision == "bfloat16"}


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a @ b of operands in the precision, float32."""
    return (operand(a, precision) @ operand(b, precision)).to(torch.float32 if precision == "bfloat16" else a.dtype)


def linear_init(inputs: int, outputs: int, generator: Generator) -> Tensors:
    """Weights and biases uniform within 1 / sqrt(inputs), as torch.nn.Linear initialises them."""
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    return {"weight": weight, "bias": torch.empty(outputs).uniform_(-bound, bound, generator=generator)}


def linear(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    return matmul(own["weight"], h, context.precision) + own["bias"][:, None], {}


def batch_norm_init(inputs: int, outputs: int, generator: Generator) -> Tensors:
    """The identity, as torch.nn.BatchNorm1d begins."""
    return {
        "weight": torch.ones(outputs),
        "bias": torch.zeros(outputs),
        "running_mean": torch.zeros(outputs),
        "running_var": torch.ones(outputs),
        "num_batches_tracked": torch.tensor(0),
    }


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


def apply_batch_norm(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    """With the statistics of the batch in training, with the running statistics in evaluation."""
    if context.train:
        h, mean, variance = batch_norm(h, own["weight"], own["bias"])
        return h, {
            "running_mean": torch.lerp(own["running_mean"], mean, MOMENTUM),
            "running_var": torch.lerp(own["running_var"], variance, MOMENTUM),
            "num_batches_tracked": own["num_batches_tracked"] + 1,
        }
    scale = own["weight"] * torch.rsqrt(own["running_var"] + EPS)
    shift = own["bias"] - own["running_mean"] * scale
    return torch.addcmul(shift[:, None], h, scale[:, None]), {}


def dropout(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    mask = next(context.masks, None)
    return h if mask is None else h * mask, {}


def plain(function: Callable[[Tensor], Tensor]) -> Layer:
    """A layer without tensors of its own."""
    return Layer(lambda *_: ({}, {}), lambda *_: {}, lambda own, h, context: (function(h), {}))


LAYERS: dict[str, Layer] = {
    "flatten": plain(lambda h: h),  # `forward` has done it: inside, there are [features, batch] alone
    "linear": Layer(lambda i, o: ({"weight": (o, i), "bias": (o,)}, {}), linear_init, linear),
    "norm": Layer(
        lambda i, o: (
            {"weight": (o,), "bias": (o,)},
            {"running_mean": (o,), "running_var": (o,), "num_batches_tracked": ()},
        ),
        batch_norm_init,
        apply_batch_norm,
    ),
    "dropout": Layer(lambda *_: ({}, {}), lambda *_: {}, dropout),
    "leaky_relu": plain(lambda h: F.leaky_relu(h, NEGATIVE_SLOPE)),
    "relu": plain(F.relu),
    "gelu": plain(F.gelu),
    "tanh": plain(torch.tanh),
}


def layers(spec: Spec) -> list[tuple[str, int, int]]:
    """(kind, inputs, outputs) of each layer; its place in the list is its index in the Sequential."""
    inputs = spec["whiten"] or INPUTS
    stack = [("flatten", inputs, inputs)]
    for width in spec["widths"]:
        stack.append(("linear", inputs, width))
        if spec["norm"] == "batch":
            stack.append(("norm", width, width))
        stack.append((spec["activation"], width, width))
        if spec["dropout"] > 0:
            stack.append(("dropout", width, width))
        inputs = width
    return [*stack, ("linear", inputs, CLASSES)]


def shapes(spec: Spec) -> tuple[Shapes, Shapes]:
    """Name -> shape of every parameter, and of every batch-norm statistic. All are float32 but the int64 counters
    `num_batches_tracked`."""
    params: Shapes = {}
    stats: Shapes = {}
    for i, (kind, inputs, outputs) in enumerate(layers(spec)):
        for found, own in zip((params, stats), LAYERS[kind].shapes(inputs, outputs), strict=True):
            found |= {f"{i}.{name}": shape for name, shape in own.items()}
    return params, stats


def init(spec: Spec, seed: int) -> tuple[Tensors, Tensors]:
    """Parameters and batch-norm statistics on the CPU, as torch.nn initialises them."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for i, (kind, inputs, outputs) in enumerate(layers(spec)):
        tensors |= {f"{i}.{name}": t for name, t in LAYERS[kind].init(inputs, outputs, generator).items()}
    params, stats = ({name: tensors[name] for name in names} for names in shapes(spec))
    return params, stats


def fold(params: Tensors, whitening: Tensors) -> Tensors:
    """The parameters of the network that takes normalised images, from those of one that takes what a whitening, as
    core.functional.augment.whiten has it, makes of them: two linear maps in a row are one."""
    weight = params["1.weight"]
    projection, offset = (whitening[name].to(weight.dtype) for name in ("weight", "bias"))
    return {**params, "1.weight": weight @ projection, "1.bias": params["1.bias"] + weight @ offset}


def folded(spec: Spec) -> Spec:
    """The spec of that network."""
    return {**spec, "whiten": 0}


def forward(
    params: Tensors, stats: Tensors, x: Tensor, spec: Spec, masks: Sequence[Tensor] = (), train: bool = False
) -> tuple[Tensor, Tensors]:
    """Logits, and the batch-norm statistics after this batch.

    Logits are unnormalised log-probabilities: softmax(logits) are the probabilities of the ten classes.

    Args:
        x: float32 [batch, 3072] (or [batch, 3, 32, 32]), normalised; with spec["whiten"], whitened.
        masks: with `train`, the dropout mask of each hidden layer, float32 [width, batch]; without them nothing drops.
        train: normalise with the statistics of the batch and drop, rather than with the running statistics.

    Returns:
        float32 [batch, 10]; `stats`, updated when `train`.
    """
    h = operand(x.flatten(1), spec["precision"]).t()  # [features, batch]
    stats, context = dict(stats), Context(spec["precision"], train, iter(masks))
    for i, (kind, inputs, outputs) in enumerate(layers(spec)):
        layer = LAYERS[kind]
        own_params, own_stats = layer.shapes(inputs, outputs)
        own = {name: params[f"{i}.{name}"] for name in own_params} | {n: stats[f"{i}.{n}"] for n in own_stats}
        h, new = layer.apply(own, h, context)
        stats |= {f"{i}.{name}": t for name, t in new.items()}
    return h.t(), stats
