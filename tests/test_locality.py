"""Local layers: the envelope of their weights, its gradient, and the plain network that they leave."""

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from core import predict, run_experiment
from core.functional import augment, locality, model, step
from core.mode import Mode
from core.spec import resolve, static
from core.train import Training, fit

CPU = torch.device("cpu")


def test_the_envelope_is_a_gaussian_of_the_distance_in_the_image():
    """Against loops: pixels of three channels in front of the first layer, units in front of the second."""
    spec = resolve({"widths": [6, 4], "locality": [2.0, 5.0], "seed": 3})
    found = locality.envelopes(spec)
    first, second = (locality._centres(3, i, n, step.CIFAR10).double().numpy() for i, n in enumerate((6, 4)))
    assert found.keys() == {"1.weight", "5.weight"}
    expected = [
        [[np.exp(-((y - row) ** 2 + (x - column) ** 2) / 8) for _ in range(3) for y in range(32) for x in range(32)]
         for row, column in first],
        [[np.exp(-((y - row) ** 2 + (x - column) ** 2) / 50) for y, x in first] for row, column in second],
    ]  # fmt: skip
    for g, values in zip(found.values(), expected, strict=True):
        values = torch.tensor(np.maximum(np.array(values, dtype=float), locality.FLOOR))
        assert g.dtype == torch.bfloat16
        torch.testing.assert_close(g.double(), values, rtol=2**-8, atol=0)
        assert 0 < g.min() < 0.01
        assert g.max() <= 1


def test_centres_are_uniform_over_the_image_and_depend_on_seed_and_layer():
    centres = locality._centres(0, 0, 20_000, step.CIFAR10)
    assert centres.min() >= -0.5
    assert centres.max() <= 31.5
    counts = torch.histogramdd(centres, bins=[4, 4], range=[-0.5, 31.5, -0.5, 31.5]).hist
    assert ((counts - 1250).abs() < 5 * 1250**0.5).all()
    for other in (locality._centres(1, 0, 20_000, step.CIFAR10), locality._centres(0, 1, 20_000, step.CIFAR10)):
        assert (centres == other).sum() < 10


def test_a_layer_starts_on_the_scale_of_a_dense_layer():
    """Each unit has the norm of its weights that it would have in a dense layer, on average."""
    dense = step.init_state(resolve({"seed": 4}))["params"]
    local = step.init_state(resolve({"seed": 4, "locality": [3.0, 6.0]}))
    for name in ("1.weight", "5.weight"):
        ratio = local["effective"][name].norm(dim=1) / dense[name].norm(dim=1)
        assert ratio.mean() == pytest.approx(1, abs=0.02)
        assert 0.5 < ratio.min() < ratio.max() < 1.5
    assert torch.equal(local["params"]["9.weight"], dense["9.weight"])


def test_the_gradient_is_that_of_autograd(small_spec, step_inputs_in_float64):
    """With respect to the trained weights, in float64. With momentum at zero a step of SGD subtracts the gradient."""
    spec = small_spec(optimizer="sgd", lr=1.0, locality=[2.0, 5.0], dropout=0.0)
    state, data, hyper = step_inputs_in_float64(spec)
    state["effective"] = model.effective(state["params"], spec, hyper["envelope"])
    after = step.make_train_step(static(spec))(state, data, hyper)
    trained = {name: p.clone().requires_grad_() for name, p in state["params"].items()}
    examples = data["order"][0]
    x = augment.normalise(data["images"][examples])
    weights = {
        name: p * hyper["envelope"][name].double() if name in hyper["envelope"] else p for name, p in trained.items()
    }
    logits, _ = model.forward(weights, state["stats"], x, spec, train=True)
    F.cross_entropy(logits, data["labels"][examples]).backward()
    for name in ("1.weight", "5.weight"):
        moved = state["params"][name] - after["params"][name]
        torch.testing.assert_close(moved, trained[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_with_a_very_large_sigma_it_trains_like_a_dense_network(invented, tmp_path, small_spec, precision):
    records = [
        run_experiment(
            "x", small_spec(epochs=1, precision=precision, locality=sigmas), tmp_path, invented, "cpu", compiled=False
        )
        for sigmas in ([], [1e6, 1e6])
    ]
    assert records[0].digest == records[1].digest


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "precision": "bfloat16"}], ids=str)
def test_the_envelope_is_folded_into_the_checkpoint(invented, tmp_path, small_spec, changes):
    """The network that is saved is an ordinary one, and has the logits of the one that was trained."""
    spec = small_spec(locality=[2.0, 5.0], epochs=1, **changes)
    record = run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False)
    path = tmp_path / "checkpoints" / "x" / f"{record.spec_id}.safetensors"
    found = predict.load(path)
    assert found.digest() == record.digest
    training = Training(spec, invented, CPU, Mode("eager"))
    for _ in fit([training]):
        pass
    params, stats = step.trained(training.state)
    effective = model.effective(params, spec, training.hyper["envelope"])
    x = augment.normalise(invented.test_images)
    expected, _ = model.forward({**params, **effective}, stats, x, spec)
    assert torch.equal(found(invented.test_images), expected)
    module = predict.as_module(found.spec)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    tolerance = 0.05 if changes else 1e-4
    torch.testing.assert_close(module.eval()(x), expected, rtol=tolerance, atol=tolerance)
