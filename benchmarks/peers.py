"""The contestants of the epoch: ours, and the usual ways to write the same training. All train the same network
(3072-1024-512-256-10, BatchNorm, LeakyReLU, Dropout 0.2, Adam, float32) on the same shuffled examples.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from core.compile import fused
from core.compile.device import synchronize, to_device
from core.data import loader
from core.data.cifar10 import ROOT, Cifar10
from core.functional import augment, optim
from core.functional import step as steps
from core.predict import as_module
from core.spec import Spec, resolve


class Work:
    """An epoch to train: images uint8 [n, 3072], labels int64 [n], order int64 [steps, batch], on a device."""

    def __init__(self, data: Cifar10, batch: int) -> None:
        self.spec: Spec = resolve({"batch_size": batch})
        self.batch, self.device = batch, data.train_images.device
        self.images, self.labels = data.train_images, data.train_labels
        order = loader.epoch_order(loader.split(data.train_labels.cpu())[0], batch, seed=0, epoch=0)
        self.order, self.steps = order.to(self.device), len(order)
        self.sizes = [3072, *self.spec["widths"], 10]


class Contestant:
    """Something that trains, or does a part of it."""

    def run(self, steps: int) -> None:
        """Train on the next batches, and wait until it is done."""
        raise NotImplementedError

    def loss(self) -> float | None:
        """The mean training loss since the last call; None for one that does not learn."""
        return None


class Ours(Contestant):
    """The fused functional step."""

    def __init__(self, work: Work) -> None:
        self.state = to_device(steps.init_state(work.spec), work.device)
        hyper = optim.hyper_tensors(work.spec, work.steps, work.device)
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


def sequential(work: Work) -> nn.Sequential:
    """The network as modules."""
    torch.manual_seed(0)
    return as_module(work.spec).to(work.device)


class Eager(Contestant):
    """nn.Module, images on the device, Adam(fused=True)."""

    fused = True

    def __init__(self, work: Work) -> None:
        self.model, self.criterion = sequential(work), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=self.fused)
        self.total, self.count, self.device = torch.zeros((), device=work.device), 0, work.device
        self.batches = self.make_batches(work)

    def make_batches(self, work: Work) -> Iterator[tuple[Tensor, Tensor]]:
        std = torch.tensor(augment.STD, device=work.device).repeat_interleave(1024) * 255
        mean = torch.tensor(augment.MEAN, device=work.device).repeat_interleave(1024) * 255
        while True:
            for examples in work.order:
                x = work.images.index_select(0, examples).float().sub_(mean).div_(std)
                yield x, work.labels.index_select(0, examples)

    def update(self) -> None:
        self.optimizer.step()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images, labels = next(self.batches)
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(images), labels)
            loss.backward()
            self.update()
            self.total += loss.detach()
        self.count += steps
        synchronize(self.device)

    def loss(self) -> float:
        mean = self.total.item() / self.count
        self.total.zero_()
        self.count = 0
        return mean


class Compiled(Eager):
    """torch.compile on the module and on the optimizer's step, images on the device."""

    fused = False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.model = torch.compile(self.model, dynamic=False)
        self.update = torch.compile(self.optimizer.step)  # type: ignore[method-assign]


class Naive(Eager):
    """nn.Module, DataLoader over torchvision's CIFAR10 with ToTensor and Normalize, Adam as it comes."""

    fused = False

    def make_batches(self, work: Work) -> Iterator[tuple[Tensor, Tensor]]:
        from torchvision import datasets, transforms

        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(augment.MEAN, augment.STD)])
        images = datasets.CIFAR10(str(ROOT / "data"), train=True, transform=transform)
        batches = torch.utils.data.DataLoader(images, batch_size=work.batch, shuffle=True, drop_last=True)
        while True:
            for x, labels in batches:
                yield x.to(work.device), labels.to(work.device)


class Jax(Contestant):
    """JAX and optax: everything on the device, the steps of a round in one jitted loop whose state is donated.

    One loop is faster than a call per step, and the generator "rbg" compiles faster than the default one.
    """

    def __init__(self, work: Work) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        images, labels, order = (jnp.asarray(t.cpu().numpy()) for t in (work.images, work.labels, work.order))
        mean = jnp.repeat(jnp.asarray(augment.MEAN), 1024) * 255
        std = jnp.repeat(jnp.asarray(augment.STD), 1024) * 255
        adam = optax.adam(1e-3)

        def init(key):
            layers = []
            for inputs, outputs in zip(work.sizes[:-1], work.sizes[1:], strict=True):
                key, wkey, bkey = jax.random.split(key, 3)
                bound = inputs**-0.5
                layers.append(
                    {
                        "w": jax.random.uniform(wkey, (inputs, outputs), minval=-bound, maxval=bound),
                        "b": jax.random.uniform(bkey, (outputs,), minval=-bound, maxval=bound),
                        "scale": jnp.ones(outputs),
                        "shift": jnp.zeros(outputs),
                    }
                )
            for name in ("scale", "shift"):
                del layers[-1][name]
            return layers

        def forward(layers, stats, x, key):
            new = []
            for layer, (running_mean, running_var) in zip(layers[:-1], stats, strict=True):
                h = x @ layer["w"] + layer["b"]
                mu, var = h.mean(0), h.var(0)
                h = (h - mu) * jax.lax.rsqrt(var + 1e-5) * layer["scale"] + layer["shift"]
                h = jax.nn.leaky_relu(h, 0.01)
                key, sub = jax.random.split(key)
                x = jnp.where(jax.random.bernoulli(sub, 0.8, h.shape), h / 0.8, 0)
                unbiased = var * (work.batch / (work.batch - 1))
                new.append((0.9 * running_mean + 0.1 * mu, 0.9 * running_var + 0.1 * unbiased))
            return x @ layers[-1]["w"] + layers[-1]["b"], new

        def step(state, images, labels, order):
            layers, stats, opt, t, total = state
            examples = order[t % work.steps]
            x = (images[examples].astype(jnp.float32) - mean) / std
            key = jax.random.fold_in(jax.random.key(0, impl="rbg"), t)

            def loss_function(layers):
                logits, new = forward(layers, stats, x, key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[examples]).mean(), new

            (loss, stats), grads = jax.value_and_grad(loss_function, has_aux=True)(layers)
            updates, opt = adam.update(grads, opt, layers)
            return optax.apply_updates(layers, updates), stats, opt, t + 1, total + loss

        layers = init(jax.random.key(0))
        stats = [(jnp.zeros(n), jnp.ones(n)) for n in work.sizes[1:-1]]
        self.state = (layers, stats, adam.init(layers), jnp.int32(0), jnp.float32(0))
        self.many = jax.jit(
            lambda state, steps, *data: jax.lax.fori_loop(0, steps, lambda _, s: step(s, *data), state),
            donate_argnums=0,
        )
        self.data, self.count, self.total = (images, labels, order), 0, 0.0

    def run(self, steps: int) -> None:
        self.state = self.many(self.state, steps, *self.data)
        self.state[-1].block_until_ready()
        self.count += steps

    def loss(self) -> float:
        total = float(self.state[-1])
        mean = (total - self.total) / self.count
        self.total, self.count = total, 0
        return mean


def missing(name: str) -> str | None:
    """Why a contestant cannot take part, or None."""
    if name == "jax" and not all(map(importlib.util.find_spec, ("jax", "optax"))):
        return "skipped: jax or optax is not installed (`uv sync --group peers`)"
    return None


NAIVE = "naive PyTorch"
PEERS: dict[str, Callable[[Work], Contestant]] = {"jax": Jax, "eager": Eager, "compiled": Compiled, NAIVE: Naive}
