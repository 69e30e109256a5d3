"""Local layers: each unit has a centre in the image, and the weights of what is far from it are small.

A fully connected network does not know that neighbouring pixels belong together. A local layer tells it: its weight
matrix is `envelope * v`, where `v` is trained and the envelope is fixed, exp(-d^2 / (2 sigma^2)). d is the distance, in
pixels, between the centre of the unit and its input: a pixel, or a unit of the layer in front. No weight is zero and no
weight is shared. After training, the product is an ordinary weight matrix.
"""

import torch
from torch import Tensor

from core.functional import model, prng
from core.functional.model import Tensors
from core.spec import CIFAR10, DataInfo, Spec

FLOOR = 2.0**-10  # the smallest value of an envelope: no weight is zero, and no product is subnormal


def envelopes(spec: Spec, info: DataInfo = CIFAR10) -> Tensors:
    """The envelope of the weight matrix of each local layer, a function of the resolved spec and its seed.

    Returns:
        {"1.weight": bfloat16 [outputs, inputs], ...}, values from FLOOR to 1; empty without local layers.
    """
    names = [name for name, layer in model.iter_layers(model.layers(spec, info)) if layer.kind == "linear"]
    channels, height, width = info.shape
    rows, columns = (torch.arange(size, dtype=torch.float32) for size in (height, width))
    inputs = torch.cartesian_prod(rows, columns).repeat(channels, 1)  # a pixel is at one place in all channels
    found = {}
    for i, sigma in enumerate(spec["locality"]):
        centres = _centres(spec["seed"], i, spec["widths"][i], info)
        squares = (centres[:, None, 0] - inputs[:, 0]).square() + (centres[:, None, 1] - inputs[:, 1]).square()
        # In bfloat16 it costs the step less time to read it than to compute it.
        found[f"{names[i]}.weight"] = torch.exp(squares / (-2 * sigma * sigma)).clamp(min=FLOOR).bfloat16()
        inputs = centres
    return found


def _centres(seed: int, layer: int, units: int, info: DataInfo) -> Tensor:
    """The centres of the units of a layer, uniform over the image: float32 [units, 2], row and column in pixels."""
    draws = prng.bits(
        torch.tensor(seed, dtype=torch.int32), prng.CENTRES, torch.tensor(layer, dtype=torch.int32), 2 * units
    )
    uniform = (draws.float() * 2.0**-32 + 0.5).view(units, 2)
    return uniform * torch.tensor(info.shape[1:], dtype=torch.float32) - 0.5


def rescaled(params: Tensors, envelope: Tensors) -> Tensors:
    """The initial `v` of local layers: the initial weights of a dense layer, with each unit multiplied by
    sqrt(inputs / sum of its squared envelope). So its activations start on the scale of a dense layer's."""
    scales = {name: (g.shape[1] / g.double().square().sum(1, keepdim=True)).sqrt() for name, g in envelope.items()}
    return {name: p * scales[name].to(p.dtype) if name in scales else p for name, p in params.items()}
