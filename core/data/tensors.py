"""A data set in memory."""

from typing import TYPE_CHECKING, NamedTuple

from core.errors import UserError

if TYPE_CHECKING:  # torch takes two seconds to import
    from torch import Tensor


class DataError(UserError):
    """The data is missing and cannot be fetched, or is not what it should be; the message says what to do."""


class Data(NamedTuple):
    """Images as uint8 [n, 3072], a row the red, green and blue planes of 32x32; labels as int64 [n]."""

    train_images: "Tensor"
    train_labels: "Tensor"
    test_images: "Tensor"
    test_labels: "Tensor"
