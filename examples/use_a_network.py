"""Use an exported network in a program of your own. Nothing of this project is imported; .pt2 needs only PyTorch.

uv run main.py export lr-1e-3 --format torch --output network.pt2
uv run python examples/use_a_network.py network.pt2 photo.png     or network.onnx, with onnxruntime
"""

import json
import sys

import numpy as np
from PIL import Image, ImageOps


def load(path: str):
    """The network as a function of images, uint8 [n, channels, height, width] to logits [n, classes]; and its classes.

    The normalisation of the images is part of the network.
    """
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
        return lambda images: session.run(None, {"images": images})[0], classes

    import torch

    files = {"classes.json": ""}  # torch.export.load fills it
    model = torch.export.load(path, extra_files=files).module()
    return lambda images: model(torch.from_numpy(images)).numpy(), json.loads(files["classes.json"])


def read(path: str) -> np.ndarray:
    """A photo as `predict` of this project reads it: upright, its central square, as uint8 [3, 32, 32]."""
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = min(photo.size)
    left, top = ((length - side) // 2 for length in photo.size)
    square = photo.crop((left, top, left + side, top + side))
    return np.array(square.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)  # the red plane first


if __name__ == "__main__":
    network, classes = load(sys.argv[1])
    logits = network(read(sys.argv[2])[None])[0]
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    for i in probabilities.argsort()[:-4:-1]:
        print(f"{classes[i]} {probabilities[i]:.1%}")
