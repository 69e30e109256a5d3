"""The data sets that a spec can name. Another one is a module with a reader, and an entry in `ENTRIES`."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from core.data import cifar10, cifar100, folder, synthetic
from core.data.archive import ROOT, Archive, Progress
from core.data.tensors import Data, DataError
from core.spec import CIFAR10, DataInfo, nearest
from core.store import local


class Dataset(NamedTuple):
    """A data set of small images.

    Attributes:
        name: The value of the key `dataset`.
        title: The name in sentences.
        info: Classes, shape of the images, mean and standard deviation.
        train, test: How many images there are; of the first, `info.held_out` of each class are for validation.
        read: The tensors, from the folder that holds the files.
        test_images: The images of the test split alone, uint8 [n, inputs], as an array. It needs no torch.
        archive: The files with their hashes and where they come from; None for data that is made.
        identity: The identity of the tensors (core.data.identity), where it is known before they are read.
        note: What a user should know of results with this data.
        compiled: Whether it pays to compile the train step: for very little data, that takes longer than the training.
    """

    name: str
    title: str
    info: DataInfo
    train: int
    test: int
    read: Callable[[Path], Data]
    test_images: Callable[[Path], Any]
    archive: Archive | None = None
    identity: str = ""
    note: str = ""
    compiled: bool = True

    def missing(self, where: Path) -> list[str]:
        """The files that are not in a folder."""
        return self.archive.missing(where) if self.archive else []


ENTRIES = (
    Dataset(
        name="cifar10",
        title="CIFAR-10",
        info=CIFAR10,
        train=50_000,
        test=10_000,
        read=cifar10.read,
        test_images=cifar10.test_images,
        archive=cifar10.ARCHIVE,
        identity=cifar10.DIRECTORY_HASH,
    ),
    Dataset(
        name="cifar100",
        title="CIFAR-100",
        info=cifar100.INFO,
        train=50_000,
        test=10_000,
        read=cifar100.read,
        test_images=cifar100.test_images,
        archive=cifar100.ARCHIVE,
    ),
    Dataset(
        name="synthetic",
        title="synthetic data",
        info=synthetic.INFO,
        train=synthetic.TRAIN,
        test=synthetic.TEST,
        read=synthetic.read,
        test_images=synthetic.test_images,
        note="The data is synthetic: patterns and noise from a seed. These results say nothing about real images.",
        compiled=False,
    ),
)
REGISTRY = {entry.name: entry for entry in ENTRIES}


def get(name: str) -> Dataset:
    """The entry of a data set. Raises DataError if there is none."""
    if name in REGISTRY:
        return REGISTRY[name]
    if name.startswith(folder.PREFIX):
        raise DataError(f"dataset {name} is a folder of images: --data-folder says where it is")
    raise DataError(f"unknown data set {name!r}{nearest(name, list(REGISTRY))}")


def worth_compiling(name: str) -> bool:
    """Whether to compile the train step for a data set; also a folder of images has a name."""
    return name not in REGISTRY or REGISTRY[name].compiled


def home(name: str, where: Path) -> Path:
    """The folder with the files of a data set: `where`, or datasets/ in place of data/, which holds CIFAR-10 alone."""
    archive = get(name).archive
    own = archive is not None and not archive.tracked and where.resolve() == (ROOT / "data").resolve()
    return ROOT / "datasets" if own else where


def load(name: str, where: str | Path, url: str | None = None, progress: Progress = lambda *_: None) -> Data:
    """Read a data set of the registry from a folder, fetching what is missing first.

    Args:
        url: Where to fetch the archive, before the addresses that are known; by default that in the environment
            variable NAME_URL, such as CIFAR10_URL.

    Raises:
        DataError: There is no such data set, or a file is missing and cannot be fetched, or is not the published one.
            No such file is unpickled.
    """
    entry, where = get(name), home(name, local(where))
    if entry.archive:
        entry.archive.fetch(where, url or os.environ.get(f"{name.upper()}_URL"), progress)
    return entry.read(where)


class Source:
    """The data sets of one call of the program. Each is read once, when it is first needed.

    Attributes:
        folder, url: The folder of the published files, and where to fetch them.
        own, test_share: A folder of your own images, if there is one; see core.data.folder.load.
        fetching: Makes a context manager around the fetching, which returns a function to call with the progress.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        own: Path | None = None,
        test_share: float | None = None,
        fetching: Callable[[], AbstractContextManager[Progress]] = lambda: nullcontext(lambda *_: None),
    ) -> None:
        if test_share is not None and own is None:
            raise DataError("--test-share is for a folder of images, which --data-folder names")
        self.folder, self.url, self.own, self.test_share, self.fetching = folder, url, own, test_share, fetching
        self._read: dict[str, Data] = {}

    @functools.cached_property
    def own_name(self) -> str | None:
        """The name of the folder of your own images. To know it, the images are read."""
        if self.own is None:
            return None
        data = folder.load(self.own, self.test_share)
        self._read[name := folder.name_of(data)] = data
        return name

    def load(self, name: str) -> Data:
        """A data set in memory. Raises DataError if it cannot be read."""
        if name.startswith(folder.PREFIX) and self.own_name not in (None, name):
            raise DataError(f"dataset {name} is another folder of images than {self.own}, which is {self.own_name}")
        if name not in self._read:
            with self.fetching() as progress:
                self._read[name] = load(name, self.folder, self.url, progress)
        return self._read[name]

    def identity(self, name: str, fetch: bool = False) -> str | None:
        """The identity of the data in records (core.data.identity).

        Args:
            fetch: fetch data that is not on this disk. Without it, the identity of such data may be None: not known.
        """
        if entry := REGISTRY.get(name):
            if entry.identity:
                return entry.identity
            if not fetch and entry.missing(home(name, self.folder)):
                return None
        from core.data.identity import data_identity

        return data_identity(self.load(name))


def check(data: Data, name: str) -> None:
    """Refuse data that is not of the data set that a spec names.

    Tensors with the classes and the format of a published data set may have other content: the record names what they
    are (core.data.identity).

    Raises:
        DataError: It is another data set.
    """
    if name.startswith(folder.PREFIX):
        if (other := folder.name_of(data)) != name:
            raise DataError(f"the spec asks for the data set {name}, and the images are those of {other}")
    elif data.info != get(name).info:
        raise DataError(f"the spec asks for {get(name).title}, and the data has other classes or another format")
