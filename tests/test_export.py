"""A network as a file for other programs: really written, and loaded by processes that have nothing of this project."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from core import export, predict
from core.export import FORMATS, ExportError
from core.runs.store import StoreError
from tests.conftest import lacking
from tests.test_cli import assert_refused
from tests.test_predict import write_checkpoint

TORCH = """
import sys
import numpy as np
import torch
model = torch.export.load(sys.argv[1]).module()
run = lambda images: model(torch.from_numpy(images)).numpy()
"""
ONNX = """
import sys
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
run = lambda images: session.run(None, {"images": images})[0]
"""
RUN = """
images = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([run(images[:1]), run(images[1:8]), run(images[8:])]))
assert "core" not in sys.modules
"""


@pytest.fixture
def trained(tmp_path, small_spec, invented):
    """Makes the checkpoint of a small network."""

    def make(**changes):
        write_checkpoint(tmp_path / "x.safetensors", small_spec(**changes), invented)
        return tmp_path / "x.safetensors"

    return make


@pytest.fixture
def images(invented):
    return invented.test_images.view(-1, 3, 32, 32)


@pytest.fixture(params=FORMATS)
def kind(request):
    """Each format whose packages are there."""
    if missing := [name for name in FORMATS[request.param].needs if importlib.util.find_spec(name) is None]:
        lacking(f"{', '.join(missing)} not installed (`uv sync --group {request.param}`)")
    return request.param


def elsewhere(path, images, folder):
    """The logits that a process of its own finds with an exported file, of 1, 7 and the other images."""
    np.save(folder / "images.npy", images.numpy())
    source = (TORCH if path.suffix == ".pt2" else ONNX) + RUN
    command = (sys.executable, "-c", source, path, "images.npy", "logits.npy")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(folder / "logits.npy"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "none", "activation": "gelu", "dropout": 0}, {"activation": "tanh", "widths": []}],
    ids=str,
)
def test_another_program_finds_the_same_logits(call, trained, images, kind, tmp_path, changes):
    path = trained(**changes)
    done = call("export", path, "--format", kind)
    assert (done.returncode, done.stderr) == (0, "")
    written = path.with_suffix(FORMATS[kind].suffix)
    words = "uint8 images [n, 3, 32, 32] -> float32 logits [n, 10], within 1e-05 on 100 test images"
    assert done.stdout == f"{written}: {words}\n"
    assert sorted(tmp_path.iterdir()) == sorted([path, written])
    found = elsewhere(written, images, tmp_path)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, predict.load(path)(images), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_is_exported_where_the_format_has_it(call, trained, images, kind, tmp_path):
    path = trained(precision="bfloat16")
    done = call("export", path, "--format", kind)
    assert done.returncode == 0, done.stderr
    network = predict.load(path)
    single = predict.load(trained(precision="float32"))
    found = elsewhere(path.with_suffix(FORMATS[kind].suffix), images, tmp_path)
    if kind == "torch":
        assert done.stderr == ""
        parts = images[:1], images[1:8], images[8:]
        torch.testing.assert_close(found, torch.cat([network(part) for part in parts]), rtol=0, atol=1e-5)
        assert (found - single(images)).abs().max() > 1e-4
    else:
        assert done.stderr == "its matrix products are in float32, those of the checkpoint in bfloat16\n"
        torch.testing.assert_close(found, single(images), rtol=0, atol=1e-5)


def test_the_tensors_have_the_names_of_the_checkpoint(trained, images, tmp_path):
    network = predict.load(trained())
    export.export(network, "torch", tmp_path / "x.pt2", images)
    found = torch.export.load(tmp_path / "x.pt2").state_dict
    assert found.keys() == network.params.keys() | network.stats.keys()
    assert all(torch.equal(t, found[name]) for name, t in (network.params | network.stats).items())


def test_without_the_data_random_images_serve_and_nothing_is_fetched(call, trained, tmp_path):
    output = tmp_path / "here" / "net.pt2"
    output.parent.mkdir()
    output.write_bytes(b"an older export")
    done = call("export", trained(), "--format", "torch", "--output", output, "--data", tmp_path / "nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: ")
    assert done.stdout.endswith("within 1e-05 on 100 random images\n")
    assert list(output.parent.iterdir()) == [output]
    assert not (tmp_path / "nowhere").exists()
    torch.export.load(output)


# Refused


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
@pytest.mark.parametrize("older", [None, b"an older export"])
def test_a_file_with_other_logits_is_not_left_there(trained, images, tmp_path, monkeypatch, wrong, older):
    path = tmp_path / "out" / "x.pt2"
    path.parent.mkdir()
    if older:
        path.write_bytes(older)
    network, form = predict.load(trained()), FORMATS["torch"]

    def read(written):
        assert written.parent == path.parent
        model = form.read(written)
        return lambda images: model(images) + torch.tensor([0.0] * 9 + [wrong])

    monkeypatch.setitem(FORMATS, "torch", form._replace(read=read))
    with pytest.raises(ExportError, match=rf"^{path} is not written: its logits differ by (1\.0e-03|nan) [^\n]*$"):
        export.export(network, "torch", path, images)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [older] * bool(older)


@pytest.mark.parametrize("missing", FORMATS["onnx"].needs)
def test_a_missing_package_is_named_with_the_command(call, trained, tmp_path, missing):
    path = trained()
    patch = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)
"""
    done = call("export", path, "--format", "onnx", patch=patch)
    assert_refused(done, missing, "`uv run --group onnx main.py export CHECKPOINT --format onnx`")
    assert list(tmp_path.iterdir()) == [path]


def test_outputs_that_cannot_be_written(trained, images, tmp_path):
    network = predict.load(trained())
    (tmp_path / "folder.pt2").mkdir()
    for path, error, words in (
        (tmp_path / "x.safetensors", ExportError, "expected a name that ends in .pt2"),
        (tmp_path / "gone" / "x.pt2", StoreError, "No such file or directory"),
        (tmp_path / "folder.pt2", StoreError, "Is a directory"),
    ):
        with pytest.raises(error, match=f"^cannot write {path}: {words}$"):
            export.export(network, "torch", path, images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt2", "x.safetensors"]


def test_a_network_that_a_format_cannot_hold(trained, images, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "torch", FORMATS["torch"]._replace(limit=1000))
    with pytest.raises(ExportError, match=r"x\.pt2: [0-9,]+ bytes of weights, expected at most 1,000 in torch$"):
        export.export(predict.load(trained()), "torch", tmp_path / "x.pt2", images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone.safetensors", "--format", "torch"], "cannot read gone.safetensors: No such file"),
        (["gone.safetensors", "--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
        (["gone.safetensors"], "the following arguments are required: --format"),
    ],
)
def test_bad_arguments(call, arguments, words):
    assert_refused(call("export", *arguments), words)
