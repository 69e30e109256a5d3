"""Image files as a network takes them: uint8 [channels, height, width]."""

import contextlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from core.errors import UserError
from core.store import local, open_file

# Pillow decodes these itself. For EPS, for example, it would start another program.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 1 << 29
MAX_SIDE = 65_535  # pixels, as in JPEG; the limit of all pixels is Pillow's own


class ImageError(UserError):
    """A file is not an image that can be read; the message names it."""


def find(paths: Iterable[str | Path]) -> list[Path]:
    """The files, with each folder replaced by the files in it, sorted, without hidden ones. A folder without readable
    files stays, so that `read` reports it."""
    files: list[Path] = []
    for path in map(local, paths):
        inside: list[Path] = []
        with contextlib.suppress(OSError):  # it is no folder, or cannot be read
            inside = [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]
        files += sorted(inside) or [path]
    return files


def eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """The image in 8 bits a channel, with its transparent colour. Of 16 bits the upper 8 are kept. Pillow does so for
    colours, but it would clip grey at 255.

    Args:
        source: the file that the image comes from.

    Raises:
        ValueError: it is not known which number is white.
    """
    if image.mode == "RGBA" and source.format == "BMP" and source.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # many programs leave the fourth byte of a pixel empty
    if not image.mode.startswith(("I", "F")):
        return image
    tags = source.tag_v2 if isinstance(source, TiffImagePlugin.TiffImageFile) else {}
    # Pillow reads the 16 bits of a PPM as 32.
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (32,))[0] if source.format == "TIFF" else 16
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] != 1
    if image.mode == "F" or bits > 16 or signed:
        raise ValueError("it has floats, signed numbers or more than 16 bits a channel: its white is not known")
    pixels = np.asarray(image).astype(np.uint16)
    grey = (pixels >> (bits - 8)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0; Pillow inverts only 8 bits
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is None:
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(pixels == transparent, 0, 255).astype(np.uint8)], 2))


def scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Scale the transparent colour of a PNG to 8 bits, before its pixels are read. Pillow scales the pixels alone."""
    colour, raw = image.info.get("transparency"), str(image.tile[0][3]) if image.format == "PNG" else ""
    if colour is not None and raw in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[raw]
    elif colour is not None and raw == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def read(path: str | Path, shape: tuple[int, int, int] = (3, 32, 32)) -> Tensor:
    """The image in a file: upright as its EXIF orientation says, its central square, scaled by Pillow's Lanczos filter
    (which antialiases), in RGB, or in grey where `shape` has one channel. Transparent pixels become white. Of an
    animation, the first picture is read.

    Raises:
        ImageError: it cannot be read, or its header promises too many pixels; then none of them is decoded.
    """
    path, (channels, height, width) = local(path), shape
    mode = "L" if channels == 1 else "RGB"
    if os.path.isdir(path):
        raise ImageError(f"there is no file to read in the folder {path}, expected images")
    try:
        with warnings.catch_warnings(), open_file(path, MAX_BYTES) as file:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with mock.patch.object(PngImagePlugin, "MAX_TEXT_CHUNK", PngImagePlugin.MAX_TEXT_MEMORY):
                source = Image.open(file, formats=FORMATS)
                if max(source.size) > MAX_SIDE:
                    raise Image.DecompressionBombError
                scale_transparent_colour(source)
                source.load()  # a PNG may have text after its pixels, too
            ImageOps.exif_transpose(source, in_place=True)
            side = min(source.size)
            left, top = ((length - side) // 2 for length in source.size)
            image = eight_bits(source.crop((left, top, left + side, top + side)), source).convert("RGBA")
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
    except UnidentifiedImageError:
        reason = f"it is damaged, or none of {', '.join(FORMATS)}"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        reason = f"it has more than {MAX_SIDE:,} pixels a side or {Image.MAX_IMAGE_PIXELS:,} in all"
    except Exception as error:  # a decoder may raise anything for a damaged file
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    else:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, channels).permute(2, 0, 1)
    raise ImageError(f"cannot read {path} as an image: {reason}")
