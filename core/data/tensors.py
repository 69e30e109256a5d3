"""A data set in memory."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from core.errors import UserError
from core.spec import CIFAR10, DataInfo

if TYPE_CHECKING:  # torch takes two seconds to import
    import torch
    from torch import Tensor


class DataError(UserError):
    """The data is missing and cannot be fetched, or is not what it should be; the message says what to do."""


class Data(NamedTuple):
    """The images and labels of a data set.

    Attributes:
        train_images, test_images: uint8 [n, inputs]. A row has the planes of an image: red, green and blue.
        train_labels, test_labels: int64 [n].
    """

    train_images: "Tensor"
    train_labels: "Tensor"
    test_images: "Tensor"
    test_labels: "Tensor"
    info: DataInfo = CIFAR10

    def map(self, function: "Callable[[Tensor], Tensor]") -> "Data":
        """The same data set with a function of each tensor."""
        return Data._make([*map(function, self.tensors.values()), self.info])

    def to(self, device: "torch.device") -> "Data":
        """The same data set on a device, each tensor in one piece of memory."""
        return self.map(lambda t: t.to(device).contiguous())

    @property
    def tensors(self) -> "dict[str, Tensor]":
        """The four tensors by their names."""
        return {name: getattr(self, name) for name in self._fields if name != "info"}
