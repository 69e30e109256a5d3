"""Use an exported network in a program of your own. Nothing of this project is imported; .pt2 needs only PyTorch.

uv run main.py export lr-1e-3 --format torch --output network.pt2
uv run python examples/use_a_network.py network.pt2 photo.png     or network.onnx, with onnxruntime
"""

import json
import sys

import numpy as np
from PIL import Image


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


if __name__ == "__main__":
    network, classes = load(sys.argv[1])
    pixels = np.array(Image.open(sys.argv[2]).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS))
    logits = network(pixels.transpose(2, 0, 1)[None])[0]  # the red plane first
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    for i in probabilities.argsort()[:-4:-1]:
        print(f"{classes[i]} {probabilities[i]:.1%}")
