"""A trained network from its checkpoint: in our code, and in plain PyTorch."""

import pytest
import safetensors.torch
import torch

from core import predict
from core.functional import model, step
from core.runs import checkpoint
from core.runs.checkpoint import CheckpointError


@pytest.fixture
def saved(tmp_path, small_spec):
    """A checkpoint as a run leaves it, with statistics that no initialisation has."""
    spec = small_spec()
    params, stats = model.init(spec, 3)
    stats = {name: s + torch.rand_like(s) if s.is_floating_point() else s + 2 for name, s in stats.items()}
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {**params, **stats}, {"name": "x", "seed": 3, "spec": spec})
    return path, spec, params, stats


def test_load_gives_back_what_was_saved(saved):
    path, spec, params, stats = saved
    for where in (path, str(path)):
        net = predict.load(where)
        assert net.spec == spec
        assert (net.meta["name"], net.meta["seed"]) == ("x", 3)
        assert net.params.keys() == params.keys()
        assert net.stats.keys() == stats.keys()
        assert all(torch.equal(net.params[name], params[name]) for name in params)
        assert all(torch.equal(net.stats[name], stats[name]) for name in stats)


def test_calling_it_classifies_images_of_either_shape(saved, invented):
    net = predict.load(saved[0])
    images = invented.test_images
    logits = net(images)
    assert logits.shape == (100, 10)
    assert torch.equal(logits, net(images.view(-1, 3, 32, 32)))
    torch.testing.assert_close(logits[:1], net(images[:1]), rtol=1e-4, atol=1e-5)


def test_plain_pytorch_reads_the_same_file(saved, invented, sequential):
    """As the README shows it: safetensors, nn.Sequential, the channels' mean and deviation."""
    path, spec, *_ = saved
    module = sequential(spec)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    x = (invented.test_images.view(-1, 3, 32, 32) / 255 - mean) / std
    torch.testing.assert_close(predict.load(path)(invented.test_images), module.eval()(x), rtol=1e-4, atol=1e-5)


def test_evaluate_is_the_evaluation_of_the_run(saved, invented):
    path, spec, params, stats = saved
    expected = step.evaluate(params, stats, invented.test_images, invented.test_labels, spec)
    assert predict.load(path).evaluate(invented.test_images, invented.test_labels) == expected


@pytest.mark.parametrize(
    "changes", [{"widths": [32, 15]}, {"widths": [32]}, {"norm": "none"}, {"dropout": 0.0}], ids=str
)
def test_weights_of_another_architecture_are_refused(saved, small_spec, changes):
    """The spec in the file and the tensors in the file disagree."""
    path, _, params, stats = saved
    checkpoint.save(path, {**params, **stats}, {"name": "x", "seed": 3, "spec": small_spec(**changes)})
    with pytest.raises(
        CheckpointError,
        match=r"^[^\n]*x\.safetensors is damaged or not a checkpoint[^\n]*: tensor '[^\n]*, expected [^\n]*$",
    ):
        predict.load(path)


@pytest.mark.parametrize("spec", [None, {"width": [1]}, {"widths": [0]}, "x"], ids=str)
def test_a_spec_that_is_none_is_refused(saved, spec):
    path, _, params, stats = saved
    checkpoint.save(path, {**params, **stats}, {"name": "x", "seed": 3, "spec": spec})
    with pytest.raises(CheckpointError, match=r"^[^\n]*x\.safetensors is damaged or not a checkpoint[^\n]*$"):
        predict.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot read [^\n]*gone\.safetensors: No such file or directory$"):
        predict.load(tmp_path / "gone.safetensors")
