"""A folder of your own images as a data set: train/CLASS/* and test/CLASS/*, or CLASS/* alone."""

import hashlib
from pathlib import Path

from core.data.tensors import Data, DataError
from core.spec import DataInfo, canonical

PREFIX = "folder-"
LISTED = 10  # bad images in a message


def name_of(data: Data) -> str:
    """The value of the key `dataset`: it stands for the pixels, the labels, the names of the classes and the split."""
    from core.data.identity import data_identity

    content = canonical([data_identity(data), data.info.classes])
    return PREFIX + hashlib.sha256(content.encode()).hexdigest()[:12]


def load(folder: Path, test_share: float | None = None) -> Data:
    """Read all images of a folder, scaled to 32x32 as core.images.read does it.

    Args:
        test_share: Where `folder` has one set of classes: how much of each class is for testing. The images are drawn
            by a fixed seed, so the same files give the same split.

    Raises:
        DataError: The folder has another layout, or an image cannot be read.
    """
    import torch

    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}, expected one with images")
    splits = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    if len(splits) == 1:
        raise DataError(
            f"{folder} has the folder {next(iter(splits))} alone, expected train and test, or CLASS/* alone"
        )
    if splits and test_share is not None:
        raise DataError(f"{folder} has the folders train and test: --test-share is for a folder with CLASS/* alone")
    if not splits and test_share is None:
        raise DataError(
            f"{folder} has no folders train and test; with one folder for each class, --test-share 0.2 takes a fifth "
            "of each class for testing"
        )
    if test_share is not None and not 0 < test_share < 1:
        raise DataError(f"--test-share {test_share:g}, expected a number above 0 and below 1")
    files = {split: _files(path) for split, path in (splits or {"train": folder}).items()}
    classes = sorted(files["train"])
    if splits and classes != sorted(files["test"]):
        different = sorted(set(classes) ^ set(files["test"]))
        raise DataError(f"the class {different[0]} is in one of {splits['train']} and {splits['test']} alone")
    if not splits and test_share is not None:
        files = _drawn(files["train"], test_share)
    tensors: list[torch.Tensor] = []
    for split in ("train", "test"):
        pixels, labels = _read(files[split], classes, folder)
        tensors += [pixels, labels]
    counts = tensors[1].bincount(minlength=len(classes)).tolist()
    mean, std = _moments(tensors[0])
    try:
        info = DataInfo(tuple(classes), (3, 32, 32), mean, std, held_out=max(1, min(counts) // 10))
    except ValueError as error:
        raise DataError(f"{folder} cannot be a data set: {error}") from None
    return Data._make([*tensors, info])


def _files(folder: Path) -> dict[str, list[Path]]:
    """The files of each class, sorted."""
    try:
        classes = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
        files = {
            name: sorted(path for path in classes[name].iterdir() if not path.name.startswith("."))
            for name in sorted(classes)
        }
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    if not files:
        raise DataError(f"{folder} has no folders, expected one for each class")
    if empty := next((name for name, paths in files.items() if not paths), None):
        raise DataError(f"there are no images in {folder / empty}")
    return files


def _drawn(files: dict[str, list[Path]], test_share: float) -> dict[str, dict[str, list[Path]]]:
    """The files of each class in two splits, of which each has at least one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    splits: dict[str, dict[str, list[Path]]] = {"train": {}, "test": {}}
    for name, paths in files.items():
        if len(paths) < 2:
            raise DataError(f"the class {name} has one image, expected one to train on and one to test with")
        count = min(max(1, round(test_share * len(paths))), len(paths) - 1)
        chosen = set(torch.randperm(len(paths), generator=generator)[:count].tolist())
        splits["test"][name] = [path for i, path in enumerate(paths) if i in chosen]
        splits["train"][name] = [path for i, path in enumerate(paths) if i not in chosen]
    return splits


def _read(files: dict[str, list[Path]], classes: list[str], folder: Path):
    """Images, uint8 [n, 3072], and labels, int64 [n], of one split."""
    import torch

    from core import images

    pixels, labels, bad = [], [], []
    for label, name in enumerate(classes):
        for path in files[name]:
            try:
                pixels.append(images.read(path).flatten())
                labels.append(label)
            except images.ImageError as error:
                bad.append(f"  {error}")
    if bad:
        more = [f"  and {len(bad) - LISTED:,} more"] if len(bad) > LISTED else []
        raise DataError(f"{len(bad):,} files in {folder} are no images, and nothing is trained:", *bad[:LISTED], *more)
    return torch.stack(pixels), torch.tensor(labels)


def _moments(pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in 0..1, from exact sums."""
    channels = pixels.view(len(pixels), 3, -1).long()
    n = channels[:, 0].numel()
    sums, squares = channels.sum((0, 2)).tolist(), (channels**2).sum((0, 2)).tolist()
    means = [total / n for total in sums]
    # Images of one colour have no deviation.
    stds = [max(1, square / n - mean**2) ** 0.5 for square, mean in zip(squares, means, strict=True)]
    return tuple(round(mean / 255, 4) for mean in means), tuple(round(std / 255, 4) for std in stds)
