"""A trained network from its checkpoint: in our code, and in plain PyTorch."""

import pytest
import safetensors.torch
import torch
from msgspec.structs import replace

from core import predict, run_experiment
from core.data.identity import data_identity
from core.functional import model, step
from core.predict import InputError
from core.runs import checkpoint
from core.runs.checkpoint import CheckpointError
from core.runs.record import Flipped, Metrics, Weights, write_record
from core.runs.run import Run
from core.spec import spec_id
from core.store import StoreError
from tests.test_checkpoint import signed
from tests.test_report import make


def metadata(spec, weights, test, data):
    return Weights(
        name="x",
        spec=spec,
        spec_id=spec_id(spec),
        data=data_identity(data),
        environment=make("x").environment,
        seed=spec["seed"],
        digest=checkpoint.digest(weights),
        test=test,
    )


def write_checkpoint(path, spec, data):
    """Write a checkpoint as a run leaves it, a whitening folded into it, with statistics that no initialisation has;
    returns its tensors."""
    network = model.folded(spec)
    params, stats = model.init(network, spec["seed"])
    generator = torch.Generator().manual_seed(1)
    stats = {
        name: s + torch.rand(s.shape, generator=generator) if s.is_floating_point() else s + 2
        for name, s in stats.items()
    }
    test = Metrics(**step.evaluate(params, stats, data.test_images, data.test_labels, network))
    weights = {**params, **stats}
    checkpoint.save(path, weights, metadata(spec, weights, test, data))
    return params, stats


@pytest.fixture
def saved(request, tmp_path, small_spec, invented):
    """Such a checkpoint; `param` changes the network."""
    spec = small_spec(seed=3, **getattr(request, "param", {}))
    path = Run("x", spec, tmp_path).weights
    path.parent.mkdir(parents=True)
    return path, spec, *write_checkpoint(path, spec, invented)


def test_load_returns_the_network_that_was_saved(saved):
    path, spec, params, stats = saved
    for where in (path, str(path)):
        net = predict.load(where)
        assert net.spec == spec
        assert (net.about.name, net.about.seed) == ("x", 3)
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


@pytest.mark.parametrize(
    "saved", [{}, {"norm": "layer"}, {"norm": "layer", "expansion": 4}, {"expansion": 2}], indirect=True, ids=str
)
def test_plain_pytorch_reads_the_same_file(saved, invented):
    """As docs/python.md shows it: safetensors, nn.Sequential, the channels' mean and deviation."""
    path, spec, *_ = saved
    module = predict.as_module(spec)
    module.load_state_dict(safetensors.torch.load_file(path), strict=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    x = (invented.test_images.view(-1, 3, 32, 32) / 255 - mean) / std
    torch.testing.assert_close(predict.load(path)(invented.test_images), module.eval()(x), rtol=1e-4, atol=1e-5)


def test_evaluate_is_the_evaluation_of_the_run(saved, invented):
    path, spec, params, stats = saved
    expected = step.evaluate(params, stats, invented.test_images, invented.test_labels, spec)
    assert predict.load(path).evaluate(invented.test_images, invented.test_labels) == expected


# What it is called with


def test_images_are_tensors_or_arrays_in_either_shape(saved, invented):
    network = predict.load(saved[0])
    images, labels = invented.test_images, invented.test_labels
    expected, evaluated = network(images), network.evaluate(images, labels)
    pictures = images.view(-1, 3, 32, 32)
    frozen = pictures.numpy().copy()
    frozen.flags.writeable = False
    for same in (pictures, images.numpy(), frozen, pictures.numpy()[::-1].copy()[::-1]):
        assert torch.equal(network(same), expected)
        assert network.evaluate(same, labels.numpy()) == evaluated
    assert network(images[:0]).shape == (0, 10)
    assert predict.top_k(network, pictures[0].numpy()) == predict.top_k(network, pictures[0])


def test_a_network_can_be_compiled_and_differentiated(saved, invented):
    network = predict.load(saved[0])
    images = invented.test_images[:3]
    traced = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(traced(images), network(images))

    def loss(params):
        return network._replace(params=params)(images).sum()

    assert torch.func.grad(loss)(network.params).keys() == network.params.keys()


WRONG_IMAGES = {
    "floats in 0..1": (
        lambda t: t / 255,
        r"the images are torch\.float32 \[100, 3, 32, 32\], expected uint8 \[n, 3, 32",
    ),
    "integers": (lambda t: t.long(), r"torch\.int64"),
    "channels last": (lambda t: t.permute(0, 2, 3, 1), r"torch\.uint8 \[100, 32, 32, 3\]"),
    "one image": (lambda t: t[0], r"\[3, 32, 32\]"),
    "one flat image": (lambda t: t[0].flatten(), r"\[3072\]"),
    "half of it": (lambda t: t.flatten(1)[:, :1536], r"\[100, 1536\]"),
    "an array of floats": (lambda t: t.numpy() / 255, r"torch\.float64"),
    "an array of text": (lambda t: t.numpy().astype(str), "an array of <U3"),
    "a list": (lambda t: t.tolist(), "the images are of the type list"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_invalid_images_are_refused_in_a_sentence(saved, invented, change, message):
    network, images = predict.load(saved[0]), invented.test_images.view(-1, 3, 32, 32)
    for call in (network, lambda wrong: network.evaluate(wrong, invented.test_labels)):
        with pytest.raises(InputError, match=message) as refused:
            call(change(images))
        assert isinstance(refused.value, ValueError)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.int(), r"the labels are torch\.int32 \[100\], expected int64 \[100\]"),
        (lambda t: t[1:], r"the labels are torch\.int64 \[99\], expected int64 \[100\]"),
        (lambda t: t + 1, "the labels are from 1 to 10, expected 0 to 9"),
        (lambda t: t.tolist(), "the labels are of the type list"),
    ],
)
def test_invalid_labels_are_refused_in_a_sentence(saved, invented, change, message):
    with pytest.raises(InputError, match=message):
        predict.load(saved[0]).evaluate(invented.test_images, change(invented.test_labels))
    with pytest.raises(InputError, match="there are no images"):
        predict.load(saved[0]).evaluate(invented.test_images[:0], invented.test_labels[:0])


def test_an_unknown_test_time_augmentation_is_refused_in_a_sentence(saved, invented):
    with pytest.raises(InputError, match="tta = 'shift', expected none, flip, shifts"):
        predict.load(saved[0]).evaluate(invented.test_images, invented.test_labels, tta="shift")


# Beside what the run recorded


def evaluate(path, invented):
    return predict.evaluate(path, predict.load(path), invented)


def record_beside(path, **changes):
    """The record of the run that wrote a checkpoint, with changes to its test metrics and its digest."""
    about = predict.load(path).about
    record = replace(make("x", **about.spec), data=about.data)
    test = replace(about.test, **{key: changes.pop(key) for key in ("loss", "accuracy", "correct") if key in changes})
    digest = changes.get("digest", about.digest)
    metrics = replace(record.metrics, test=test)
    changes |= {"metrics": metrics, "digest": digest}
    write_record(path.with_suffix(".json"), replace(record, **changes))


def test_a_checkpoint_without_a_record_is_compared_with_its_metadata(saved, invented):
    path, *_ = saved
    found = evaluate(path, invented)
    assert found.same
    assert found.recorded == predict.load(path).about.test
    assert found.digest == predict.load(path).digest()


def test_a_checkpoint_is_compared_with_the_record_beside_it(saved, invented):
    """On another machine the loss may differ in its last digits."""
    path, *_ = saved
    test = predict.load(path).about.test
    record_beside(path, loss=test.loss + 5e-5)
    found = evaluate(path, invented)
    assert found.same
    assert found.recorded.loss == test.loss + 5e-5


@pytest.mark.parametrize("tta", ["flip", "shifts"])
def test_tta_is_compared_with_the_same_tta(saved, invented, tta):
    path, spec, params, stats = saved
    images, labels = invented.test_images, invented.test_labels
    alone = predict.evaluate(path, predict.load(path), invented, tta)
    assert (alone.recorded, alone.same, alone.tta) == (None, True, tta)
    expected = Metrics(**step.evaluate(params, stats, images, labels, spec, tta=tta))
    for loss, same in ((expected.loss, True), (expected.loss + 1, False)):
        test = replace(expected, loss=loss)
        record_beside(path, **({"flipped": Flipped(None, test)} if tta == "flip" else {"shifted": test}))
        result = predict.evaluate(path, predict.load(path), invented, tta)
        assert (result.recorded.loss, result.same) == (loss, same)
    assert result.result["correct"] == expected.correct
    assert evaluate(path, invented).same


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({"augment": "flip+shift", "train_on": "all"}, True),
        ({"train_on": "all"}, False),
        ({"augment": "flip+shift"}, False),
    ],
    ids=str,
)
def test_a_run_on_all_images_with_shifts_records_shifts_tta(invented, tmp_path, small_spec, changes, has):
    record = run_experiment("x", small_spec(epochs=1, **changes), tmp_path, invented, "cpu", compiled=False)
    assert bool(record.shifted) == has
    path = tmp_path / "checkpoints" / "x" / f"{record.spec_id}.safetensors"
    found = predict.evaluate(path, predict.load(path), invented, "shifts")
    assert found.same
    assert (found.recorded is not None) == has


def test_numbers_of_other_data_are_not_compared(saved, invented):
    path, *_ = saved
    other = invented._replace(test_labels=invented.test_labels.flip(0))
    for alone in (True, False):
        found = evaluate(path, other)
        assert (found.recorded, found.other_data, found.same) == (None, data_identity(invented), True), alone
        assert evaluate(path, invented).other_data is None
        record_beside(path)
    record_beside(path, digest="0" * 64)
    assert not evaluate(path, other).same


def test_a_checkpoint_that_differs_from_its_record(saved, invented):
    path, *_ = saved
    test = predict.load(path).about.test
    swapped = [test.correct[1], test.correct[0], *test.correct[2:]]
    assert swapped != test.correct
    for changes in ({"loss": test.loss + 2e-4}, {"correct": swapped}, {"digest": "0" * 64}):
        record_beside(path, **changes)
        assert not evaluate(path, invented).same, changes


def test_a_damaged_record_beside_a_checkpoint_is_named(saved, invented):
    path, *_ = saved
    path.with_suffix(".json").write_text("{")
    with pytest.raises(StoreError, match=r"\.json is not a record that this version of the program can read"):
        evaluate(path, invented)


# Refused


@pytest.mark.parametrize(
    "changes",
    [{"widths": [32, 15]}, {"widths": [32]}, {"norm": "none"}, {"norm": "layer"}, {"dropout": 0.0}, {"expansion": 1}],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(saved, small_spec, invented, changes):
    """The spec in the file and the tensors in the file disagree."""
    path, _, params, stats = saved
    about = predict.load(path).about
    other = metadata(small_spec(**changes), {**params, **stats}, about.test, invented)
    checkpoint.save(path, {**params, **stats}, other)
    with pytest.raises(
        CheckpointError,
        match=r"^[^\n]*\.safetensors is damaged or not a checkpoint[^\n]*: tensor '[^\n]*, expected [^\n]*$",
    ):
        predict.load(path)


@pytest.mark.parametrize(
    "meta",
    [
        *(
            {"spec": spec}
            for spec in (None, {"width": [1]}, {"widths": [0]}, {"seed": 3}, {"seed": 3, "widths": []}, "x")
        ),
        {"digest": "x"},
        {"digest": "\x1b" * 64},
        {"test": {}},
        {"test": {"accuracy": 0.5, "loss": 1.0, "n": 100, "correct": [1] * 10, "count": [10] * 10}},
    ],
    ids=str,
)
def test_metadata_that_is_not_of_these_weights_is_refused(saved, meta):
    path, _, params, stats = saved
    about = predict.load(path).about
    signed({**params, **stats}, about, path, meta=meta)
    with pytest.raises(CheckpointError, match=r"^[^\n\x1b]*\.safetensors is (damaged or not )?a checkpoint[^\n\x1b]*$"):
        predict.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot read [^\n]*gone\.safetensors: No such file or directory$"):
        predict.load(tmp_path / "gone.safetensors")
