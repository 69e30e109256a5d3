"""Image files of any size and kind, good and bad, and the predictions for them."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from core import images, predict
from core.images import ImageError
from core.spec import CIFAR10
from tests.test_cli import assert_refused
from tests.test_predict import write_checkpoint
from tests.test_store import STRANGE

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(tensor):
    """A Pillow image of uint8 [3, height, width]."""
    return Image.fromarray(tensor.permute(1, 2, 0).contiguous().numpy())


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return folder / name


def flat(tensor):
    """The one colour that all pixels have."""
    colours = tensor.flatten(1).unique(dim=1)
    assert colours.shape == (3, 1)
    return tuple(colours[:, 0].tolist())


# Good ones


def test_an_image_of_the_right_size_stays_as_it_is(invented, tmp_path):
    image = invented.test_images[0].view(3, 32, 32)
    found = images.read(saved(tmp_path, picture(image)))
    assert found.dtype == torch.uint8
    assert torch.equal(found, image)


@pytest.mark.parametrize("name", ["x.avif", "x.bmp", "x.gif", "x.jpeg", "x.png", "x.ppm", "x.tiff", "x.webp"])
def test_each_format_by_its_content(tmp_path, name):
    path = saved(tmp_path, Image.new("RGB", (70, 50), (200, 100, 50)), name)
    found = images.read(path.rename(tmp_path / "no suffix"))
    assert (found.int() - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 4


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (300, 100), (9, 3)])
def test_the_central_square_is_used(tmp_path, size):
    image, side = Image.new("RGB", size, RED), min(size)
    corner = [(length - side) // 2 for length in size]
    image.paste(GREEN, (*corner, *(start + side for start in corner)))
    assert flat(images.read(saved(tmp_path, image))) == GREEN


def test_details_finer_than_a_pixel_are_averaged(tmp_path):
    y, x = torch.meshgrid(torch.arange(320), torch.arange(320), indexing="ij")
    board = ((x + y) % 2 * 255).to(torch.uint8).expand(3, 320, 320)
    found = images.read(saved(tmp_path, picture(board))).int()
    assert (found - 127).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (32, 32), BLUE)
    upright.paste(RED, (0, 0, 16, 16))
    upright.paste(GREEN, (16, 0, 32, 16))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    found = images.read(saved(tmp_path, stored, exif=exif))
    assert torch.equal(found, images.read(saved(tmp_path, upright, "upright.png")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_of_eight_bits_becomes_rgb(tmp_path, mode):
    name = "x.jpeg" if mode in ("CMYK", "YCbCr") else "x.png"
    found = images.read(saved(tmp_path, Image.new("RGB", (40, 40), "white").convert(mode), name))
    assert min(flat(found)) >= 254


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.pgm"])
def test_the_upper_eight_of_sixteen_bits_are_used(tmp_path, name):
    values = torch.arange(1024).view(32, 32) * 64
    grey = Image.fromarray(values.numpy().astype("uint16"))
    if name == "x.pgm":  # Pillow reads such a file, but does not write it
        (tmp_path / name).write_bytes(b"P5 32 32 65535\n" + values.numpy().astype(">u2").tobytes())
    else:
        saved(tmp_path, grey, name)
    assert torch.equal(images.read(tmp_path / name), (values // 256).to(torch.uint8).expand(3, 32, 32))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, mode):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0)).convert(mode)
    path = saved(tmp_path, image, **({"transparency": image.getpixel((0, 0))} if mode == "P" else {}))
    assert flat(images.read(path)) == (255, 255, 255)


def png_of(depth, colour_type, rows, *chunks):
    """A PNG of 32x32 pixels, from the bytes of each row, with more chunks in front of the pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 32, 32, depth, colour_type, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (header, *chunks, data, b"IEND")
    lengths = (struct.pack(">I", len(part) - 4) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        length + part + struct.pack(">I", zlib.crc32(part)) for length, part in zip(lengths, parts, strict=True)
    )


def tiff(bits, photometric, data, sample_format=1):
    """A TIFF of 32x32 grey pixels."""
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 32)]
    tags += [(279, len(data)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


# Rows of which the left half is transparent: depth, colour type, row, transparent colour, colour of the right half.
HALVES = {
    "1 bit": (1, 0, bytes([0xFF] * 2 + [0] * 2), (1,), (0, 0, 0)),
    "2 bits": (2, 0, bytes([0b10101010] * 4 + [0b01010101] * 4), (2,), (85, 85, 85)),
    "4 bits": (4, 0, bytes([0x55] * 8 + [0x11] * 8), (5,), (17, 17, 17)),
    "8 bits": (8, 0, bytes([7] * 16 + [8] * 16), (7,), (8, 8, 8)),
    "16 bits": (16, 0, bytes([70, 1] * 16 + [70, 2] * 16), (70 * 256 + 1,), (70, 70, 70)),
    "8 bits, colour": (8, 2, bytes([9, 8, 7] * 16 + [8, 8, 7] * 16), (9, 8, 7), (8, 8, 7)),
    "16 bits, colour": (16, 2, bytes([9, 0, 8, 0, 7, 1] * 16 + [8, 0, 8, 0, 7, 1] * 16), (2304, 2048, 1793), (8, 8, 7)),
}


@pytest.mark.parametrize(("depth", "colour", "row", "transparent", "expected"), HALVES.values(), ids=HALVES)
def test_the_transparent_colour_of_a_png_becomes_white(tmp_path, depth, colour, row, transparent, expected):
    chunk = b"tRNS" + struct.pack(f">{len(transparent)}H", *transparent)
    (tmp_path / "x.png").write_bytes(png_of(depth, colour, [row] * 32, chunk))
    found = images.read(tmp_path / "x.png")
    assert (flat(found[:, :, :16]), flat(found[:, :, 16:])) == ((255, 255, 255), expected)


@pytest.mark.parametrize(("alpha", "expected"), [((0, 0), (10, 20, 30)), ((0, 255), None)])
def test_a_bmp_with_zero_alpha_is_opaque(tmp_path, alpha, expected):
    image = Image.new("RGBA", (32, 32), (10, 20, 30, alpha[0]))
    image.paste((10, 20, 30, alpha[1]), (0, 0, 16, 32))
    saved(tmp_path, image, "x.bmp")
    data = bytearray((tmp_path / "x.bmp").read_bytes())
    pixels = data[-4096:]
    # With a header of the fourth version, and masks, the fourth byte is called alpha.
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 32, 32, 1, 32, 3, 4096, 0, 0, 0, 0) + masks + bytes(52)
    (tmp_path / "x.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 122 + 4096, 0, 0, 122) + header + pixels)
    with Image.open(tmp_path / "x.bmp") as opened:
        assert opened.mode == "RGBA"
    found = images.read(tmp_path / "x.bmp")
    if expected:
        assert flat(found) == expected
    else:
        assert (flat(found[:, :, :16]), flat(found[:, :, 16:])) == ((10, 20, 30), (255, 255, 255))


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "expected"),
    [
        (16, 1, np.full(1024, 200 * 256 + 3, "<u2").tobytes(), 200),
        (16, 0, np.full(1024, 200 * 256 + 3, "<u2").tobytes(), 55),
        (8, 0, bytes([200] * 1024), 55),
        (12, 1, bytes([0xC8, 0x3C, 0x83] * 512), 200),
    ],
)
def test_the_brightness_of_a_grey_tiff_is_that_of_the_file(tmp_path, bits, photometric, data, expected):
    (tmp_path / "x.tiff").write_bytes(tiff(bits, photometric, data))
    assert flat(images.read(tmp_path / "x.tiff")) == (expected,) * 3


def test_grey_of_sixteen_bits_in_either_order_of_bytes_and_with_alpha(tmp_path):
    values = np.full((32, 32), 200 * 256 + 3, ">u2")
    image = Image.frombytes("I;16B", (32, 32), values.tobytes())
    assert flat(images.read(saved(tmp_path, image, "x.tiff"))) == (200, 200, 200)
    (tmp_path / "x.png").write_bytes(png_of(16, 4, [bytes([200, 3, 0, 0] * 16 + [200, 3, 255, 255] * 16)] * 32))
    found = images.read(tmp_path / "x.png")
    assert (flat(found[:, :, :16]), flat(found[:, :, 16:])) == ((255, 255, 255), (200, 200, 200))


@pytest.mark.parametrize("after", [False, True])
def test_a_png_may_have_much_text(tmp_path, after):
    """As image editors write it; up to the 64 MB that Pillow reads."""
    text = b"zTXt" + b"prompt\0\0" + zlib.compress(b"a word " * 500_000)
    (tmp_path / "x.png").write_bytes(png_of(8, 2, [bytes([1, 2, 3] * 32)] * 32, text))
    if after:
        data = png_of(8, 2, [bytes([1, 2, 3] * 32)] * 32)
        chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        (tmp_path / "x.png").write_bytes(data[:-12] + chunk + data[-12:])
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    assert flat(images.read(tmp_path / "x.png")) == (1, 2, 3)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK
    bomb = b"zTXt" + b"prompt\0\0" + zlib.compress(bytes(70 << 20))
    (tmp_path / "x.png").write_bytes(png_of(8, 2, [bytes([1, 2, 3] * 32)] * 32, bomb))
    with pytest.raises(ImageError, match="as an image: Decompressed data too large"):
        images.read(tmp_path / "x.png")


def test_the_first_picture_of_an_animation_is_used(tmp_path):
    first, *rest = [Image.new("RGB", (40, 40), colour) for colour in (RED, GREEN, BLUE)]
    assert flat(images.read(saved(tmp_path, first, "x.gif", save_all=True, append_images=rest))) == RED


# Bad ones


def png(width, height, depth=8):
    """The header of a PNG, followed by no pixels at all."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")

    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(data) + chunk(b"IEND")


def truncated(folder, name):
    path = saved(folder, Image.effect_noise((200, 200), 90).convert("RGB"), name)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize("name", ["x.avif", "x.bmp", "x.gif", "x.jpeg", "x.png", "x.ppm", "x.tiff", "x.webp"])
def test_a_truncated_image_is_refused(tmp_path, name):
    path = truncated(tmp_path, name)
    with pytest.raises(ImageError, match=rf"^cannot read {path} as an image: [^\n]+$"):
        images.read(path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is damaged, or none of AVIF, BMP"),
        (b"this is no image" * 100, "it is damaged, or none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "it is damaged, or none of"),
        (png(100_000, 10), "it has more than 65,535 pixels a side or 89,478,485 in all"),
        (png(10_000, 10_000), "it has more than 65,535 pixels a side or 89,478,485 in all"),
        (png(20_000, 20_000), "it has more than 65,535 pixels a side or 89,478,485 in all"),
    ],
    ids=["empty", "text", "eps", "wide", "large", "bomb"],
)
def test_no_image_or_too_many_pixels_is_refused(tmp_path, data, words):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"^cannot read {path} as an image: {words}[^\n]*$"):
        images.read(path)


@pytest.mark.parametrize(("mode", "value"), [("I", 70_000), ("I", -1), ("I", 255), ("F", 0.5), ("F", 255)])
def test_more_than_sixteen_bits_are_refused_rather_than_cut_off(tmp_path, mode, value):
    path = saved(tmp_path, Image.new(mode, (40, 40), value), "x.tiff")
    with pytest.raises(ImageError, match=r"or more than 16 bits a channel: its white is not known$"):
        images.read(path)


def test_signed_numbers_are_refused(tmp_path):
    (tmp_path / "x.tiff").write_bytes(tiff(16, 1, np.full(1024, 255, "<i2").tobytes(), sample_format=2))
    with pytest.raises(ImageError, match=r"signed numbers"):
        images.read(tmp_path / "x.tiff")


@pytest.mark.parametrize("strange", [s for s in STRANGE if s != "folder"])  # what a folder holds is read
def test_a_special_or_too_large_file_is_refused(tmp_path, strange):
    make_strange, reason = STRANGE[strange]
    make_strange(tmp_path / "x.png")
    with pytest.raises(ImageError, match=f"^cannot read {tmp_path / 'x.png'} as an image: (it has )?{reason}"):
        images.read(tmp_path / "x.png")


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ImageError, match=f"^cannot read {tmp_path / 'x.png'} as an image: No such file"):
        images.read(tmp_path / "x.png")


# From the command line


@pytest.fixture
def weights(tmp_path, small_spec, invented):
    """The checkpoint of a small network."""
    write_checkpoint(tmp_path / "x.safetensors", small_spec(), invented)
    return tmp_path / "x.safetensors"


@pytest.fixture
def folder(tmp_path, invented):
    """Three images in a folder, one of them bad, with a hidden file and an empty folder inside."""
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / ".hidden").write_text("x")
    for i, name in enumerate(("a.png", "c.png")):
        saved(folder, picture(invented.test_images[i].view(3, 32, 32)), name)
    (folder / "b.png").write_bytes(png(100_000, 10))
    return folder


def test_images_and_folders_of_them(call, weights, folder):
    good = folder / "c.png"
    empty, cut = folder / "inside", truncated(folder.parent, "cut.jpeg")
    done = call("predict", weights, good, folder, folder / "gone.png", "x" * 300, empty, cut, weights, good)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(p) for p in (good, folder / "a.png", good, good)]
    probabilities = predict.load(weights)(images.read(good)[None]).softmax(1)[0].tolist()
    order = sorted(range(10), key=lambda i: -probabilities[i])[:3]
    assert lines[0] == f"{good}: " + ", ".join(f"{CIFAR10.classes[i]} {100 * probabilities[i]:.2f}%" for i in order)
    said, wide, gone, long, nothing, half, other = done.stderr.splitlines()
    assert said.startswith("there are only 10 classes, and every image gets one of them: airplane, ")
    assert wide.startswith(f"error: cannot read {folder / 'b.png'} as an image: it has more than")
    assert gone == f"error: cannot read {folder / 'gone.png'} as an image: No such file or directory"
    assert long.endswith("as an image: File name too long")
    assert nothing == f"error: there is no file to read in the folder {empty}, expected images"
    assert half.startswith(f"error: cannot read {cut} as an image: ")
    assert other.startswith(f"error: cannot read {weights} as an image: it is damaged, or none of AVIF, BMP")


def test_predictions_as_json(call, weights, folder):
    good = folder / "c.png"
    done = call("predict", weights, good, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["image"] == str(good)
    probabilities = predict.load(weights)(images.read(good)[None]).softmax(1)[0].tolist()
    order = sorted(range(10), key=lambda i: -probabilities[i])[:3]
    assert [entry["class"] for entry in found["classes"]] == [CIFAR10.classes[i] for i in order]
    expected = pytest.approx([probabilities[i] for i in order], abs=1e-6)
    assert [entry["probability"] for entry in found["classes"]] == expected


def test_predict_refuses_bad_arguments(call, weights, tmp_path, folder):
    assert_refused(call("predict", tmp_path / "gone", folder), "cannot read", "gone: No such file or directory")
    assert_refused(call("predict", weights), "the following arguments are required: IMAGE")
