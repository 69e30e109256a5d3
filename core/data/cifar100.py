"""CIFAR-100 (Krizhevsky 2009) with its 100 fine labels. The code was tried on small files in the official layout, and
not on the official files."""

from pathlib import Path
from typing import Any

from core.data.archive import Archive
from core.data.tensors import Data, DataError
from core.spec import DataInfo

# The md5 that torchvision.datasets.CIFAR100 publishes, and the size of the archive in bytes.
ARCHIVE = Archive(
    title="CIFAR-100",
    folder="cifar-100-python",
    files={
        "train": ("16019d7e3df5f24257cddd939b257f8d", None),
        "test": ("f0ef6b0ae62326f3e7ffdfab6717acfc", None),
        "meta": ("7973b15100ade9c7d40fb424638fde48", None),
    },
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    size=169001437,
    addresses=("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
)
CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""
INFO = DataInfo(
    classes=tuple(CLASSES.split()), mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762), held_out=50
)


def read(folder: Path) -> Data:
    """Read the three files into tensors; each is hashed and unpickled from the same bytes in memory."""
    import torch

    names = [name.decode() for name in ARCHIVE.read(folder, "meta")[b"fine_label_names"]]
    if names != list(INFO.classes):
        raise DataError(f"{folder / ARCHIVE.folder / 'meta'} names other classes than those of CIFAR-100")
    tensors = []
    for split in ("train", "test"):
        batch = ARCHIVE.read(folder, split)
        tensors += [torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"fine_labels"], device="cpu")]
    return Data._make([*tensors, INFO])


def test_images(folder: Path) -> Any:
    return ARCHIVE.read(folder, "test")[b"data"]
