"""The loop: epochs of fused steps, one evaluation an epoch. It knows no file, no terminal and no signal."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from core.compile import fused
from core.compile.device import synchronize, to_device
from core.data import loader
from core.data.tensors import Data
from core.data.whitening import Whitening, whitening
from core.events import Diverged, EpochDone, Event, FirstStep, ModeChanged, StepDone, Stopped
from core.functional import model, optim
from core.functional import step as steps
from core.functional.tree import flatten, tree_map
from core.mode import COMPILED, Mode
from core.spec import DataInfo, Spec


class NotFinite(Exception):
    """Something is NaN or infinite; the message names the step."""


PAUSE = 1.0  # seconds; a shorter pause cannot be told from a slow step


class Stopwatch:
    """Counts the seconds in which this process runs: neither Ctrl-Z nor the sleep of a laptop.

    Attributes:
        seconds: sum of all laps that are no pauses.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self, usual: float = 0.0) -> float:
        """End a lap. It is a pause if it takes longer than PAUSE and ten times the `usual` seconds, and the process
        uses a CPU for less than a tenth of it.

        Returns:
            Its seconds; 0 for a pause.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        took, used = wall - self.wall, cpu - self.cpu
        self.wall, self.cpu = wall, cpu
        if took > max(PAUSE, 10 * usual) and used < took / 10:
            return 0.0
        self.seconds += took
        return took


class Training:
    """What a run has learnt so far, in buffers that stay on the device while `fit` advances them.

    Attributes:
        state, data, hyper: what the train step takes; see core.functional.step.make_train_step.
        step: how many steps have been taken.
        seconds, timed: the time of the steps of the epoch in progress, without pauses, and the number of these steps.
            In a cohort, the time is divided by the number of runs.
        mode: of the step; until the step is made, the mode that was asked for.
    """

    def __init__(self, spec: Spec, data: Data, device: torch.device, mode: Mode = COMPILED) -> None:
        """Prepare the first step of a resolved spec, over data that is on `device`."""
        self.spec, self.device, self.mode, self.info = spec, device, mode, data.info
        self.examples, validation = loader.to_train_on(data.train_labels.cpu(), spec["train_on"], data.info)
        self.steps_per_epoch = len(self.examples) // spec["batch_size"]
        self.total = spec["epochs"] * self.steps_per_epoch
        self.step, self.seconds, self.timed = 0, 0.0, 0
        self.splits = {
            "train": (data.train_images, data.train_labels, self.examples.to(device)),
            "test": (data.test_images, data.test_labels, None),
        }
        if validation is not None:
            self.splits["validation"] = data.train_images, data.train_labels, validation.to(device)
        self.whitening: Whitening = {}
        if spec["whiten"]:
            count, eps, back = spec["whiten"], spec["whiten_eps"], bool(spec["locality"])
            filters = whitening(data.train_images, self.examples, count, eps, back=back, info=data.info)
            self.whitening = to_device(filters, device)
        self.state, self.data, self.hyper = step_inputs(
            spec, data.train_images, data.train_labels, self.whitening, self.steps_per_epoch, data.info
        )

    @property
    def network(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and batch-norm statistics of the network that is evaluated and saved: those of their moving
        average, if there is one, and for normalised images, with whitening and envelopes folded in."""
        params, stats = steps.trained(self.state)
        params = model.enveloped(params, self.hyper.get("envelope", {}))
        return model.fold(params, self.whitening) if self.whitening else params, stats

    @property
    def weights(self) -> dict[str, Tensor]:
        """`network` as the state dict of the equivalent torch.nn.Sequential."""
        params, stats = self.network
        return {**params, **stats}

    def answers(self, split: str, tta: str = "none") -> steps.Answers:
        """The answers of the network to each image of train, validation or test; see core.functional.step.answers."""
        images, labels, examples = self.splits[split]
        return steps.answers(*self.network, images, labels, model.folded(self.spec), examples, tta=tta, info=self.info)

    def check_finite(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Raise NotFinite if the state, or other `tensors`, are NaN or infinite. The step itself checks the loss and
        the gradients, but neither moments that overflow nor running statistics nor other splits."""
        for name, t in (flatten(self.state) if tensors is None else tensors).items():
            if t.is_floating_point() and not t.isfinite().all():
                raise NotFinite(
                    f"{name} is NaN or infinite after step {self.step} (epoch {self.epoch_of(self.step - 1)})"
                )

    def epoch_of(self, step: int) -> int:
        """The epoch, counted from 1, that the step of index `step` belongs to."""
        return step // self.steps_per_epoch + 1


def step_inputs(
    spec: Spec, images: Tensor, labels: Tensor, whitening: Whitening, steps_per_epoch: int, info: DataInfo
) -> tuple[steps.State, dict[str, Any], dict[str, Any]]:
    """State, data and hyper-parameters as they are before the first step, on the device of the images."""
    device = images.device
    order = torch.zeros(steps_per_epoch, spec["batch_size"], dtype=torch.int64, device=device)
    state = to_device(steps.init_state(spec, info), device)
    data: dict[str, Any] = {"images": images, "labels": labels, "order": order}
    if whitening:
        data["whitening"] = {n: model.cast(t, spec["precision"]) if t.ndim == 2 else t for n, t in whitening.items()}
    return state, data, to_device(steps.hyper_tensors(spec, steps_per_epoch, info), device)


def fit(
    trainings: Sequence[Training], should_stop: Callable[[], bool] = lambda: False, may_change_mode: bool = True
) -> Iterator[tuple[Training, Event]]:
    """Train to the last epoch, and yield each event with its training.

    Several trainings are a cohort: they take each step together, in one call. Their specs agree on everything that is
    part of the compilation's identity and on the epochs, and all are at the same step. The caller may read and save a
    training at each of its events except StepDone.

    Args:
        should_stop: asked between steps.
        may_change_mode: if compiling fails, or gives a step of another mode, go on with that step. Without it,
            core.compile.fused.CompileError is raised.

    Yields:
        ModeChanged, FirstStep, StepDone and EpochDone. The last event of a training may be Diverged or Stopped.
    """
    live, lead, made = list(trainings), trainings[0], None
    # Seconds that the end of an epoch may wait for the device. The CPU may be idle then: that is no pause.
    wait = 0.0 if lead.device.type == "cpu" else float("inf")
    trees = (lead.state, lead.data, lead.hyper) if len(trainings) == 1 else stack(trainings)
    while live and lead.step < lead.total:
        if should_stop():
            yield from ((t, Stopped(t.step, t.total)) for t in live)
            return
        for t in trainings:
            _start_epoch(t)
        end = (lead.step // lead.steps_per_epoch + 1) * lead.steps_per_epoch
        if made is None:
            made, reason = _make_step(lead, trees, may_change_mode)
            changed = made.mode != lead.mode
            for t in trainings:
                t.mode = made.mode
            if changed:
                yield from ((t, ModeChanged(made.mode, reason)) for t in live)
            made.advance()
            synchronize(lead.device)
            for t in trainings:
                t.step += 1
            yield from ((t, FirstStep(t.step, t.total)) for t in live)
        watch = Stopwatch()
        while lead.step < end and not should_stop():
            made.advance()
            lead.step += 1
            lead.timed += watch.lap() > 0
            if lead.step % 16 == 0:
                yield live[0], StepDone(lead.step)
        bad_steps = trees[0]["metrics"]["bad_step"].view(-1).tolist()  # the one wait for the device of an epoch
        wait = watch.lap(wait) or wait
        lead.seconds += watch.seconds / len(trainings)  # each one's share
        seconds, timed = lead.seconds, lead.timed
        for t, bad in zip(trainings, bad_steps, strict=True):
            t.step, t.seconds, t.timed = lead.step, seconds, timed
            if t not in live:
                continue
            try:
                if bad != steps.NEVER:
                    raise NotFinite(
                        f"the loss or a gradient is NaN or infinite since step {bad + 1} (epoch {t.epoch_of(bad)})"
                    )
                if t.step == end:
                    yield t, _end_epoch(t)
            except NotFinite as error:
                live.remove(t)
                yield t, Diverged(str(error))


def stack(trainings: Sequence[Training]) -> tuple[steps.State, dict[str, Any], dict[str, Any]]:
    """State, data and hyper-parameters of a cohort. All have a leading axis except the images and labels, which are
    shared. Those of each training become views of them."""

    def stacked(trees: list[dict]) -> dict:
        return tree_map(lambda *members: torch.stack(members), *trees)

    state, hyper = stacked([t.state for t in trainings]), stacked([t.hyper for t in trainings])
    data = {**trainings[0].data, "order": torch.stack([t.data["order"] for t in trainings])}
    for i, t in enumerate(trainings):
        t.state, t.hyper = (tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (state, hyper))
        t.data = {**data, "order": data["order"][i]}
    return state, data, hyper


def _make_step(lead: Training, trees: tuple[dict, dict, dict], may_change_mode: bool) -> tuple[fused.Step, str]:
    """The train step, and the reason if its mode is not the mode that was asked for."""
    try:
        made = fused.fuse(lead.spec, *trees, compiled=lead.mode.kind != "eager", info=lead.info)
        reason = f"compiled without the patches of core/compile/inductor.py, until .cache is deleted: {made.problem}"
        if made.mode != lead.mode and not may_change_mode:
            raise fused.CompileError(f"the step would be {made.mode}, and was {lead.mode}")
    except fused.CompileError as error:
        if not may_change_mode:
            raise
        made = fused.fuse(lead.spec, *trees, compiled=False, info=lead.info)
        reason = f"{error}: the train step runs eager, which is slower"
    return made, reason


def _start_epoch(training: Training) -> None:
    epoch, position = divmod(training.step, training.steps_per_epoch)
    order = loader.epoch_order(training.examples, training.spec["batch_size"], training.spec["seed"], epoch)
    training.data["order"].copy_(order)
    if position == 0:
        training.seconds, training.timed = 0.0, 0
        for name, value in training.state["metrics"].items():
            value.fill_(steps.NEVER if name == "bad_step" else 0)


def _end_epoch(training: Training) -> EpochDone:
    """The numbers of the epoch that has just ended."""
    sums, spec, hyper = training.state["metrics"], training.spec, training.hyper
    examples = training.steps_per_epoch * spec["batch_size"]
    training.check_finite()
    val_loss = val_accuracy = None
    if "validation" in training.splits:
        validation = steps.summary(training.answers("validation"))
        val_loss, val_accuracy = validation["loss"], validation["accuracy"]
        training.check_finite({"validation loss": torch.tensor(val_loss)})
    last = torch.tensor(training.step - 1, dtype=torch.int32, device=training.device)
    event = EpochDone(
        epoch=training.step // training.steps_per_epoch,
        lr=optim.scheduled_lr(spec["schedule"], hyper, last).item(),
        train_loss=sums["loss"].item() / examples,
        train_accuracy=sums["correct"].item() / examples,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
        seconds=round(training.seconds, 3),
        samples_per_second=round(training.timed * spec["batch_size"] / training.seconds) if training.timed else 0,
    )
    training.seconds, training.timed = 0.0, 0
    return event
