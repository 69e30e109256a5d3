"""The identity of the data: what a run was really given, and what is refused."""

import gc

import pytest
import torch

from core import run_experiment
from core.data import identity
from core.data.cifar10 import DIRECTORY_HASH
from core.data.identity import data_identity
from core.data.tensors import Data, DataError
from core.events import Stopped
from core.runs.record import read_record
from core.runs.resume import ResumeError
from core.runs.run import OtherData, Run
from core.verify import verify

TINY = {"widths": [8], "epochs": 2, "batch_size": 100}


def copy(data):
    return data.map(torch.clone)


def train(data, out, spec=TINY, **options):
    return run_experiment("x", spec, out, data, "cpu", compiled=False, **options)


def random_labels(data):
    labels = torch.randint(10, data.train_labels.shape, generator=torch.Generator().manual_seed(1))
    return data._replace(train_labels=labels)


def test_the_published_data_has_its_name_whether_it_was_just_read_or_copied(cifar10):
    assert data_identity(cifar10) == DIRECTORY_HASH
    assert data_identity(copy(cifar10)) == DIRECTORY_HASH
    assert data_identity(cifar10.map(lambda t: torch.from_numpy(t.numpy()))) == DIRECTORY_HASH


def test_everything_in_the_tensors_counts(invented):
    """Every image and label, the order, the split and the number."""
    found = [data_identity(invented)]
    for field in invented.tensors:
        last, first = copy(invented), copy(invented)
        getattr(last, field).view(-1)[-1] ^= 1
        getattr(first, field).view(-1)[3] ^= 1
        found += [data_identity(last), data_identity(first)]
    found.append(data_identity(invented.map(lambda t: t[:-10])))
    found.append(data_identity(invented.map(lambda t: t.flip(0))))
    found.append(data_identity(Data(*invented[2:4], *invented[:2])))
    assert len(set(found)) == len(found) == 12
    assert all(len(name) == 32 and name.startswith("tensors-") for name in found)
    assert data_identity(copy(invented)) == found[0]
    columns = invented._replace(train_images=invented.train_images.t().contiguous().t())
    assert data_identity(columns) == found[0]  # the same images, laid out in another way


def test_the_bytes_are_hashed_once_until_they_change(invented, monkeypatch):
    hashed = []
    hash_data = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda data, every=1: hashed.append(every) or hash_data(data, every))
    data = copy(invented)
    names = [data_identity(data), data_identity(Data(*data))]
    assert hashed.count(1) == 1
    data.train_images[77, 5] ^= 1  # torch says that it has written there
    names.append(data_identity(data))
    data.train_labels.numpy()[77] ^= 1  # NumPy says nothing
    names.append(data_identity(data))
    data.test_images.numpy()[:, :1024] = 0
    names.append(data_identity(data))
    assert hashed.count(1) == 4
    assert len(set(names)) == 4


def test_the_tensors_are_not_kept_alive(invented):
    data_identity(copy(invented))
    gc.collect()
    known = data_identity(invented) and len(identity._known)
    data_identity(copy(invented))
    assert len(identity._known) <= known + 1


def test_the_record_names_the_data_that_the_run_had(invented, tmp_path):
    for i, data in enumerate((invented, random_labels(invented))):
        record = train(data, tmp_path / str(i))
        assert record.data == data_identity(data) != DIRECTORY_HASH
        assert read_record(Run("x", record.spec, tmp_path / str(i)).record).data == record.data


def test_a_result_of_other_data_is_neither_used_nor_replaced(invented, tmp_path):
    record = train(invented, tmp_path)
    path = Run("x", record.spec, tmp_path).record
    before = path.read_bytes()
    other = random_labels(invented)
    with pytest.raises(OtherData, match=rf"of other data \({record.data}, now {data_identity(other)}\): .*--force"):
        train(other, tmp_path)
    assert path.read_bytes() == before
    assert train(copy(invented), tmp_path) == record  # the same data, in other tensors
    with pytest.raises(OtherData):
        verify(Run("x", TINY, tmp_path), other, "cpu", compiled=False)
    assert verify(Run("x", TINY, tmp_path), invented, "cpu", compiled=False).same
    again = train(other, tmp_path, force=True)
    assert read_record(path) == again
    assert again.data == data_identity(other)


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_never_goes_on_with_other_data(invented, tmp_path, exact):
    steps = iter(range(100))
    assert isinstance(train(invented, tmp_path, should_stop=lambda: next(steps) > 15), Stopped)
    assert Run("x", TINY, tmp_path).resume_points()
    with pytest.raises(ResumeError, match=r"was made with other data \(tensors-.*--force starts anew"):
        train(random_labels(invented), tmp_path, exact=exact)
    assert train(invented, tmp_path).exact


def replaced(**tensors):
    return lambda data: data._replace(**{name: change(getattr(data, name)) for name, change in tensors.items()})


REFUSED = {
    "images of another shape": (replaced(test_images=lambda t: t.view(-1, 3, 32, 32)), r"test_images is torch\.uint8 "),
    "floats": (replaced(train_images=lambda t: t / 255), r"train_images is torch\.float32 \[6000, 3072\], expected"),
    "int32 labels": (replaced(train_labels=lambda t: t.int()), r"train_labels is torch\.int32 \[6000\], expected"),
    "labels in columns": (replaced(test_labels=lambda t: t[:, None]), r"test_labels is torch\.int64 \[100, 1\]"),
    "arrays": (lambda data: data.map(lambda t: t.numpy()), "train_images is of the type ndarray, expected a"),
    "labels from 1": (replaced(train_labels=lambda t: t + 1), "train_labels are from 1 to 10, expected from 0 to 9"),
    "a negative label": (replaced(test_labels=lambda t: t - 1), "test_labels are from -1 to 8"),
    "no test": (
        lambda data: data._replace(test_images=data.test_images[:0], test_labels=data.test_labels[:0]),
        "least",
    ),
    "a label short": (replaced(train_labels=lambda t: t[1:]), "6,000 train_images and 5,999 train_labels"),
    "too few to validate": (
        replaced(train_images=lambda t: t[:4000], train_labels=lambda t: t[:4000]),
        "the smallest class has 400 training images, expected more than 500",
    ),
    "too few for a step": (
        replaced(train_images=lambda t: t[:5050], train_labels=lambda t: t[:5050]),
        "there are 50 images to train on, expected at least batch_size = 100",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_unusable_data_is_refused_in_a_sentence(invented, tmp_path, change, message):
    with pytest.raises(DataError, match=message) as refused:
        train(change(invented), tmp_path)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("*"))


def test_a_class_may_be_absent_and_the_memory_layout_may_differ(invented, tmp_path):
    two = invented.train_labels < 2
    data = invented._replace(train_images=invented.train_images[two], train_labels=invented.train_labels[two])
    record = train(data, tmp_path)
    assert (record.metrics.train.n, record.metrics.validation.n) == (200, 1000)
    columns = data._replace(train_images=data.train_images.t().contiguous().t())
    assert train(columns, tmp_path / "columns").digest == record.digest
    alone = data._replace(train_images=data.train_images[:150], train_labels=data.train_labels[:150])
    assert train(alone, tmp_path / "all", {**TINY, "train_on": "all"}).metrics.train.n == 150
