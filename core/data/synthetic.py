"""A small data set that is made from a seed, so that everything can be tried without data or network."""

from pathlib import Path
from typing import Any

from core.data.tensors import Data
from core.spec import DataInfo

TRAIN, TEST = 2_000, 500  # images
PATTERNS = 3  # of each class
INFO = DataInfo(
    classes=tuple(f"pattern-{i}" for i in range(10)), mean=(0.5, 0.5, 0.5), std=(0.23, 0.23, 0.23), held_out=20
)


def make() -> tuple[Any, Any]:
    """All images, uint8 [n, 3072], and labels, int64 [n]. An image is a weak pattern of its class under strong noise.

    The bits of RandomState are the same in all versions of NumPy.
    """
    import numpy as np

    random, n = np.random.RandomState(0), TRAIN + TEST
    labels = np.arange(n) % len(INFO.classes)
    coarse = random.randint(-17, 18, (len(INFO.classes), PATTERNS, 3, 4, 4))
    patterns = coarse.repeat(8, 3).repeat(8, 4).reshape(*coarse.shape[:2], INFO.inputs)
    noise = random.randint(-100, 101, (n, INFO.inputs))
    images = 128 + patterns[labels, random.randint(0, PATTERNS, n)] + noise
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def read(folder: Path) -> Data:
    import torch

    images, labels = map(torch.from_numpy, make())
    return Data(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:], INFO)


def test_images(folder: Path) -> Any:
    return make()[0][TRAIN:]
