"""Image files as a network takes them: uint8 [3, 32, 32]."""

import contextlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from core.errors import UserError
from core.runs.store import local, open_file

# What Pillow decodes itself: for EPS, say, it would start another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 1 << 29
MAX_SIDE = 65_535  # pixels, as in JPEG; the limit of all pixels is Pillow's own


class ImageError(UserError):
    """A file is not an image that can be read; the message names it."""


def find(paths: Iterable[str | Path]) -> list[Path]:
    """These files; in place of a folder the files in it, sorted, but for hidden ones. A folder in which none can be
    read stays, for `read` to refuse."""
    found: list[Path] = []
    for path in map(local, paths):
        inside: list[Path] = []
        with contextlib.suppress(OSError):  # it is no folder, or a closed one
            inside = [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]
        found += sorted(inside) or [path]
    return found


def eight_bits(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel. Of 16 bits the upper 8 stay, as Pillow has it for colours; grey it would cut off
    at 255.

    Raises:
        ValueError: it has more bits, or floats, whose black and white are not known.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError("it has more than 16 bits a channel")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def read(path: str | Path) -> Tensor:
    """The image in a file: upright as its EXIF orientation says, its central square, made 32x32 by Pillow's Lanczos
    filter (which antialiases), in RGB. What is transparent becomes white; of an animation, this is the first picture.

    Raises:
        ImageError: it cannot be read, or its header promises too many pixels; then none of them is decoded.
    """
    path = local(path)
    if os.path.isdir(path):
        raise ImageError(f"there is no file to read in the folder {path}, expected images")
    try:
        with warnings.catch_warnings(), open(open_file(path, MAX_BYTES), "rb") as file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(file, formats=FORMATS)
            if max(image.size) > MAX_SIDE:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(image, in_place=True)
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            image = eight_bits(image.crop((left, top, left + side, top + side))).convert("RGBA")
            image = image.resize((32, 32), Image.Resampling.LANCZOS)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except UnidentifiedImageError:
        reason = f"it is damaged, or none of {', '.join(FORMATS)}"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"it has more than {MAX_SIDE:,} pixels a side or {Image.MAX_IMAGE_PIXELS:,} in all"
    except Exception as error:  # a decoder raises whatever it comes upon in a damaged file
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    else:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    raise ImageError(f"cannot read {path} as an image: {reason}")
