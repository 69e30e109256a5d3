"""What several test files need: real and invented data, resolved specs, the same network as torch.nn.Sequential."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from core import plan, train
from core.data import cifar10 as dataset
from core.data.whitening import whitening
from core.functional import augment, step
from core.functional.tree import tree_map
from core.predict import as_module
from core.spec import Spec, resolve
from experiments import SUITES
from tests.fork_server import TRAIN_IMAGES, VALIDATION_IMAGES

ROOT = Path(__file__).resolve().parent.parent
REMOTE = ROOT.parent / "shared" / "dvc-remote"
EXPERIMENTS = plan.experiments(SUITES)

# A run of Muon, clipped, in bfloat16 and with layer norm, which reduces along the other axis than batch norm: one
# compilation serves all tests that use it. With a batch of this size the first product is computed transposed
# (core/compile/inductor.py).
MUON = {
    "widths": [256, 128],
    "norm": "layer",
    "activation": "gelu",
    "batch_size": 500,
    "optimizer": "muon",
    "schedule": "one-cycle",
    "clip": 1.0,
    "precision": "bfloat16",
}

# The same examples every time: a failure in CI is a failure at home.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


# g++, but all steps of a session share a precompiled header, which takes 8 s. The header is the last argument.
COMPILER = """#!/bin/sh
case "$*" in
*.h.gch)
    for header in "$@"; do :; done
    shared="{folder}/$(echo "$*" | sed "s#$(dirname "$header")##g" | cksum | tr ' ' -)"
    [ -e "$shared" ] || {{ {compiler} "$@" && mv "$header" "$shared.$$" && mv "$shared.$$" "$shared"; }} || exit 1
    ln -s "$shared" "$header" ;;
*) exec {compiler} "$@" ;;
esac
"""


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of two workers on two cores. Benchmarks, with which this file is read too, take all cores."""
    if config.option.benchmark_only:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)
    compiler = shutil.which("g++")
    if sys.platform == "linux" and compiler and "CXX" not in os.environ:  # xdist's workers find it set
        folder = tempfile.TemporaryDirectory(prefix="compiler-")
        config.add_cleanup(folder.cleanup)
        script = Path(folder.name, "g++")
        script.write_text(COMPILER.format(folder=folder.name, compiler=compiler))
        script.chmod(0o755)
        os.environ["CXX"] = str(script)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


class Events(list):
    """A listener that keeps the events of all runs."""

    def __call__(self, run: Any, event: Any) -> None:
        self.append(event)

    def kinds(self) -> list[str]:
        """The names of their types, without the steps."""
        return [name for event in self if (name := type(event).__name__) != "StepDone"]

    def of(self, kind: type) -> list[Any]:
        return [event for event in self if isinstance(event, kind)]


def lacking(what: str) -> None:
    """Skip the test and say what is missing. In CI, where everything must be installed, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; with CI set this is a failure")
    pytest.skip(what)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10: data/, or one made of links into the DVC remote beside the project."""
    if not dataset.ARCHIVE.missing(ROOT / "data"):
        return ROOT / "data"
    if not REMOTE.exists():
        lacking(f"CIFAR-10 is neither in {ROOT / 'data'} nor in {REMOTE}: run `uv run dvc pull` first")
    folder = tmp_path_factory.mktemp("data")
    (folder / dataset.ARCHIVE.folder).mkdir()
    for name, (md5, _) in dataset.ARCHIVE.files.items():
        (folder / dataset.ARCHIVE.folder / name).symlink_to(REMOTE / "files" / "md5" / md5[:2] / md5[2:])
    return folder


@pytest.fixture(scope="session")
def cifar10(data_dir: Path) -> dataset.Data:
    """The real data, read once a session; do not write into it."""
    return dataset.load(data_dir)


@pytest.fixture(scope="session")
def cifar10_slice(cifar10: dataset.Data) -> tuple[Tensor, Tensor]:
    """The first 1,024 training images and labels."""
    return cifar10.train_images[:1024], cifar10.train_labels[:1024]


@pytest.fixture(scope="session")
def invented() -> dataset.Data:
    """Random images, ten classes by turns: 6,000 to train (1,000 after the validation split) and 100 to test."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6100, 3072), generator=generator, dtype=torch.uint8)
    labels = torch.arange(6100) % 10
    return dataset.Data(images[:6000], labels[:6000], images[6000:], labels[6000:])


@pytest.fixture(autouse=True)
def _random_state() -> None:
    """A fixed global generator for each test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_spec() -> Callable[..., Spec]:
    """A resolved spec of a network that takes milliseconds a step."""
    return lambda **changes: resolve({"widths": [32, 16], "batch_size": 64, **changes})


@pytest.fixture(scope="session")
def step_inputs(invented: dataset.Data) -> Callable[[Spec], tuple[dict, dict, dict]]:
    """State, data (an epoch of 8 steps of invented images) and hyper-parameters for a train step of a spec."""

    def make(spec: Spec) -> tuple[dict, dict, dict]:
        generator = torch.Generator().manual_seed(spec["seed"] + 1)
        order = torch.randperm(6000, generator=generator)[: 8 * spec["batch_size"]].view(8, -1)
        fixed = {}
        if spec["whiten"]:
            count, eps, back = spec["whiten"], spec["whiten_eps"], bool(spec["locality"])
            fixed = whitening(invented.train_images, torch.arange(1000), count, eps, back=back)
        images, labels = invented.train_images, invented.train_labels
        state, data, hyper = train.step_inputs(spec, images, labels, fixed, 8, invented.info)
        return state, {**data, "order": order}, hyper

    return make


@pytest.fixture
def step_inputs_in_float64(
    step_inputs: Callable[[Spec], tuple[dict, dict, dict]], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Spec], tuple[dict, dict, dict]]:
    """The same with a state in float64. Images are normalised to float64, too, by every caller."""
    normalise = augment.normalise
    monkeypatch.setattr(augment, "normalise", lambda *images: normalise(*images).double())

    def make(spec: Spec) -> tuple[dict, dict, dict]:
        state, data, hyper = step_inputs(spec)
        return tree_map(lambda t: t.double() if t.dtype == torch.float32 else t, state), data, hyper

    return make


def inputs_of_default(real: dataset.Data, **changes: Any) -> tuple[Spec, dict, dict, dict]:
    """Spec, state, data (the images in their order) and hyper-parameters of the default network at batch 128.

    The shapes are those of `start("run", "lr-1e-3", "--batch-size", 128)`: one compilation serves both.
    """
    spec = resolve({"batch_size": 128, **changes})
    batch = spec["batch_size"]
    steps = (TRAIN_IMAGES - VALIDATION_IMAGES) // batch
    data = {"images": real.train_images[:TRAIN_IMAGES], "labels": real.train_labels[:TRAIN_IMAGES]}
    data["order"] = torch.arange(steps * batch).view(steps, batch)
    return spec, step.init_state(spec), data, step.hyper_tensors(spec, steps)


@pytest.fixture(scope="session")
def default_inputs(cifar10: dataset.Data) -> Callable[..., tuple[Spec, dict, dict, dict]]:
    return lambda **changes: inputs_of_default(cifar10, **changes)


class Masked(nn.Module):
    """Dropout with a given mask, [features, batch] as core.functional.model lays it out."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, h: Tensor) -> Tensor:
        return h * self.mask.view(h.shape[1], h.shape[0]).t()


@pytest.fixture(scope="session")
def sequential() -> Callable[..., nn.Sequential]:
    """The network of a spec in torch.nn.

    Args:
        masks: one for each width of core.functional.model.dropout_widths, in place of torch's own dropout.
    """

    def build(spec: Spec, masks: list[Tensor] | None = None) -> nn.Sequential:
        network = as_module(spec)
        if masks:
            dropouts = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
            for name, mask in zip(dropouts, masks, strict=True):
                network.set_submodule(name, Masked(mask))
        return network

    return build


# Processes of main.py

FORK = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, under which the frameworks of macOS break")
DEAD = "http://127.0.0.1:9"  # a proxy that is not there: no request leaves the machine
OFFLINE = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), DEAD),
    "no_proxy": "",
    "NO_PROXY": "",
}


class Process(NamedTuple):
    """A process of main.py that the fork server started."""

    pid: int
    stdout: Path
    stderr: Path
    ask: Callable[[dict[str, Any]], Any]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, negative where a signal ended it."""
        return self.ask({"wait": self.pid})

    def output(self) -> str:
        """What it has printed so far, stdout first."""
        return self.stdout.read_text() + self.stderr.read_text()

    def until(self, words: str) -> None:
        """Wait for words in its output."""
        end = time.monotonic() + 120
        while words not in self.output():
            assert time.monotonic() < end, f"no {words!r} in: {self.output()}"
            time.sleep(0.01)


@pytest.fixture(scope="session")
def start(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Starts a process of main.py with these arguments; see tests/fork_server.py for the options."""
    if FORK.args[0]:
        pytest.skip(FORK.kwargs["reason"])
    logs = tmp_path_factory.mktemp("logs")
    server = subprocess.Popen(
        (sys.executable, str(ROOT / "tests" / "fork_server.py"), str(data_dir)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key not in ("CIFAR10_URL", "FORCE_COLOR")}
        | {**OFFLINE, "COLUMNS": "1000"},
    )
    questions, answers = server.stdin, server.stdout
    assert questions is not None
    assert answers is not None

    def ask(request: dict[str, Any]) -> Any:
        questions.write(json.dumps(request) + "\n")
        questions.flush()
        return json.loads(answers.readline())

    def start(
        *argv: object,
        out: Path | None = None,
        env: dict[str, str | None] | None = None,
        all_images: bool = False,
        pictures: bool = False,
        threads: int = 1,
        patch: str = "",
    ) -> Process:
        stdout, stderr = (logs / f"{len(list(logs.iterdir()))}.{name}" for name in ("out", "err"))
        stdout.touch()
        stderr.touch()
        where = [] if out is None else ["--out", str(out)]
        request = {"argv": [*map(str, argv), *where], "stdout": str(stdout), "stderr": str(stderr)}
        options = {"env": env or {}, "all_images": all_images, "pictures": pictures, "threads": threads, "patch": patch}
        return Process(ask(request | options), stdout, stderr, ask)

    yield start
    questions.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def call(start: Callable[..., Process], data_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs main.py on all images, without a terminal and without a network, and waits for its end.

    Without --data, a command that takes it gets the real data.
    """

    def call(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        if "--data" not in argv and argv[:1] not in (("list",), ("report",), ("predict",)):
            argv = (*argv, "--data", data_dir)
        process = start(*argv, **{"all_images": True, **options})
        return subprocess.CompletedProcess(argv, process.wait(), process.stdout.read_text(), process.stderr.read_text())

    return call
