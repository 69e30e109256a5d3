"""The split, the order of an epoch, normalisation and augmentation."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import affine

from core.data import loader
from core.functional import augment, prng
from core.functional.step import hyper_tensors
from core.spec import CIFAR10, resolve
from tests.test_prng import chi_square, within_chance


@pytest.fixture(scope="module")
def labels():
    """50,000 labels in no order, every class 5,000 times, as in CIFAR-10."""
    generator = torch.Generator().manual_seed(1)
    return (torch.arange(50_000) % 10)[torch.randperm(50_000, generator=generator)]


def test_split_is_disjoint_complete_and_stratified(labels):
    train, validation = loader.split(labels)
    assert (len(train), len(validation)) == (45_000, 5_000)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(50_000))
    assert labels[train].bincount().tolist() == [4500] * 10
    assert labels[validation].bincount().tolist() == [500] * 10


def test_split_is_fixed(labels):
    first = loader.split(labels)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = loader.split(labels)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_split_takes_validation_from_everywhere(labels):
    """Not the first 500 of a class: the files of CIFAR-10 need not be alike."""
    _, validation = loader.split(labels)
    quarters = (validation // 12_500).bincount(minlength=4)
    assert (quarters > 1000).all()


def test_split_of_the_real_labels(cifar10):
    train, validation = loader.split(cifar10.train_labels)
    assert cifar10.train_labels[train].bincount().tolist() == [4500] * 10
    assert cifar10.train_labels[validation].bincount().tolist() == [500] * 10


@pytest.mark.parametrize("batch_size", [2, 7, 64, 1000])
def test_epoch_order_is_a_permutation_without_its_tail(batch_size):
    examples = torch.arange(1000) * 3
    order = loader.epoch_order(examples, batch_size, seed=0, epoch=0)
    assert order.shape == (1000 // batch_size, batch_size)
    flat = order.flatten()
    assert len(flat.unique()) == len(flat)
    assert torch.isin(flat, examples).all()


def test_epoch_order_is_a_function_of_seed_and_epoch():
    examples = torch.arange(1000)
    orders = {(s, e): loader.epoch_order(examples, 100, s, e).flatten() for s in range(4) for e in range(4)}
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert all(torch.equal(loader.epoch_order(examples, 100, *key).flatten(), o) for key, o in orders.items())
    assert torch.equal(torch.get_rng_state(), before)
    # (1, 0) and (0, 1) too: the sum of seed and epoch would not do.
    assert len({tuple(order.tolist()) for order in orders.values()}) == len(orders)
    places = torch.stack([order.argsort() for order in orders.values()]).double()
    off_diagonal = torch.corrcoef(places) - torch.eye(len(orders))
    assert off_diagonal.abs().max() < 6 / 1000**0.5


def test_every_example_is_left_out_by_some_epoch_only():
    seen = [set(loader.epoch_order(torch.arange(10), 4, 0, epoch).flatten().tolist()) for epoch in range(20)]
    assert all(len(s) == 8 for s in seen)
    assert set.union(*seen) == set(range(10))


def test_normalise_against_a_naive_computation(invented):
    images = invented.train_images[:5]
    planes = images.view(5, 3, 32, 32).numpy().astype(np.float64) / 255
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = (planes - mean[:, None, None]) / std[:, None, None]
    found = augment.normalise(images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.view(5, 3, 32, 32).numpy(), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(augment.normalise(images.view(5, 3, 32, 32)), found.view(5, 3, 32, 32))


def test_normalise_constants_are_the_statistics_of_the_training_images(cifar10):
    values = np.arange(256) / 255
    for channel in range(3):
        counts = np.zeros(256, dtype=np.int64)
        for part in cifar10.train_images.view(-1, 3, 1024)[:, channel].split(10_000):
            counts += np.bincount(part.flatten().numpy(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        std = ((counts * (values - mean) ** 2).sum() / counts.sum()) ** 0.5
        assert abs(mean - CIFAR10.mean[channel]) < 1e-4
        assert abs(std - CIFAR10.std[channel]) < 1e-4


def augmented(images, seed=0, step=0, **changes):
    """What a train step makes of uint8 images [batch, 3072]: float32 [batch, 3, 32, 32]."""
    spec = resolve({"seed": seed, **changes})
    hyper = hyper_tensors(spec, 10)
    return augment.augment(images, spec, hyper, torch.tensor(step, dtype=torch.int32)).view(-1, 3, 32, 32)


def draws_of(stream, seed, step, each, batch):
    """The draws of a step as NumPy reads them, int32 [each, batch]."""
    scalars = torch.tensor([seed, step], dtype=torch.int32)
    return prng.bits(scalars[0], stream, scalars[1], each * batch).view(each, batch).numpy()


def naive_augment(image, draws, shift, mode):
    """One image [3, 32, 32] as a reader would move and mirror it."""
    if shift:
        down, right = (((int(d) >> 16) + 32768) * (2 * shift + 1) // 65536 for d in draws[1:])
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode)
        image = padded[:, down : down + 32, right : right + 32]
    return image[:, :, ::-1] if draws[0] >= 0 else image


@pytest.mark.parametrize(("fill", "mode"), [("zeros", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 8])
def test_augment_against_a_loop_over_images(invented, shift, fill, mode):
    """To the bit; without a shift it is "flip"."""
    images, n = invented.train_images[:133], 133
    before = images.clone()
    draws = draws_of(prng.AUGMENT, 3, 17, 3, n)
    x = augment.normalise(images).view(n, 3, 32, 32).numpy()
    expected = np.stack([naive_augment(image, draws[:, i], shift, mode) for i, image in enumerate(x)])
    kind = {"augment": "flip+shift", "shift": shift, "shift_fill": fill} if shift else {"augment": "flip"}
    found = augmented(images, 3, 17, **kind).numpy()
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))
    assert torch.equal(images, before)


@pytest.mark.parametrize("shift", [2, 8])
def test_augment_reaches_every_mirror_and_move_about_equally(shift):
    """Two bright pixels near the middle show how each image was changed."""
    n, moves = 20_000, 2 * shift + 1
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 15], images[:, :, 16, 17] = 255, 200
    x = augmented(images.view(n, -1), augment="flip+shift", shift=shift)[:, 0]
    place = x.flatten(1).argmax(1)
    row, column = place // 32, place % 32
    mirrored = x[torch.arange(n), row, column - 2] > 1
    assert abs(mirrored.double().mean() - 0.5) < 6 * 0.5 / n**0.5
    down, right = row - 16 + shift, torch.where(mirrored, 31 - column, column) - 15 + shift
    assert within_chance(chi_square(down * moves + right, moves**2), moves**2 - 1)


def test_augment_changes_with_seed_and_step(invented):
    def draw(seed, step):
        return augmented(invented.train_images[:64], seed, step, augment="flip+shift")

    assert torch.equal(draw(0, 0), draw(0, 0))
    assert not torch.equal(draw(0, 0), draw(0, 1))
    assert not torch.equal(draw(0, 0), draw(1, 0))


@pytest.mark.parametrize("side", [1, 2, 7, 16, 32])
@pytest.mark.parametrize("kind", ["none", "flip", "flip+shift"])
def test_cutout_against_a_loop_over_images(invented, side, kind):
    """To the bit: zeros in the square, and elsewhere what there is without it."""
    images, n = invented.train_images[:65], 65
    expected = augmented(images, 3, 17, augment=kind)
    (draws,) = draws_of(prng.CUTOUT, 3, 17, 1, n)
    for i, draw in enumerate(draws):
        top, left = ((int(draw) >> bits) % 32 - side // 2 for bits in (0, 5))
        expected[i, :, max(top, 0) : top + side, max(left, 0) : left + side] = 0
    assert torch.equal(augmented(images, 3, 17, augment=kind, cutout=side), expected)


def test_cutout_is_centred_on_every_pixel_equally_often():
    n = 50_000
    x = augmented(torch.full((n, 3072), 255, dtype=torch.uint8), cutout=1)[:, 0].flatten(1)
    assert ((x == 0).sum(1) == 1).all()
    assert within_chance(chi_square((x == 0).int().argmax(1), 1024), 1023)


def angle_and_scale(seed, step, n, rotate, zoom):
    """In degrees, as NumPy makes them of the draws, float64 [n]."""
    draws = draws_of(prng.AFFINE, seed, step, 2, n) / 2.0**31
    return rotate * draws[0], 1 + zoom * draws[1]


AFFINE = [{"rotate": 30}, {"zoom": 0.3}, {"rotate": 179, "zoom": 0.9}, {"rotate": 10, "zoom": 0.1, "shift": 8}]


@pytest.mark.parametrize("changes", AFFINE, ids=str)
@pytest.mark.parametrize("kind", ["none", "flip", "flip+shift"])
def test_rotate_and_zoom_against_torchvision(invented, changes, kind):
    """Pixels from outside the image are zero."""
    images, n = invented.train_images[:40], 40
    spec = resolve({**changes, "augment": kind})
    angles, scales = angle_and_scale(3, 17, n, spec["rotate"], spec["zoom"])
    draws, limit = draws_of(prng.AUGMENT, 3, 17, 3, n), spec["shift"] if kind == "flip+shift" else 0
    moves = ((draws[1:] >> 16) + 32768) * (2 * limit + 1) // 65536 - limit
    expected = []
    for i, x in enumerate(augment.normalise(images).view(n, 3, 32, 32)):
        down, right = moves[:, i].tolist()
        x = affine(
            x, angles[i], [-right, -down], scales[i], [0.0, 0.0], InterpolationMode.BILINEAR, center=[16.0, 16.0]
        )
        expected.append(x.flip(2) if kind != "none" and draws[0, i] >= 0 else x)
    found = augmented(images, 3, 17, **changes, augment=kind)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("changes", AFFINE, ids=str)
def test_rotate_and_zoom_against_scipy_with_reflection(invented, changes):
    images, n = invented.train_images[:40], 40
    spec = resolve({**changes, "shift_fill": "reflect"})
    angles, scales = angle_and_scale(3, 17, n, spec["rotate"], spec["zoom"])
    x = augment.normalise(images).view(n, 3, 32, 32).double().numpy()
    expected, place = np.empty_like(x), np.arange(32) - 15.5
    for i, (angle, scale) in enumerate(zip(np.radians(angles), scales, strict=True)):
        row, column = place[:, None] + 0 * place, place + 0 * place[:, None]
        turned = (np.cos(angle) * row - np.sin(angle) * column, np.sin(angle) * row + np.cos(angle) * column)
        for c in range(3):
            at = [15.5 + t / scale for t in turned]
            expected[i, c] = scipy.ndimage.map_coordinates(x[i, c], at, order=1, mode="mirror")
    found = augmented(images, 3, 17, **changes, augment="none", shift_fill="reflect")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=2e-4)


def test_rotate_and_zoom_by_nothing_only_move_and_mirror(invented):
    """Both ways of moving and mirroring agree, up to the rounding of the places to read from."""
    images = invented.train_images[:65]
    for fill in ("zeros", "reflect"):
        spec = {"augment": "flip+shift", "shift": 8, "shift_fill": fill}
        found, expected = augmented(images, 1, 2, **spec, rotate=1e-30), augmented(images, 1, 2, **spec)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_mixup_against_a_loop_over_examples(invented):
    x, labels = augment.normalise(invented.train_images[:33]), invented.train_labels[:33]
    quantiles, scalars = torch.tensor(prng.beta_quantiles(0.4)), torch.tensor([3, 17], dtype=torch.int32)
    share = prng.inverse_transform(prng.bits(scalars[0], prng.MIXUP, scalars[1], 33), quantiles)
    mixed, shares = augment.mixup(x, labels, quantiles, *scalars)
    for i in range(33):
        torch.testing.assert_close(mixed[i], share[i] * x[i] + (1 - share[i]) * x[i - 1])
        expected = torch.zeros(10)
        expected[labels[i]] += share[i]
        expected[labels[i - 1]] += 1 - share[i]
        torch.testing.assert_close(shares[i], expected)
    assert 0.05 < share.std() < 0.5
