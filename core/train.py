"""The loop: epochs of fused steps, one evaluation an epoch. It knows no file, no terminal and no signal."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.compile import fused
from core.compile.device import synchronize, to_device
from core.data import loader
from core.data.cifar10 import Cifar10
from core.functional import optim
from core.functional import step as steps
from core.functional.tree import flatten
from core.spec import Spec

EXAMPLES = 50_000 - 10 * loader.VALIDATION_PER_CLASS  # of CIFAR-10, to train on


class Diverged(Exception):
    """Something is NaN or infinite; the message names the step."""


class Event(NamedTuple):
    """Something that happened in a run.

    Attributes:
        kind: what it was; `fit` and core.session.run_experiment list theirs.
        details: plain values.
    """

    kind: str
    details: dict[str, Any]


class Training:
    """What a run has learnt so far, in buffers that stay on the device while `fit` advances them.

    Attributes:
        state, data, hyper: what the train step takes; see core.functional.step.make_train_step.
        step: how many steps have been taken.
        seconds, timed: the time of the steps of the epoch under way, and how many steps that are.
        mode: of the step, as core.compile.fused.Step has it; "compiled" or "eager" until the step is made.
    """

    def __init__(self, spec: Spec, data: Cifar10, device: torch.device, compiled: bool = True) -> None:
        """Prepare the first step of a resolved spec, over data that is on `device`."""
        self.spec, self.device, self.mode = spec, device, "compiled" if compiled else "eager"
        self.examples, validation = loader.split(data.train_labels.cpu())
        self.steps_per_epoch = len(self.examples) // spec["batch_size"]
        self.total = spec["epochs"] * self.steps_per_epoch
        self.step, self.seconds, self.timed = 0, 0.0, 0
        self.splits = {
            "train": (data.train_images, data.train_labels, self.examples.to(device)),
            "validation": (data.train_images, data.train_labels, validation.to(device)),
            "test": (data.test_images, data.test_labels, None),
        }
        self.state, self.data, self.hyper = step_inputs(
            spec, data.train_images, data.train_labels, self.steps_per_epoch
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and batch-norm statistics: the state dict of the equivalent torch.nn.Sequential."""
        return {**self.state["params"], **self.state["stats"]}

    def evaluate(self, split: str) -> dict[str, Any]:
        """Loss and accuracy on train, validation or test, in evaluation mode; see core.functional.step.evaluate."""
        images, labels, examples = self.splits[split]
        return steps.evaluate(self.state["params"], self.state["stats"], images, labels, self.spec, examples)

    def check_finite(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Raise Diverged where the state, or other tensors, are NaN or infinite. The flag of the step itself sees the
        loss and the gradients, but not moments that overflow, running statistics or other splits."""
        for name, t in (flatten(self.state) if tensors is None else tensors).items():
            if t.is_floating_point() and not t.isfinite().all():
                raise Diverged(
                    f"{name} is NaN or infinite after step {self.step} (epoch {self.epoch_of(self.step - 1)})"
                )

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 1, that the step of index `step` belongs to."""
        return step // self.steps_per_epoch + 1


def step_inputs(
    spec: Spec, images: Tensor, labels: Tensor, steps_per_epoch: int
) -> tuple[steps.State, dict[str, Any], dict[str, Any]]:
    """State, data and hyper-parameters as they are before the first step, on the device of the images."""
    device = images.device
    order = torch.zeros(steps_per_epoch, spec["batch_size"], dtype=torch.int64, device=device)
    state = to_device(steps.init_state(spec), device)
    data = {"images": images, "labels": labels, "order": order}
    return state, data, optim.hyper_tensors(spec, steps_per_epoch, device)


def compile_ahead(spec: Spec) -> None:
    """Start to compile the step of a spec for a CPU, while the data is still being read."""
    images, labels = torch.empty(50_000, 3072, dtype=torch.uint8), torch.empty(50_000, dtype=torch.int64)
    fused.compile_ahead(spec, *step_inputs(spec, images, labels, EXAMPLES // spec["batch_size"]))


def fit(
    training: Training, should_stop: Callable[[], bool] = lambda: False, may_change_mode: bool = True
) -> Iterator[Event]:
    """Train from where `training` is to its last epoch, and yield what happened.

    Whoever iterates may read and save `training` at each event but "step".

    Args:
        should_stop: asked between steps.
        may_change_mode: where compiling fails, or gives a step of another mode, go on with what there is; else raise
            core.compile.fused.CompileError.

    Yields:
        mode {mode, reason}: the step is made in another way than was asked for.
        first_step {step, total}: the first step of this call is done.
        step {step}: now and then. epoch {...}: an epoch is over; the details are its numbers.
        stopped {step, total}: `should_stop` said so; it is the last event.

    Raises:
        Diverged: the loss, a gradient or the validation loss is NaN or infinite.
    """
    made = None
    while training.step < training.total:
        if should_stop():
            yield Event("stopped", {"step": training.step, "total": training.total})
            return
        _start_epoch(training)
        end = (training.step // training.steps_per_epoch + 1) * training.steps_per_epoch
        if made is None:
            made, reason = _make_step(training, may_change_mode)
            if made.mode != training.mode:
                training.mode = made.mode
                yield Event("mode", {"mode": made.mode, "reason": reason})
            made.advance()
            training.step += 1
            synchronize(training.device)
            yield Event("first_step", {"step": training.step, "total": training.total})
        since = time.perf_counter()
        while training.step < end and not should_stop():
            made.advance()
            training.step += 1
            training.timed += 1
            if training.step % 16 == 0:
                yield Event("step", {"step": training.step})
        bad = int(training.state["metrics"]["bad_step"].item())  # the one wait for the device of an epoch
        training.seconds += time.perf_counter() - since
        if bad != steps.NEVER:
            raise Diverged(
                f"the loss or a gradient is NaN or infinite since step {bad + 1} (epoch {training.epoch_of(bad)})"
            )
        if training.step == end:
            yield Event("epoch", _end_epoch(training))


def _make_step(training: Training, may_change_mode: bool) -> tuple[fused.Step, str]:
    """The train step, and why it has another mode than `training`, if it has."""
    inputs = training.spec, training.state, training.data, training.hyper
    try:
        made = fused.fuse(*inputs, compiled=training.mode != "eager")
        reason = f"compiled without the patches of core/compile/inductor.py: {made.problem}"
        if made.mode != training.mode and not may_change_mode:
            raise fused.CompileError(f"the step would be {made.mode}, and was {training.mode}")
    except fused.CompileError as error:
        if not may_change_mode:
            raise
        made = fused.fuse(*inputs, compiled=False)
        reason = f"{error}: the train step runs eager, which is slower"
    return made, reason


def _start_epoch(training: Training) -> None:
    epoch, position = divmod(training.step, training.steps_per_epoch)
    order = loader.epoch_order(training.examples, training.spec["batch_size"], training.spec["seed"], epoch)
    training.data["order"].copy_(order)
    if position == 0:
        for name, value in training.state["metrics"].items():
            value.fill_(steps.NEVER if name == "bad_step" else 0)


def _end_epoch(training: Training) -> dict[str, Any]:
    """The numbers of the epoch that has just ended, as core.runs.record.Epoch has them."""
    sums, batch_size = training.state["metrics"], training.spec["batch_size"]
    examples = training.steps_per_epoch * batch_size
    validation = training.evaluate("validation")
    training.check_finite({"validation loss": torch.tensor(validation["loss"])})
    entry = {
        "epoch": training.step // training.steps_per_epoch,
        "train_loss": sums["loss"].item() / examples,
        "train_accuracy": sums["correct"].item() / examples,
        "val_loss": validation["loss"],
        "val_accuracy": validation["accuracy"],
        "seconds": round(training.seconds, 3),
        "samples_per_second": round(training.timed * batch_size / training.seconds) if training.timed else 0,
    }
    training.seconds, training.timed = 0.0, 0
    return entry
