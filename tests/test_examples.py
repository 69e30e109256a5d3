"""The examples do what they show."""

import importlib.util
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from core import export, predict
from core.export import FORMATS
from core.images import read
from core.spec import resolve
from examples.minimal import train
from tests.conftest import ROOT, lacking
from tests.test_predict import write_checkpoint


def test_the_minimal_example_trains(cifar10):
    """The losses of two epochs on a slice of the real images, within float32 rounding of what they were."""
    data = cifar10._replace(train_images=cifar10.train_images[:7500], train_labels=cifar10.train_labels[:7500])
    numbers = list(train(data, resolve({"epochs": 2}), torch.device("cpu"), compiled=False))
    assert [each["epoch"] for each in numbers] == [1, 2]
    assert [each["train_loss"] for each in numbers] == pytest.approx([2.06367, 1.80200], rel=3e-3)
    assert numbers[1]["val_accuracy"] > 0.2


@pytest.mark.parametrize("kind", FORMATS)
def test_an_exported_network_is_used_without_this_project(tmp_path, small_spec, invented, kind, monkeypatch, capsys):
    """The example prints the three most likely classes, as `predict` finds them; here of a tall photo that was taken
    upside down."""
    if missing := [name for name in FORMATS[kind].needs if importlib.util.find_spec(name) is None]:
        lacking(f"{', '.join(missing)} not installed (`uv sync --group {kind}`)")
    write_checkpoint(tmp_path / "x.safetensors", small_spec(), invented)
    network, path = predict.load(tmp_path / "x.safetensors"), tmp_path / f"network{FORMATS[kind].suffix}"
    images = invented.test_images.view(-1, 3, 32, 32)
    export.export(network, kind, path, images)
    photo, upside_down = tmp_path / "photo.jpg", Image.Exif()
    upside_down[ExifTags.Base.Orientation] = 3
    Image.fromarray(images[:5].permute(0, 2, 3, 1).reshape(160, 32, 3).numpy()[:, :31]).save(photo, exif=upside_down)
    monkeypatch.setattr(sys, "argv", ["use_a_network.py", str(path), str(photo)])
    example = runpy.run_path(str(ROOT / "examples" / "use_a_network.py"), run_name="__main__")
    pixels = read(photo)
    assert np.array_equal(example["read"](photo), pixels)
    top = np.argsort(-network(pixels[None])[0].numpy(), kind="stable")[:3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [network.info.classes[i] for i in top]
    assert "core" not in (ROOT / "examples" / "use_a_network.py").read_text(encoding="utf-8")
