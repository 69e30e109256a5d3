"""The multilayer perceptron as pure functions over dicts of tensors, named as in the equivalent torch.nn.Sequential.

The network is a plain stack of layers or, with `expansion` in the spec, a stack of residual blocks; see `layers`.

Inside, activations are feature-major, [features, batch]: the matrix products are faster that way at small batches, and
batch norm reduces along the contiguous axis. Callers see [batch, features].
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from core.spec import CIFAR10, DataInfo, Spec

Tensors = dict[str, Tensor]

EPS, MOMENTUM, NEGATIVE_SLOPE = 1e-5, 0.1, 0.01  # the defaults of BatchNorm1d, LayerNorm and LeakyReLU


class Entry(NamedTuple):
    """A layer of a network: its kind, a key of LAYERS, and the numbers of its inputs and outputs."""

    kind: str
    inputs: int
    outputs: int


Stack = tuple["Entry | Stack", ...]  # layers in order; a stack inside a stack is a residual block


class Context(NamedTuple):
    """The inputs of a layer besides its own tensors and its activations.

    Attributes:
        precision: of the matrix products, as in the spec.
        train: training mode (True) or evaluation mode.
        masks: the dropout masks that no layer has used yet.
    """

    precision: str
    train: bool
    masks: Iterator[Tensor]


class Layer(NamedTuple):
    """A kind of layer. Tensor names are local: "weight", not "1.weight".

    Attributes:
        init: (inputs, outputs, generator) -> the layer's tensors.
        apply: (the layer's tensors, h [inputs, batch], context) -> h [outputs, batch], and the new statistics.
        module: (inputs, outputs, spec) -> the same layer in torch.nn.
        statistics: names of the tensors that are updated by `apply`, not trained.
    """

    init: Callable[[int, int, Generator], Tensors]
    apply: Callable[[Tensors, Tensor, Context], tuple[Tensor, Tensors]]
    module: Callable[[int, int, Spec], nn.Module]
    statistics: tuple[str, ...] = ()


def cast(t: Tensor, precision: str) -> Tensor:
    """A tensor in the dtype that the matrix products read. tf32 is a mode of the device (core/compile/fused.py)."""
    return t.bfloat16() if precision == "bfloat16" else t


def enveloped(tensors: Tensors, envelope: Mapping[str, Tensor]) -> Tensors:
    """The tensors, those of local layers times their envelope (core.functional.locality): from trained weights to
    those of the network, and from the gradient of these back to that of the trained ones."""
    return {name: t * envelope[name].to(t.dtype) if name in envelope else t for name, t in tensors.items()}


def effective(params: Tensors, spec: Spec, envelope: Mapping[str, Tensor] = {}) -> Tensors:
    """The weight matrices that the products read instead of the trained ones: copies in bfloat16, and those of local
    layers times their `envelope`."""
    precision = spec["precision"]
    read = {name: p for name, p in params.items() if p.ndim == 2 and (precision == "bfloat16" or name in envelope)}
    return {name: cast(t, precision) for name, t in enveloped(read, envelope).items()}


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a @ b with operands in the given precision; the result of bfloat16 operands is float32."""
    return (cast(a, precision) @ cast(b, precision)).to(torch.float32 if precision == "bfloat16" else a.dtype)


def no_tensors(inputs: int, outputs: int, generator: Generator) -> Tensors:
    return {}


def linear_init(inputs: int, outputs: int, generator: Generator) -> Tensors:
    """Weights and biases uniform within 1 / sqrt(inputs), as torch.nn.Linear initialises them."""
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    return {"weight": weight, "bias": torch.empty(outputs).uniform_(-bound, bound, generator=generator)}


def linear(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    return matmul(own["weight"], h, context.precision) + own["bias"][:, None], {}


def batch_norm_init(inputs: int, outputs: int, generator: Generator) -> Tensors:
    """The identity, as torch.nn.BatchNorm1d starts."""
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
        The output [features, batch]; mean and unbiased variance of the batch, [features].
    """
    n = z.shape[1]
    mean = z.mean(1, keepdim=True)
    centered = z - mean
    variance = (centered * centered).mean(1, keepdim=True)
    out = centered * (torch.rsqrt(variance + EPS) * weight[:, None]) + bias[:, None]
    return out, mean[:, 0], variance[:, 0] * (n / (n - 1))


def apply_batch_norm(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    """Batch norm with the statistics of the batch in training, with the running statistics in evaluation."""
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
    """No change after the normalisation, as torch.nn.LayerNorm starts."""
    return {"weight": torch.ones(outputs), "bias": torch.zeros(outputs)}


def layer_norm(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    """Normalise each example over its features (Ba, Kiros and Hinton 2016; torch.nn.LayerNorm), in training and in
    evaluation; h is [features, batch]."""
    centered = h - h.mean(0, keepdim=True)
    variance = (centered * centered).mean(0, keepdim=True)
    return centered * torch.rsqrt(variance + EPS) * own["weight"][:, None] + own["bias"][:, None], {}


def dropout(own: Tensors, h: Tensor, context: Context) -> tuple[Tensor, Tensors]:
    """The next mask times h in training; h in evaluation."""
    if not context.train:
        return h, {}
    mask = next(context.masks, None)
    if mask is None:
        raise ValueError("there are fewer dropout masks than dropout layers")
    return h * mask, {}


def plain(function: Callable[[Tensor], Tensor], module: Callable[[], nn.Module]) -> Layer:
    """A layer without tensors."""
    return Layer(no_tensors, lambda own, h, context: (function(h), {}), lambda inputs, outputs, spec: module())


LAYERS: dict[str, Layer] = {
    "flatten": plain(lambda h: h, nn.Flatten),  # `forward` flattens: inside, every h is [features, batch]
    "linear": Layer(linear_init, linear, lambda inputs, outputs, spec: nn.Linear(inputs, outputs)),
    "batch_norm": Layer(
        batch_norm_init,
        apply_batch_norm,
        lambda inputs, outputs, spec: nn.BatchNorm1d(outputs),
        statistics=("running_mean", "running_var", "num_batches_tracked"),
    ),
    "layer_norm": Layer(layer_norm_init, layer_norm, lambda inputs, outputs, spec: nn.LayerNorm(outputs)),
    "dropout": Layer(no_tensors, dropout, lambda inputs, outputs, spec: nn.Dropout(spec["dropout"])),
    "leaky_relu": plain(lambda h: F.leaky_relu(h, NEGATIVE_SLOPE), nn.LeakyReLU),
    "relu": plain(F.relu, nn.ReLU),
    "gelu": plain(F.gelu, nn.GELU),
    "tanh": plain(torch.tanh, nn.Tanh),
}


def layers(spec: Spec, info: DataInfo = CIFAR10) -> Stack:
    """The layers of a network; the index of a layer in the tuple is its index in the Sequential.

    With `expansion`, each width is that of an inverted bottleneck (Bachmann, Anagnostidis and Hofmann 2023, "Scaling
    MLPs: A Tale of Inductive Bias", https://arxiv.org/abs/2306.13575, and github.com/gregorbachmann/scaling_mlps):
    x + f(x), where f is the norm, a linear layer to `expansion` times the width, the activation, and a linear layer
    back. A linear layer stands before the first block and wherever the width changes. As in the paper there is no norm
    before the last layer. The paper has no dropout; here it follows the activation, as in the plain stack.
    """
    inputs, expansion = info.inputs, spec["expansion"]
    if spec["whiten"] and not spec["locality"]:  # local layers need pixels, so their whitening goes back to them
        inputs = spec["whiten"]
    activation: Stack
    stack: list[Entry | Stack] = [Entry("flatten", inputs, inputs)]
    for i, width in enumerate(spec["widths"]):
        wide = width * max(expansion, 1)
        norm = () if spec["norm"] == "none" else (Entry(f"{spec['norm']}_norm", width, width),)
        activation = (Entry(spec["activation"], wide, wide),)
        if spec["dropout"] > 0:
            activation += (Entry("dropout", wide, wide),)
        if not expansion or i == 0 or width != inputs:
            stack.append(Entry("linear", inputs, width))
        if expansion:
            stack.append((*norm, Entry("linear", width, wide), *activation, Entry("linear", wide, width)))
        else:
            stack += [*norm, *activation]
        inputs = width
    return (*stack, Entry("linear", inputs, len(info.classes)))


def iter_layers(stack: Stack, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """(name, layer) in the order of `forward`; "2.1" is the second layer of the block at index 2."""
    for i, layer in enumerate(stack):
        if isinstance(layer, Entry):
            yield f"{prefix}{i}", layer
        else:
            yield from iter_layers(layer, f"{prefix}{i}.")


def dropout_widths(spec: Spec) -> list[int]:
    """The number of features of each dropout mask, in the order in which `forward` takes the masks."""
    return [layer.outputs for _, layer in iter_layers(layers(spec)) if layer.kind == "dropout"]


def init(spec: Spec, seed: int, info: DataInfo = CIFAR10) -> tuple[Tensors, Tensors]:
    """Parameters and batch-norm statistics on the CPU, initialised as torch.nn does."""
    return _init(layers(spec, info), torch.Generator().manual_seed(seed))


def _init(stack: Stack, generator: Generator) -> tuple[Tensors, Tensors]:
    params: Tensors = {}
    stats: Tensors = {}
    for name, (kind, inputs, outputs) in iter_layers(stack):
        for local, t in LAYERS[kind].init(inputs, outputs, generator).items():
            (stats if local in LAYERS[kind].statistics else params)[f"{name}.{local}"] = t
    return params, stats


def template(spec: Spec, info: DataInfo = CIFAR10) -> tuple[Tensors, Tensors]:
    """What `init` returns, on the meta device: names, shapes and dtypes without data."""
    return _template(layers(spec, info), torch.get_default_dtype())


@functools.lru_cache(maxsize=4096)  # a sweep asks for the same few shapes thousands of times
def _template(stack: Stack, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """`dtype`: torch's default, which `_init` heeds."""
    with torch.device("meta"):
        return _init(stack, torch.Generator())


def parameter_count(spec: Spec, info: DataInfo = CIFAR10) -> int:
    """The number of parameters that are trained."""
    return sum(p.numel() for p in template(spec, info)[0].values())


def fold(params: Tensors, whitening: Tensors) -> Tensors:
    """The parameters of the network that takes normalised images, from those of a network that takes whitened images
    (core.functional.augment.whiten): two linear maps in a row are one linear map."""
    weight = params["1.weight"]
    projection, offset = (whitening[name].to(weight.dtype) for name in ("weight", "bias"))
    if "back" in whitening:
        weight = weight @ whitening["back"].to(weight.dtype)
    return {**params, "1.weight": weight @ projection, "1.bias": params["1.bias"] + weight @ offset}


def folded(spec: Spec) -> Spec:
    """The spec of the network that is evaluated and saved: whitening and envelopes are part of its weights."""
    return {**spec, "whiten": 0, "locality": []}


def run(stack: Stack, tensors: Tensors, h: Tensor, context: Context, prefix: str = "") -> tuple[Tensor, Tensors]:
    """Apply a stack of layers to h [inputs, batch].

    Args:
        tensors: parameters and statistics.
        prefix: of the names of the layers: "2." in the block at index 2.

    Returns:
        h [outputs, batch], and the batch-norm statistics after this batch.
    """
    stats: Tensors = {}
    for i, layer in enumerate(stack):
        name = f"{prefix}{i}."
        if isinstance(layer, Entry):
            own = {full.removeprefix(name): t for full, t in tensors.items() if full.startswith(name)}
            h, new = LAYERS[layer.kind].apply(own, h, context)
            stats |= {name + local: t for local, t in new.items()}
        else:
            residual, new = run(layer, tensors, h, context, name)
            h, stats = h + residual, stats | new
    return h, stats


def forward(
    params: Tensors, stats: Tensors, x: Tensor, spec: Spec, masks: Sequence[Tensor] = (), train: bool = False
) -> tuple[Tensor, Tensors]:
    """Logits, and the batch-norm statistics after this batch.

    Logits are unnormalised log-probabilities: softmax(logits) are the probabilities of the classes.

    Args:
        x: float32 [batch, inputs] (or [batch, *shape]), normalised; with spec["whiten"], whitened.
        masks: with `train`, a dropout mask for each width of `dropout_widths`, float32 [width, batch].
        train: normalise with the statistics of the batch and apply dropout, rather than use the running statistics.

    Returns:
        float32 [batch, classes]; `stats`, updated when `train`.

    Raises:
        ValueError: In training, the number of masks is not the number of dropout layers.
    """
    h = cast(x.flatten(1), spec["precision"]).t()  # [features, batch]
    unused = iter(masks)
    h, new = run(layers(spec), params | stats, h, Context(spec["precision"], train, unused))
    if train and next(unused, None) is not None:
        raise ValueError("there are more dropout masks than dropout layers")
    return h.t(), stats | new
