"""What several rooms need: real and invented data, resolved specs, the same network as torch.nn.Sequential."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from core.compile import cache
from core.data import cifar10 as dataset
from core.functional import optim, step
from core.spec import Spec, resolve

ROOT = Path(__file__).resolve().parent.parent
REMOTE = ROOT.parent / "shared" / "dvc-remote"

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.CACHE))  # so that a second call of pytest compiles little

# The same examples every time: a failure in CI is a failure at home.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def lacking(what: str) -> None:
    """Skip for want of something, saying so; in CI, where all has to be there, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; with CI set this is a failure")
    pytest.skip(what)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10: data/, or one made of links into the DVC remote beside the project."""
    if not dataset.missing(ROOT / "data"):
        return ROOT / "data"
    if not REMOTE.exists():
        lacking(f"CIFAR-10 is neither in {ROOT / 'data'} nor in {REMOTE}: run `uv run dvc pull` first")
    folder = tmp_path_factory.mktemp("data")
    (folder / dataset.FOLDER).mkdir()
    for name, (md5, _) in dataset.FILES.items():
        (folder / dataset.FOLDER / name).symlink_to(REMOTE / "files" / "md5" / md5[:2] / md5[2:])
    return folder


@pytest.fixture(scope="session")
def cifar10(data_dir: Path) -> dataset.Cifar10:
    """The real data, read once a session; do not write into it."""
    return dataset.load(data_dir)


@pytest.fixture(scope="session")
def cifar10_slice(cifar10: dataset.Cifar10) -> tuple[Tensor, Tensor]:
    """The first 1,024 training images and labels."""
    return cifar10.train_images[:1024], cifar10.train_labels[:1024]


@pytest.fixture(scope="session")
def invented() -> dataset.Cifar10:
    """Random images, ten classes by turns: 6,000 to train (1,000 after the validation split) and 100 to test."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (6100, 3072), generator=generator, dtype=torch.uint8)
    labels = torch.arange(6100) % 10
    return dataset.Cifar10(images[:6000], labels[:6000], images[6000:], labels[6000:])


@pytest.fixture(autouse=True)
def _random_state() -> None:
    """A fixed global generator for each test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_spec() -> Callable[..., Spec]:
    """A resolved spec of a network that takes milliseconds a step."""
    return lambda **changes: resolve({"widths": [32, 16], "batch_size": 64, **changes})


@pytest.fixture(scope="session")
def step_inputs(invented: dataset.Cifar10) -> Callable[[Spec], tuple[dict, dict, dict]]:
    """State, data (an epoch of 8 steps of invented images) and hyper-parameters for a train step of a spec."""

    def make(spec: Spec) -> tuple[dict, dict, dict]:
        generator = torch.Generator().manual_seed(spec["seed"] + 1)
        order = torch.randperm(6000, generator=generator)[: 8 * spec["batch_size"]].view(8, -1)
        data = {"images": invented.train_images, "labels": invented.train_labels, "order": order}
        return step.init_state(spec), data, optim.hyper_tensors(spec, 8, torch.device("cpu"))

    return make


class Masked(nn.Module):
    """Dropout with a given mask, [features, batch] as core.functional.model lays it out."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, h: Tensor) -> Tensor:
        return h * self.mask.view(h.shape[1], h.shape[0]).t()


@pytest.fixture(scope="session")
def sequential() -> Callable[..., nn.Sequential]:
    """The network of a spec as a beginner would write it, in torch.nn.

    Args:
        masks: one dropout mask a hidden layer, in place of torch's own dropout.
    """
    activations = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}

    def build(spec: Spec, masks: list[Tensor] | None = None) -> nn.Sequential:
        stack: list[nn.Module] = [nn.Flatten()]
        inputs = 3072
        for i, width in enumerate(spec["widths"]):
            stack.append(nn.Linear(inputs, width))
            if spec["norm"] == "batch":
                stack.append(nn.BatchNorm1d(width))
            stack.append(activations[spec["activation"]]())
            if spec["dropout"] > 0:
                stack.append(Masked(masks[i]) if masks else nn.Dropout(spec["dropout"]))
            inputs = width
        return nn.Sequential(*stack, nn.Linear(inputs, 10))

    return build
