"""The idea of this project on one page: a pure train step, compiled, over data that stays on the device.

uv run python -m examples.minimal     trains the default network for two epochs
"""

import time
from collections.abc import Iterator

import torch

from core.compile.fused import in_place
from core.data import cifar10, loader
from core.data.tensors import Data
from core.functional import step
from core.functional.tree import tree_map
from core.spec import Spec, resolve, static


def train(data: Data, spec: Spec, device: torch.device, compiled: bool = True) -> Iterator[dict]:
    """Train a network, and yield the numbers of each epoch."""
    images, labels = data.train_images.to(device), data.train_labels.to(device)  # uint8 and int64: they stay there
    examples, validation = loader.split(data.train_labels)
    steps = len(examples) // spec["batch_size"]

    # The state is all that training changes: parameters, batch-norm statistics, Adam's moments, the number of the step.
    state = tree_map(lambda t: t.to(device), step.init_state(spec))
    # Learning rate, dropout rate and seed are tensors, so one compilation serves all their values.
    hyper = tree_map(lambda t: t.to(device), step.hyper_tensors(spec, steps))
    order = torch.empty(steps, spec["batch_size"], dtype=torch.int64, device=device)
    epoch_data = {"images": images, "labels": labels, "order": order}

    # The step is a pure function: (state, data, hyper) -> state. `in_place` writes the new state over the old one.
    advance = in_place(step.make_train_step(static(spec)))
    if compiled:
        advance = torch.compile(advance, fullgraph=True, dynamic=False)

    for epoch in range(spec["epochs"]):
        order.copy_(loader.epoch_order(examples, spec["batch_size"], spec["seed"], epoch))
        state["metrics"]["loss"].zero_()
        start = time.perf_counter()
        for _ in range(steps):
            advance(state, epoch_data, hyper)
        found = step.evaluate(state["params"], state["stats"], images, labels, spec, validation.to(device))
        yield {
            "epoch": epoch + 1,
            "train_loss": state["metrics"]["loss"].item() / order.numel(),
            "val_accuracy": found["accuracy"],
            "seconds": time.perf_counter() - start,
        }


if __name__ == "__main__":
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for numbers in train(cifar10.load("data"), resolve({"epochs": 2}), device):
        print(", ".join(f"{name} {value:.4g}" for name, value in numbers.items()), flush=True)
