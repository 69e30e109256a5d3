"""What is to be trained, and those who train it in PyTorch: ours, and the usual ways to write the same.

All contestants train the same network (3072-1024-512-256-10, BatchNorm, LeakyReLU, Dropout 0.2, Adam) on the same
examples. The first line of a class's docstring says which form of it takes part; the table of results prints it.
"""

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.compile import fused
from core.compile.device import synchronize, to_device
from core.data import loader
from core.data.archive import ROOT
from core.data.tensors import Data
from core.functional import step as steps
from core.predict import as_module
from core.spec import CIFAR10, Spec, resolve
from core.train import Training, stack


class Work:
    """An epoch to train in a precision: images uint8 [n, 3072], labels int64 [n], order int64 [steps, batch]."""

    def __init__(self, data: Data, batch: int, precision: str = "float32", folder: Path = ROOT / "data") -> None:
        """
        Args:
            data: on the device that is to train.
            folder: where CIFAR-10 lies, for the contestant that reads it itself.
        """
        self.spec: Spec = resolve({"batch_size": batch, "precision": precision})
        self.batch, self.precision, self.device = batch, precision, data.train_images.device
        self.images, self.labels, self.folder = data.train_images, data.train_labels, folder
        order = loader.epoch_order(loader.split(data.train_labels.cpu())[0], batch, seed=0, epoch=0)
        self.order, self.steps = order.to(self.device), len(order)
        self.sizes = [3072, *self.spec["widths"], 10]


class Contestant:
    """Something that trains, or does a part of it."""

    def __init__(self, work: Work) -> None:
        raise NotImplementedError

    def run(self, steps: int) -> None:
        """Train on the next batches, and wait until it is done."""
        raise NotImplementedError

    def loss(self) -> float | None:
        """The mean training loss since the last call; None for one that does not learn."""
        return None


class Ours(Contestant):
    """This project: the fused functional step."""

    def __init__(self, work: Work) -> None:
        self.state = to_device(steps.init_state(work.spec), work.device)
        hyper = to_device(steps.hyper_tensors(work.spec, work.steps), work.device)
        data = {"images": work.images, "labels": work.labels, "order": work.order}
        self.advance = fused.fuse(work.spec, self.state, data, hyper).advance
        self.batch, self.device, self.counted = work.batch, work.device, 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.advance()
        synchronize(self.device)

    def loss(self) -> float:
        count = int(self.state["step"]) - self.counted
        self.counted += count
        mean = self.state["metrics"]["loss"].item() / (count * self.batch)
        self.state["metrics"]["loss"].zero_()
        return mean


class Runs(Contestant):
    """This project: the runs of a spec with the seeds 0, 1, ..., which take each step together."""

    def __init__(self, data: Data, changes: dict[str, Any], size: int = 1, compiled: bool = True) -> None:
        """
        Args:
            changes: the spec without its defaults.
        """
        self.device = data.train_images.device
        members = [Training(resolve({**changes, "seed": seed}), data, self.device) for seed in range(size)]
        for seed, each in enumerate(members):
            each.data["order"].copy_(loader.epoch_order(each.examples, each.spec["batch_size"], seed, 0))
        trees = stack(members) if size > 1 else (members[0].state, members[0].data, members[0].hyper)
        self.state = trees[0]
        self.advance = fused.fuse(members[0].spec, *trees, compiled=compiled).advance

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.advance()
        synchronize(self.device)


def sequential(work: Work) -> nn.Sequential:
    """The network as modules."""
    torch.manual_seed(0)
    return as_module(work.spec).to(work.device)


class LossOfExamples(nn.Module):
    """Gather, normalise, forward and cross-entropy: indices of examples, int64 [batch] -> the mean loss."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.model, self.precision = sequential(work), work.precision
        # Buffers, so that a CUDA graph reads them where they are, and does not copy 150 MB of images a step.
        self.register_buffer("images", work.images)
        self.register_buffer("labels", work.labels)
        for name, values in (("mean", CIFAR10.mean), ("std", CIFAR10.std)):
            self.register_buffer(name, torch.tensor(values, device=work.device).repeat_interleave(1024) * 255)

    def forward(self, examples: Tensor) -> Tensor:
        x = self.images.index_select(0, examples).float().sub_(self.mean).div_(self.std)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return F.cross_entropy(self.model(x), self.labels.index_select(0, examples))


class Eager(Contestant):
    """PyTorch eager: images on the device, Adam(fused=True); bfloat16 by torch.autocast."""

    def __init__(self, work: Work) -> None:
        self.loss_of = LossOfExamples(work)
        self.optimizer = torch.optim.Adam(self.loss_of.parameters(), lr=1e-3, fused=True)
        self.batches = itertools.cycle(work.order.unbind())
        self.total, self.count, self.device = torch.zeros((), device=work.device), 0, work.device

    def run(self, steps: int) -> None:
        for batch in itertools.islice(self.batches, steps):
            self.optimizer.zero_grad()
            loss = self.loss_of(batch)
            loss.backward()
            self.optimizer.step()
            self.total += loss.detach()
        self.count += steps
        synchronize(self.device)

    def loss(self) -> float:
        mean = self.total.item() / self.count
        self.total.zero_()
        self.count = 0
        return mean


class Compiled(Eager):
    """torch.compile from the gather to the loss (on CUDA with mode="max-autotune", in CUDA graphs), Adam(fused=True).

    Measured in turns on a CPU, this form is the fastest in both precisions, or within 1% of it: torch.compile of the
    module alone is up to 5% slower, of the optimizer's step 6 to 16%, of the whole step with compiled autograd slower
    than that.
    """

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        mode = "max-autotune" if work.device.type == "cuda" else None
        self.loss_of = torch.compile(self.loss_of, dynamic=False, mode=mode)  # type: ignore[assignment]


class Naive(Eager):
    """Naive PyTorch: nn.Module, DataLoader over torchvision's CIFAR10 with ToTensor and Normalize, Adam as it comes."""

    def __init__(self, work: Work) -> None:
        from torchvision import datasets, transforms

        self.model, self.device = sequential(work), work.device
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10.mean, CIFAR10.std)])
        images = datasets.CIFAR10(str(work.folder), train=True, transform=transform)
        loader = torch.utils.data.DataLoader(images, batch_size=work.batch, shuffle=True, drop_last=True)
        # Not itertools.cycle, which would keep the batches of the first epoch.
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))
        self.total, self.count = torch.zeros((), device=work.device), 0

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device))
