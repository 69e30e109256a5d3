"""The whitening of images: right against NumPy, the same bits always, and folded into the network that is saved."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch

from core import predict, run_experiment
from core.data.whitening import _principal_components, whitening
from core.functional import augment, model, step
from core.mode import Mode
from core.runs import checkpoint
from core.spec import CIFAR10, resolve
from core.train import Training, fit

MEAN, STD = (np.array(values)[:, None, None] for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
EPS = 0.01


def normalised(images):
    """With their mirror images, in float64, by NumPy."""
    x = (images.view(-1, 3, 32, 32).numpy() / 255 - MEAN) / STD
    return np.concatenate([x, x[..., ::-1]]).reshape(-1, 3072)


def test_whitening_is_the_principal_component_analysis_of_numpy(cifar10_slice):
    images, _ = cifar10_slice
    found = whitening(images, torch.arange(100, 500), 40, EPS)
    x = normalised(images[100:500])
    centered = x - x.mean(0)
    variances, combinations = (each[..., ::-1][..., :40] for each in np.linalg.eigh(centered @ centered.T / len(x)))
    vectors = centered.T @ combinations / np.sqrt(len(x) * variances)
    # Components of the same variance may be turned; what they do together is the same however that is.
    expected = vectors / (variances + EPS) @ vectors.T
    weight = found["weight"].double().numpy()
    np.testing.assert_allclose(weight.T @ weight, expected, atol=1e-6 * np.abs(expected).max())
    z = x @ weight.T + found["bias"].numpy()
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.diag(variances / (variances + EPS)), atol=1e-4)


def test_for_local_layers_the_components_become_an_image_again(cifar10_slice):
    """With all components and a small eps, x less its mean times the inverse root of its covariance: ZCA."""
    images, _ = cifar10_slice
    info = dataclasses.replace(CIFAR10, shape=(3, 4, 4))
    corners = images.view(-1, 3, 32, 32)[:, :, 10:14, 10:14].reshape(-1, 48).contiguous()
    found = whitening(corners, torch.arange(500), 48, 1e-9, back=True, info=info)
    x = ((corners[:500].view(-1, 3, 4, 4).numpy() / 255 - MEAN) / STD).reshape(-1, 48)
    centered = np.concatenate([x, x.reshape(-1, 3, 4, 4)[..., ::-1].reshape(-1, 48)])
    centered = centered - centered.mean(0)
    root = scipy.linalg.sqrtm(np.linalg.inv(centered.T @ centered / len(centered)))
    whitened = augment.whiten(torch.tensor(x).float(), found, "float32")
    np.testing.assert_allclose(whitened, centered[:500] @ root, atol=1e-3)
    for components in (4, 12, 48):
        some = whitening(corners, torch.arange(500), components, 1e-4, back=True, info=info)
        pixels = augment.whiten(torch.tensor(x).float(), some, "float32")
        assert pixels.shape == (500, 48)
        assert pixels.var() == pytest.approx(1, abs=0.2), "as of a normalised image, whatever the number of components"


def test_the_bits_of_whitening_do_not_depend_on_threads_or_order(cifar10_slice):
    images, _ = cifar10_slice
    found, threads = [], torch.get_num_threads()
    for number, examples in ((1, torch.arange(1000)), (2, torch.arange(1000).flip(0))):
        _principal_components.cache_clear()
        torch.set_num_threads(number)
        try:
            found.append(checkpoint.digest(whitening(images, examples, 400, EPS)))
            assert torch.get_num_threads() == number
        finally:
            torch.set_num_threads(threads)
    assert found[0] == found[1]


# The components of all training images of `invented` and of those that are not for validation are computed once, and
# kept for the tests below.


def test_a_whitening_of_the_training_images_never_sees_the_others(invented):
    """Otherwise the mean of the network's input would be different."""
    cpu = torch.device("cpu")
    changed = invented._replace(train_images=invented.train_images.clone())
    chosen = Training(resolve({}), invented, cpu).splits["validation"][2]
    changed.train_images[chosen] = 0
    again = Training(resolve({"whiten": 20}), changed, cpu).whitening
    one, other = (Training(resolve({"whiten": 20, "train_on": on}), invented, cpu).whitening for on in ("train", "all"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["bias"], other["bias"])


def test_whitening_uses_the_precision_of_the_spec(invented):
    found = Training(resolve({"whiten": 30}), invented, torch.device("cpu")).whitening
    x = augment.normalise(invented.test_images)
    exact = x.double() @ found["weight"].double().t() + found["bias"].double()
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 0.05)):
        z = augment.whiten(x, found, precision)
        assert (z.dtype, z.shape) == (torch.float32, (100, 30))
        torch.testing.assert_close(z.double(), exact, rtol=0, atol=tolerance)
    assert (z - exact).abs().max() > 1e-4, "it was not bfloat16"


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "none", "widths": []}, {"ema": 0.9, "train_on": "all"}, {"locality": [3.0], "ema": 0.9}],
    ids=str,
)
def test_whitening_is_folded_into_the_checkpoint(invented, tmp_path, small_spec, changes):
    """The saved network takes images, as any other, and is equal to the one that was trained."""
    spec = small_spec(whiten=25, epochs=1, **changes)
    record = run_experiment("x", spec, tmp_path, invented, "cpu", compiled=False)
    path = tmp_path / "checkpoints" / "x" / f"{record.spec_id}.safetensors"
    found = predict.load(path)
    assert found.digest() == record.digest
    training = Training(spec, invented, torch.device("cpu"), Mode("eager"))
    for _ in fit([training]):
        pass
    assert record.whitening == checkpoint.digest(training.whitening)
    x = augment.normalise(invented.test_images)
    unfolded = augment.whiten(x, training.whitening, "float32")
    params, stats = step.trained(training.state)
    expected, _ = model.forward(model.enveloped(params, training.hyper.get("envelope", {})), stats, unfolded, spec)
    torch.testing.assert_close(found(invented.test_images), expected, rtol=0, atol=1e-4)
    module = predict.as_module(found.spec)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    torch.testing.assert_close(module.eval()(x), found(invented.test_images), rtol=1e-4, atol=1e-4)
    assert module[1].in_features == 3072


def test_a_record_of_a_run_without_whitening_has_no_digest_of_it(invented, tmp_path, small_spec):
    record = run_experiment("x", small_spec(epochs=1), tmp_path, invented, "cpu", compiled=False)
    assert not record.whitening
