"""A network as a file for other programs: it is loaded by processes that do not have this project."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch

from core import export, predict
from core.data import cifar10
from core.export import FORMATS, ExportError
from core.store import StoreError
from tests.conftest import lacking
from tests.test_cli import assert_refused
from tests.test_predict import write_checkpoint

# Programs that run exported files on the images in images.npy: on one of them, on seven, on the others.
TORCH = """
import torch
def load(path):
    model = torch.export.load(path).module()
    return lambda images: model(torch.from_numpy(images)).numpy()
"""
ONNX = """
import onnxruntime
def load(path):
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(None, {"images": images})[0]
"""
RUN = """
import sys
import numpy as np
images = np.load("images.npy")
for path in sys.argv[1:]:
    run = load(path)
    np.save(path + ".npy", np.concatenate([run(images[:1]), run(images[1:8]), run(images[8:])]))
assert "core" not in sys.modules
"""
NETWORKS = {
    "default": {},
    "bfloat16": {"precision": "bfloat16"},
    "whitened": {"whiten": 64, "norm": "none", "activation": "gelu", "dropout": 0},
    "linear": {"activation": "tanh", "widths": []},
    "blocks": {"expansion": 2, "norm": "layer", "activation": "relu", "widths": [32, 32]},
}


@pytest.fixture
def trained(tmp_path, small_spec, invented):
    """Makes the checkpoint of a small network."""

    def make(name="x", **changes):
        path = tmp_path / f"{name}.safetensors"
        write_checkpoint(path, small_spec(**changes), invented)
        return path

    return make


@pytest.fixture
def images(invented):
    return invented.test_images.view(-1, 3, 32, 32)


@pytest.fixture(params=FORMATS)
def kind(request):
    """Each format whose packages are installed."""
    if missing := [name for name in FORMATS[request.param].needs if importlib.util.find_spec(name) is None]:
        lacking(f"{', '.join(missing)} not installed (`uv sync --group {request.param}`)")
    return request.param


def elsewhere(paths, images, folder):
    """The logits that another process computes with each of the exported files."""
    np.save(folder / "images.npy", images.numpy())
    source = (TORCH if paths[0].suffix == ".pt2" else ONNX) + RUN
    done = subprocess.run((sys.executable, "-c", source, *paths), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(np.load(f"{path}.npy")) for path in paths]


def logits(path, images):
    """The logits of a checkpoint, for as many images at a time as in RUN."""
    network = predict.load(path)
    return torch.cat([network(part) for part in (images[:1], images[1:8], images[8:])])


# One process exports several checkpoints: it takes seconds to import what writes a file.
EACH = """
import main
export = main.main
main.main = lambda argv: max([export([argv[0], path, *argv[2:]]) for path in {}])
"""


@pytest.mark.slow
def test_another_program_computes_the_same_logits(call, trained, images, data_dir, kind, tmp_path):
    """With all layers and precisions. The printed tolerance is right, too."""
    first = torch.from_numpy(cifar10.ARCHIVE.read(data_dir, "test_batch")[b"data"][:100])
    checkpoints = {name: trained(name, **changes) for name, changes in NETWORKS.items()}
    written = {name: path.with_suffix(FORMATS[kind].suffix) for name, path in checkpoints.items()}
    done = call("export", "CHECKPOINT", "--format", kind, patch=EACH.format([*map(str, checkpoints.values())]))
    assert done.returncode == 0, done.stderr
    said = "its matrix products are in float32, those of the checkpoint in bfloat16\n"
    assert done.stderr == (said if kind == "onnx" else "")
    tolerances = set()
    for line, (name, path) in zip(done.stdout.splitlines(), checkpoints.items(), strict=True):
        above_1 = logits(path, first).abs().max() > 1
        tolerance = "within 1e-05 of the largest logit" if above_1 else "within 1e-05"
        words = f"uint8 images [n, 3, 32, 32] -> float32 logits [n, 10], {tolerance} on 100 test images"
        assert line == f"{written[name]}: {words}"
        tolerances.add(tolerance)
    assert len(tolerances) == 2
    assert sorted(tmp_path.iterdir()) == sorted([*checkpoints.values(), *written.values()])

    found = dict(zip(NETWORKS, elsewhere([*written.values()], images, tmp_path), strict=True))
    for name, path in checkpoints.items():
        expected = logits(path if FORMATS[kind].bfloat16 or name != "bfloat16" else checkpoints["default"], images)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5 * max(1, expected.abs().max()), msg=name)
    assert torch.equal(found["bfloat16"], found["default"]) == (not FORMATS[kind].bfloat16)


def test_the_tensors_have_the_names_of_the_checkpoint(trained, images, tmp_path):
    network = predict.load(trained())
    export.export(network, "torch", tmp_path / "x.pt2", images)
    found = torch.export.load(tmp_path / "x.pt2").state_dict
    assert found.keys() == network.params.keys() | network.stats.keys()
    assert all(torch.equal(t, found[name]) for name, t in (network.params | network.stats).items())


def test_without_the_data_random_images_are_used_and_nothing_is_fetched(call, trained, tmp_path):
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
def test_a_file_with_other_logits_is_not_kept(trained, images, tmp_path, monkeypatch, wrong, older):
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


@pytest.mark.parametrize("largest", [0.1, 1, 50])
def test_the_tolerance_is_a_share_of_the_largest_logit_above_1(trained, images, tmp_path, monkeypatch, largest):
    """In float32 a logit of 50 is known to 4e-6, and another program adds in another order."""
    network, form = predict.load(trained()), FORMATS["torch"]
    scale = largest / logits(tmp_path / "x.safetensors", images).abs().max()
    last = [name for name in network.params if name.startswith(f"{len(predict.as_module(network.spec)) - 1}.")]
    network = network._replace(params=network.params | {name: scale * network.params[name] for name in last})
    assert network(images).abs().max().item() == pytest.approx(largest)

    def export_with(wrong):
        def read(written):
            model = form.read(written)
            return lambda images: model(images) + wrong

        monkeypatch.setitem(FORMATS, "torch", form._replace(read=read))
        return export.export(network, "torch", tmp_path / "x.pt2", images)

    allowed = 1e-5 * max(1, largest)
    assert export_with(0.9 * allowed).largest == pytest.approx(largest)
    (tmp_path / "x.pt2").unlink()
    with pytest.raises(ExportError, match=f"differ by [^\n]*, expected at most {allowed:.1e}$"):
        export_with(1.1 * allowed)
    assert not (tmp_path / "x.pt2").exists()


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


def test_an_output_that_cannot_be_written_is_refused(trained, images, tmp_path):
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


def test_a_network_that_a_format_cannot_hold_is_refused(trained, images, tmp_path, monkeypatch):
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
def test_bad_arguments_are_refused(call, arguments, words):
    assert_refused(call("export", *arguments), words)
