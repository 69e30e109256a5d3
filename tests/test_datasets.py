"""Data sets other than CIFAR-10: what is read, what is refused, and all commands on each of them."""

import argparse
import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import main
from core import predict, run_experiment
from core.commands import options
from core.compile import fused
from core.data import cifar100, datasets, folder, loader, synthetic
from core.data.identity import data_identity
from core.data.tensors import Data, DataError
from core.functional import step
from core.report import plots
from core.runs.checkpoint import CheckpointError
from core.runs.record import decode, encode, read_record
from core.runs.run import Run
from core.spec import CIFAR10, DataInfo, SpecError, resolve, spec_id
from tests.conftest import ROOT
from tests.test_checkpoint import signed

TINY = {"widths": [8], "epochs": 1, "batch_size": 50, "norm": "none", "dropout": 0.0}
PER_CLASS = 51  # training images of the small CIFAR-100: one more than are held out


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def colours(count, classes, seed):
    """Images of one colour for each class, with a little noise."""
    random = np.random.RandomState(seed)
    labels = np.arange(count) % classes
    base = np.random.RandomState(7).randint(0, 200, (classes, 3, 1))
    images = (base[labels] + random.randint(0, 30, (count, 3, 1024))).astype(np.uint8)
    return images.reshape(count, 3072), labels


@pytest.fixture
def small_cifar100(monkeypatch, tmp_path):
    """Small files in the layout of the official archive, as the published ones: their folder, and the archive."""
    contents = {"meta": pickle.dumps({b"fine_label_names": [n.encode() for n in cifar100.INFO.classes]}, protocol=2)}
    for name, count in (("train", 100 * PER_CLASS), ("test", 200)):
        images, labels = colours(count, 100, len(name))
        coarse = [0] * count
        batch = {b"data": images, b"fine_labels": labels.tolist(), b"coarse_labels": coarse, b"filenames": [b"x"]}
        contents[name] = pickle.dumps(batch, protocol=2)
    where = tmp_path / "published"
    (where / "cifar-100-python").mkdir(parents=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as tar:
        for name, data in contents.items():
            (where / "cifar-100-python" / name).write_bytes(data)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive = tmp_path / "cifar-100-python.tar.gz"
    archive.write_bytes(packed.getvalue())
    files = {name: (md5(data), None) for name, data in contents.items()}
    data, dead = packed.getvalue(), "http://127.0.0.1:9/cifar-100-python.tar.gz"
    small = cifar100.ARCHIVE._replace(files=files, md5=md5(data), size=len(data), addresses=(dead,))
    monkeypatch.setattr(cifar100, "ARCHIVE", small)
    monkeypatch.setitem(datasets.REGISTRY, "cifar100", datasets.REGISTRY["cifar100"]._replace(archive=small))
    return where, archive


@pytest.fixture
def photos(tmp_path):
    """A folder of images of several sizes: 12 of each of three classes to train on, 4 to test with."""
    random = np.random.RandomState(1)
    for split, count in (("train", 12), ("test", 4)):
        for i, name in enumerate(("blue things", "red", "zebra")):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for n in range(count):
                pixels = random.randint(0, 80, (20 + n, 40 - n, 3)) + 60 * i
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{n}.png")
    return tmp_path / "photos"


# The registry


def test_an_entry_is_complete():
    for name, entry in datasets.REGISTRY.items():
        assert entry.name == name == resolve({"dataset": name})["dataset"]
        assert entry.train > entry.info.held_out * len(entry.info.classes)
        assert entry.archive is None or set(map(len, (md5 for md5, _ in entry.archive.files.values()))) == {32}
    assert datasets.REGISTRY["cifar10"].info == CIFAR10


def test_the_page_lists_every_entry():
    page = (ROOT / "docs" / "data.md").read_text()
    for name, entry in datasets.REGISTRY.items():
        numbers = f"{entry.train:,} to train, {entry.test:,} to test, {len(entry.info.classes)} classes"
        assert f"| `{name}` | {numbers}" in page


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-100", "unknown data set 'cifar-100'; did you mean 'cifar100'"),
        ("folder-0123456789ab", "dataset folder-0123456789ab is a folder of images: --data-folder says where it is"),
    ],
)
def test_an_unknown_data_set_is_refused(name, message, capsys, tmp_path):
    with pytest.raises(DataError, match=message):
        datasets.get(name)
    assert main.main(["run", "smoke", f"dataset={name}", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", "CIFAR10", "a b", "-x", 10, "x" * 41])
def test_a_word_that_cannot_be_a_name_is_refused(value):
    with pytest.raises(SpecError, match="expected the name of a data set"):
        resolve({"dataset": value})


def test_other_data_than_the_spec_names_is_refused(invented, tmp_path):
    for data, name in (
        (invented, "synthetic"),
        (synthetic.read(tmp_path), "cifar10"),
        (invented, "folder-123456789abc"),
    ):
        with pytest.raises(DataError, match="the spec asks for"):
            run_experiment("x", {**TINY, "dataset": name}, tmp_path, data, "cpu", compiled=False)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("cat",)}, "1 classes, expected from 2"),
        ({"classes": ("cat", "cat")}, "with different names"),
        ({"classes": ("cat", "d\x1bog")}, "a name of a class"),
        ({"classes": ("cat", "d\u202eog")}, "a name of a class"),
        ({"shape": (3, 0, 32)}, "the shape"),
        ({"mean": (0.5,)}, "of 3 channels"),
        ({"std": (0.0, 0.1, 0.1)}, "of 3 channels"),
        ({"std": (float("nan"), 0.1, 0.1)}, "of 3 channels"),
        ({"held_out": 0}, "0 are held out"),
    ],
)
def test_an_impossible_data_set_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataInfo(**changes)


def test_the_classes_and_the_format_are_part_of_a_compiled_step(small_spec, step_inputs):
    inputs = step_inputs(small_spec())
    infos = [
        CIFAR10,
        dataclasses.replace(CIFAR10, mean=(0.5, 0.5, 0.5)),
        dataclasses.replace(CIFAR10, classes=cifar100.INFO.classes),
    ]
    names = [fused._recipe(small_spec(), inputs, info).name for info in infos]
    names.append(fused._recipe(small_spec(dataset="cifar100"), inputs).name)
    assert len(set(names)) == 4
    assert fused._recipe(small_spec(), inputs).name == names[0]


# Synthetic


def test_the_synthetic_data_is_the_same_everywhere(tmp_path):
    data = synthetic.read(tmp_path)
    assert data_identity(data) == "tensors-1d855f423ae6a6df5661fb4b"
    assert torch.equal(torch.from_numpy(synthetic.test_images(tmp_path)), data.test_images)
    pixels = data.train_images.view(-1, 3, 1024).double() / 255
    assert torch.allclose(pixels.mean((0, 2)), torch.tensor(data.info.mean).double(), atol=0.01)
    assert torch.allclose(pixels.std((0, 2)), torch.tensor(data.info.std).double(), atol=0.01)


# CIFAR-100


def test_cifar100_is_what_torchvision_publishes():
    from torchvision.datasets import CIFAR100

    archive = cifar100.ARCHIVE
    published = dict([*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])])
    assert {name: md5 for name, (md5, _) in archive.files.items()} == published
    assert (archive.md5, archive.folder, archive.addresses) == (CIFAR100.tgz_md5, CIFAR100.base_folder, (CIFAR100.url,))
    assert len(cifar100.INFO.classes) == 100


def test_cifar100_is_read_from_a_folder_or_fetched(small_cifar100, tmp_path):
    where, archive = small_cifar100
    data = datasets.load("cifar100", where)
    assert data.train_labels.bincount().tolist() == [PER_CLASS] * 100
    assert data.test_images.shape == (200, 3072)
    fetched = datasets.load("cifar100", tmp_path / "elsewhere", archive.as_uri())
    assert data_identity(fetched) == data_identity(data)
    train, validation = loader.split(data.train_labels, data.info)
    assert data.train_labels[train].bincount().tolist() == [1] * 100
    assert data.train_labels[validation].bincount().tolist() == [50] * 100


def test_an_altered_file_of_cifar100_is_refused(small_cifar100, monkeypatch):
    path = small_cifar100[0] / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(pickle, "loads", None)
    with pytest.raises(DataError, match="test is altered"):
        cifar100.ARCHIVE.read(small_cifar100[0], "test")


def test_only_cifar10_goes_into_the_versioned_folder(tmp_path):
    assert datasets.home("cifar10", datasets.ROOT / "data") == datasets.ROOT / "data"
    assert datasets.home("cifar100", datasets.ROOT / "data") == datasets.ROOT / "datasets"
    assert datasets.home("cifar100", tmp_path) == tmp_path


# A folder of images


def test_a_folder_is_read_as_predict_reads_images(photos):
    from core import images

    data = folder.load(photos)
    assert data.info.classes == ("blue things", "red", "zebra")
    assert data.train_labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert data.test_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(data.test_images[4], images.read(photos / "test" / "red" / "0.png").flatten())
    pixels = data.train_images.view(36, 3, 1024).double() / 255
    assert torch.allclose(pixels.mean((0, 2)), torch.tensor(data.info.mean).double(), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2)), torch.tensor(data.info.std).double(), atol=1e-3)


def test_the_name_of_a_folder_is_its_content(photos):
    """Pixels, labels, names of classes and split count; names of files do not."""
    found = [folder.name_of(folder.load(photos))]
    first = photos / "train" / "red" / "0.png"
    first.rename(first.with_name("00.png"))
    assert folder.name_of(folder.load(photos)) == found[0]
    first.with_name("00.png").rename(photos / "train" / "zebra" / "00.png")  # a label
    found.append(folder.name_of(folder.load(photos)))
    for split in ("train", "test"):
        (photos / split / "zebra").rename(photos / split / "zebras")
    found.append(folder.name_of(folder.load(photos)))
    (photos / "test" / "red" / "0.png").rename(photos / "train" / "red" / "0.png")
    found.append(folder.name_of(folder.load(photos)))
    assert len(set(found)) == 4
    assert all(resolve({"dataset": name})["dataset"] == name for name in found)


def test_a_share_of_each_class_is_drawn_once_for_testing(photos):
    one, again = (folder.load(photos / "train", 0.25) for _ in range(2))
    assert one.test_labels.bincount().tolist() == [3, 3, 3]
    assert one.train_labels.bincount().tolist() == [9, 9, 9]
    assert folder.name_of(one) == folder.name_of(again) != folder.name_of(folder.load(photos / "train", 0.5))


def test_bad_images_are_named_before_the_training(photos, tmp_path, capsys):
    for i in range(12):
        (photos / "train" / "red" / f"bad-{i:02}.png").write_text("no image")
    (photos / "test" / "zebra" / "deeper").mkdir()
    status = main.main(["run", "smoke", "--data-folder", str(photos), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 2
    assert f"12 files in {photos} are no images, and nothing is trained:" in said
    assert "bad-09.png" in said
    assert "bad-10.png" not in said
    assert "and 2 more" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "share", "message"),
    [
        (lambda p: (p / "test").rename(p / "other"), None, "has the folder train alone"),
        (lambda p: None, 0.2, "--test-share is for a folder with CLASS/[*] alone"),
        (lambda p: (p / "train").rename(p / "a") and (p / "test").rename(p / "b"), None, "--test-share 0.2 takes"),
        (lambda p: (p / "train").rename(p / "a") and (p / "test").rename(p / "b"), 1.0, "--test-share 1, expected"),
        (lambda p: (p / "test" / "red").rename(p / "test" / "pink"), None, "the class pink is in one of"),
        (lambda p: (p / "train" / "empty").mkdir(), None, "there are no images in .*empty"),
        (lambda p: (p / "train" / "re\nd").mkdir() or (p / "train" / "re\nd" / "x").touch(), None, "is in one of"),
    ],
)
def test_another_layout_is_refused(photos, change, share, message):
    change(photos)
    with pytest.raises(DataError, match=message):
        folder.load(photos, share)


def test_a_class_that_cannot_be_printed_and_a_single_class_are_refused(photos):
    for split in ("train", "test"):
        (photos / split / "red").rename(photos / split / "r\x1bd")
    with pytest.raises(DataError, match="cannot be a data set: a name of a class"):
        folder.load(photos)
    (photos / "alone").mkdir()
    (photos / "train" / "zebra").rename(photos / "alone" / "zebra")
    with pytest.raises(DataError, match="cannot be a data set: 1 classes"):
        folder.load(photos / "alone", 0.5)


# What is kept of the classes


def test_the_classes_are_in_the_record_and_in_the_weights(tmp_path):
    data = synthetic.read(tmp_path)
    record = run_experiment("x", {**TINY, "dataset": "synthetic"}, tmp_path, data, "cpu", compiled=False)
    run = Run("x", record.spec, tmp_path)
    assert read_record(run.record).data_info == predict.load(run.weights).info == synthetic.INFO
    content = json.loads(run.record.read_bytes())
    del content["info"]
    with pytest.raises(ValueError, match="the classes are given or not, but the data set is synthetic"):
        decode(json.dumps(content).encode())
    net = predict.load(run.weights)
    signed({**net.params, **net.stats}, net.about, run.weights, meta={"info": {"classes": ["a", "b"]}})
    with pytest.raises(CheckpointError):
        predict.load(run.weights)


def test_files_of_cifar10_do_not_name_the_data_set(invented, tmp_path):
    record = run_experiment("x", TINY, tmp_path, invented, "cpu", compiled=False)
    run = Run("x", record.spec, tmp_path)
    assert b'"info"' not in encode(record)
    assert b'\\"info\\"' not in run.weights.read_bytes()
    assert predict.load(run.weights).info == CIFAR10
    old = json.loads(run.record.read_bytes())
    del old["spec"]["dataset"]  # a record from before there was such a key
    assert decode(json.dumps(old).encode()) == record
    assert spec_id(resolve(old["spec"])) == record.spec_id


# Images of another shape

GREY = DataInfo(classes=("low", "high"), shape=(1, 28, 20), mean=(0.5,), std=(0.3,), held_out=10)


@pytest.fixture
def grey(monkeypatch):
    """A data set of grey images, 28 x 20, as a newcomer would add one: an entry in the registry."""
    random = np.random.RandomState(0)
    labels = torch.arange(300) % 2
    images = torch.from_numpy(random.randint(0, 128, (300, 560)).astype(np.uint8)) + 120 * labels[:, None].byte()
    data = Data(images[:200], labels[:200], images[200:], labels[200:], GREY)
    entry = datasets.Dataset(
        "grey", "grey images", GREY, 200, 100, lambda where: data, lambda where: images[200:].numpy()
    )
    monkeypatch.setitem(datasets.REGISTRY, "grey", entry)
    return datasets.load("grey", "nowhere")


@pytest.mark.parametrize("changes", [{}, {"whiten": 16}, {"mixup": 0.2}], ids=str)
def test_an_entry_in_the_registry_is_all_that_a_data_set_needs(grey, tmp_path, changes):
    spec = {**TINY, "dataset": "grey", "epochs": 5, "batch_size": 20, "lr": 1e-2, **changes}
    record = run_experiment("x", spec, tmp_path, grey, "cpu", compiled=False)
    assert record.metrics.test.accuracy > 0.9
    assert len(record.answers.confusion) == 2
    net = predict.load(Run("x", record.spec, tmp_path).weights)
    assert net(grey.test_images.view(-1, 1, 28, 20)).shape == (100, 2)
    assert net.evaluate(grey.test_images, grey.test_labels)["accuracy"] == record.metrics.test.accuracy
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    from core import images

    assert predict.top_k(net, images.read(tmp_path / "white.png", GREY.shape))[0][0] == 1


def test_augmentation_of_another_shape_is_refused(grey, tmp_path):
    for changes, key in (({"augment": "flip"}, "augment"), ({"rotate": 5}, "rotate"), ({"cutout": 4}, "cutout")):
        spec = {**TINY, "dataset": "grey", "batch_size": 20, **changes}
        with pytest.raises(SpecError, match=f"{key} takes images of 3x32x32, those of grey have 1x28x20"):
            run_experiment("x", spec, tmp_path, grey, "cpu", compiled=False)
    with pytest.raises(DataError, match="whiten = 600, expected at most 560"):
        run_experiment("x", {**TINY, "dataset": "grey", "whiten": 600}, tmp_path, grey, "cpu", compiled=False)


def test_evaluation_counts_every_class():
    found = step.Answers(*(torch.tensor(v) for v in ([0, 2], [0.1, 0.2], [0, 1], [0.9, 0.8])), classes=3)
    assert step.summary(found)["count"] == [1, 0, 1]
    assert step.details(found)["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


# All commands


@pytest.fixture
def commands(monkeypatch, tmp_path, capsys):
    """Runs main.py in this process, without drawing pictures; returns the status and all output."""
    monkeypatch.setattr(plots, "draw", lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv):
        status = main.main([*map(str, argv), "--out", str(tmp_path / "out")])
        return status, "".join(capsys.readouterr())

    return run


CHANGES = ("widths=8", "epochs=2", "batch_size=9", "--no-compile")


def test_only_a_very_small_data_set_is_not_compiled():
    """Whatever other data sets are in the same call: the mode decides the bits of a run."""
    assert [name for name in (*datasets.REGISTRY, "folder-123456789abc") if not datasets.worth_compiling(name)] == [
        "synthetic"
    ]


def test_the_device_holds_one_data_set(invented):
    fresh = SimpleNamespace(load=lambda name: invented.map(torch.clone))
    load = options.data_on_device(argparse.Namespace(device="cpu"), fresh)
    first = weakref.ref(load("cifar10")[0].train_images)
    assert load("cifar10")[0].train_images is first()
    load("synthetic")
    assert first() is None


@pytest.mark.parametrize("kind", ["demo", "folder", "cifar100"])
def test_every_command(kind, commands, photos, small_cifar100, tmp_path):
    run, where, title, info = {
        "demo": (["demo"], [], "synthetic data", synthetic.INFO),
        "folder": (["smoke", *CHANGES], ["--data-folder", photos], "folder-", folder.load(photos).info),
        "cifar100": (
            ["smoke", "dataset=cifar100", *CHANGES],
            ["--data", small_cifar100[0]],
            "CIFAR-100",
            cifar100.INFO,
        ),
    }[kind]
    name, classes, pt2 = run[0], info.classes, tmp_path / "net.pt2"
    status, said = commands("run", *run, *where)
    assert status == 0, said
    assert ("The data is synthetic" in said) is (kind == "demo")
    status, said = commands("run", *run, *where)
    assert (status, "is finished" in said) == (0, True), said
    status, said = commands("evaluate", *where)
    assert (status, "as recorded" in said) == (0, True), said
    assert sum(f"{each} " in said for each in classes) >= min(20, len(classes)), said
    status, said = commands("predict", name, photos / "test" / "zebra" / "0.png")
    assert (status, f"only {len(classes)} classes" in said) == (0, True), said
    assert sum(each in said.split("0.png: ")[1] for each in classes) >= 3, said
    status, said = commands("export", name, "--format", "torch", "--output", pt2, *where[: 2 * (kind == "cifar100")])
    assert (status, f"float32 logits [n, {len(classes)}]" in said) == (0, True), said
    assert ("test images" in said) is (kind != "folder")
    status, said = commands("verify", *run, *where)
    assert (status, "the same bits" in said) == (0, True), said
    status, said = commands("report")
    assert status == 0, said
    report = (tmp_path / "out" / "results.md").read_text()
    assert f"The data set is {title}" in report
    assert "CIFAR-10:" not in report
    assert "Published results" not in report


def test_other_data_sets_are_in_no_table_of_cifar10(commands, invented, tmp_path):
    run_experiment("smoke", {**TINY, "seed": 3}, tmp_path / "out", invented, "cpu", compiled=False)
    assert commands("run", "demo")[0] == 0
    report = (tmp_path / "out" / "results.md").read_text()
    before, after = report.split("## Other data sets")
    assert "demo" not in before
    assert "### synthetic data" in after
    assert "| demo | 1 |" in after
    assert "smoke" in before
    metrics = json.loads((tmp_path / "out" / "checkpoints" / "metrics.json").read_text())
    assert list(metrics["test"]) == ["smoke"]


def test_one_call_trains_on_several_data_sets(commands, small_cifar100, tmp_path):
    status, said = commands("run", "smoke", "dataset=synthetic,cifar100", *CHANGES, "--data", small_cifar100[0])
    assert status == 0, said
    status, said = commands("evaluate", "--data", small_cifar100[0])
    assert (status, said.count("as recorded")) == (0, 2), said
    report = (tmp_path / "out" / "results.md").read_text()
    assert "The data set is" in report
    assert report.count("## Other data sets") == 1
    status, said = commands("evaluate", "--data", tmp_path / "nothing", "--data-url", "file:///nowhere")
    assert (status, said.count("as recorded"), "lacks the files of CIFAR-100" in said) == (2, 1, True), said


def test_an_option_without_effect_is_refused(commands, tmp_path):
    status, said = commands("run", "demo", "--test-share", 0.2)
    assert (status, "--test-share is for a folder of images" in said) == (2, True), said
    status, said = commands("run", "demo", "--data-folder", tmp_path / "nowhere")
    assert (status, "there is no folder" in said) == (2, True), said


def test_another_folder_than_that_of_the_network_is_named(commands, photos):
    assert commands("run", "smoke", *CHANGES, "--data-folder", photos)[0] == 0
    status, said = commands("evaluate", "smoke")
    assert (status, "--data-folder says where it is" in said) == (2, True), said
    status, said = commands("evaluate", "smoke", "--data-folder", photos / "train", "--test-share", 0.5)
    assert (status, "is another folder of images than" in said) == (2, True), said
