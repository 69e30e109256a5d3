"""The multilayer perceptron as pure functions over dicts of tensors, named as in the equivalent torch.nn.Sequential.

It is a plain stack of layers or, with `expansion` in the spec, a stack of residual blocks; see `layers`.

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
Stack = list["tuple[str, int, int] | Stack"]  # (kind, inputs, outputs) of a layer, or the stack of a residual block

INPUTS, CLASSES = 3 * 32 * 32, 10
EPS, MOMENTUM, NEGATIVE_SLOPE = 1e-5, 0.1, 0.01  # the defaults of BatchNorm1d, LayerNorm and LeakyReLU


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


def layer_norm_init(inputs: int, outputs: int, generator: Generator) -> Tensors:
    """The identity after the normalisation, as torch.nn.LayerNorm begins."""
    return {"weight": torch.ones(outputs), "bias": torch.zeros(outputs)}


def layer_norm(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    """Normalise each example over its features (Ba, Kiros and Hinton 2016; torch.nn.LayerNorm), in training and in
    evaluation alike; h is [features, batch]."""
    centered = h - h.mean(0, keepdim=True)
    variance = (centered * centered).mean(0, keepdim=True)
    return centered * torch.rsqrt(variance + EPS) * own["weight"][:, None] + own["bias"][:, None], {}


def dropout(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    mask = next(context.masks, None)
    return h if mask is None else h * mask, {}


def plain(function: Callable[[Tensor], Tensor]) -> Layer:
    """A layer without tensors of its own."""
    return Layer(lambda *_: ({}, {}), lambda *_: {}, lambda own, h, context: (function(h), {}))


LAYERS: dict[str, Layer] = {
    "flatten": plain(lambda h: h),  # `forward` has done it: inside, there are [features, batch] alone
    "linear": Layer(lambda i, o: ({"weight": (o, i), "bias": (o,)}, {}), linear_init, linear),
    "batch_norm": Layer(
        lambda i, o: (
            {"weight": (o,), "bias": (o,)},
            {"running_mean": (o,), "running_var": (o,), "num_batches_tracked": ()},
        ),
        batch_norm_init,
        apply_batch_norm,
    ),
    "layer_norm": Layer(lambda i, o: ({"weight": (o,), "bias": (o,)}, {}), layer_norm_init, layer_norm),
    "dropout": Layer(lambda *_: ({}, {}), lambda *_: {}, dropout),
    "leaky_relu": plain(lambda h: F.leaky_relu(h, NEGATIVE_SLOPE)),
    "relu": plain(F.relu),
    "gelu": plain(F.gelu),
    "tanh": plain(torch.tanh),
}


def layers(spec: Spec) -> Stack:
    """(kind, inputs, outputs) of each layer; its place in the list is its index in the Sequential.

    With `expansion`, each width is that of an inverted bottleneck (Bachmann, Anagnostidis and Hofmann 2023, "Scaling
    MLPs: A Tale of Inductive Bias", https://arxiv.org/abs/2306.13575, and github.com/gregorbachmann/scaling_mlps):
    x + f(x), where f is the norm, a linear layer to `expansion` times the width, the activation, and a linear layer
    back. A linear layer stands before the first block and wherever the width changes. As in the paper there is no norm
    before the last layer. The paper has no dropout; here it follows the activation, as in the plain stack.
    """
    inputs, expansion = spec["whiten"] or INPUTS, spec["expansion"]
    stack: Stack = [("flatten", inputs, inputs)]
    for i, width in enumerate(spec["widths"]):
        wide = width * max(expansion, 1)
        norm: Stack = [] if spec["norm"] == "none" else [(f"{spec['norm']}_norm", width, width)]
        activation: Stack = [(spec["activation"], wide, wide)]
        if spec["dropout"] > 0:
            activation.append(("dropout", wide, wide))
        if not expansion or i == 0 or width != inputs:
            stack.append(("linear", inputs, width))
        if expansion:
            stack.append([*norm, ("linear", width, wide), *activation, ("linear", wide, width)])
        else:
            stack += [*norm, *activation]
        inputs = width
    return [*stack, ("linear", inputs, CLASSES)]


def named(stack: Stack, prefix: str = "") -> Iterator[tuple[str, str, int, int]]:
    """(name, kind, inputs, outputs) of each layer, in the order of `forward`; "2.1" is the second layer of the block at
    index 2."""
    for i, layer in enumerate(stack):
        if isinstance(layer, list):
            yield from named(layer, f"{prefix}{i}.")
        else:
            yield f"{prefix}{i}", *layer


def dropped(spec: Spec) -> list[int]:
    """The widths of what is dropped in a step, in the order of the masks that `forward` takes: one for each entry of
    `widths`, in a residual block that of its hidden layer."""
    return [outputs for _, kind, _, outputs in named(layers(spec)) if kind == "dropout"]


def shapes(spec: Spec) -> tuple[Shapes, Shapes]:
    """Name -> shape of every parameter, and of every batch-norm statistic. All are float32 but the int64 counters
    `num_batches_tracked`."""
    params: Shapes = {}
    stats: Shapes = {}
    for layer, kind, inputs, outputs in named(layers(spec)):
        for found, own in zip((params, stats), LAYERS[kind].shapes(inputs, outputs), strict=True):
            found |= {f"{layer}.{name}": shape for name, shape in own.items()}
    return params, stats


def init(spec: Spec, seed: int) -> tuple[Tensors, Tensors]:
    """Parameters and batch-norm statistics on the CPU, as torch.nn initialises them."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for layer, kind, inputs, outputs in named(layers(spec)):
        tensors |= {f"{layer}.{name}": t for name, t in LAYERS[kind].init(inputs, outputs, generator).items()}
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


def run(stack: Stack, tensors: Tensors, h: Tensor, context: Context, prefix: str = "") -> tuple[Tensor, Tensors]:
    """What a stack makes of h [inputs, batch], and the batch-norm statistics after this batch.

    Args:
        tensors: parameters and statistics.
        prefix: of the names of the layers: "2." in the block at index 2.
    """
    stats: Tensors = {}
    for i, layer in enumerate(stack):
        name = f"{prefix}{i}."
        if isinstance(layer, list):
            residual, new = run(layer, tensors, h, context, name)
            h, stats = h + residual, stats | new
        else:
            kind, inputs, outputs = layer
            own = {n: tensors[name + n] for group in LAYERS[kind].shapes(inputs, outputs) for n in group}
            h, new = LAYERS[kind].apply(own, h, context)
            stats |= {name + n: t for n, t in new.items()}
    return h, stats


def forward(
    params: Tensors, stats: Tensors, x: Tensor, spec: Spec, masks: Sequence[Tensor] = (), train: bool = False
) -> tuple[Tensor, Tensors]:
    """Logits, and the batch-norm statistics after this batch.

    Logits are unnormalised log-probabilities: softmax(logits) are the probabilities of the ten classes.

    Args:
        x: float32 [batch, 3072] (or [batch, 3, 32, 32]), normalised; with spec["whiten"], whitened.
        masks: with `train`, a dropout mask for each width of `dropped`, float32 [width, batch]; without them nothing
            drops.
        train: normalise with the statistics of the batch and drop, rather than with the running statistics.

    Returns:
        float32 [batch, 10]; `stats`, updated when `train`.
    """
    h = operand(x.flatten(1), spec["precision"]).t()  # [features, batch]
    h, new = run(layers(spec), params | stats, h, Context(spec["precision"], train, iter(masks)))
    return h.t(), stats | new
