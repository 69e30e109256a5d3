"""One run from its spec to its record: epochs, the clock, validation, resume points. Draws nothing, prints nothing."""

import time
from collections.abc import Callable
from typing import Any

import torch

from core.compile import fused
from core.compile.device import synchronize, to_device
from core.data import loader
from core.data.cifar10 import DIRECTORY_HASH, Cifar10
from core.functional import optim
from core.functional import step as steps
from core.runs import checkpoint, resume
from core.runs.files import Run
from core.runs.provenance import environment
from core.runs.resume import KEEP, ResumeError
from core.runs.store import delete, reserve, write_json
from core.spec import Spec, spec_id

Listener = Callable[[str, dict[str, Any]], None]


class Diverged(Exception):
    """Something is NaN or infinite; the message names the step."""


class Interrupted(Exception):
    """Asked to stop; everything is saved."""


def meta(name: str, spec: Spec, environment: dict[str, Any]) -> dict[str, Any]:
    """What every record and every file of weights says of its run."""
    return {
        "name": name,
        "spec": spec,
        "spec_id": spec_id(spec),
        "seed": spec["seed"],
        "data": DIRECTORY_HASH,
        "environment": environment,
    }


def fail(run: Run, name: str, spec: Spec, environment: dict[str, Any], reason: str) -> None:
    """Leave the record of a run that failed: it claims no number. What it achieved another time stays."""
    if not run.result():
        write_json(run.record, {**meta(name, spec, environment), "status": "failed", "error": reason})


def _flat(state: steps.State) -> dict[str, torch.Tensor]:
    """The nested state as {"opt/exp_avg/1.weight": tensor, ...}."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        flat |= {f"{key}/{name}": t for name, t in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


def step_inputs(
    spec: Spec, images: torch.Tensor, labels: torch.Tensor, steps_per_epoch: int
) -> tuple[steps.State, dict[str, Any], dict[str, Any]]:
    """State, data and hyper-parameters as they are before the first step, on the device of the images."""
    device = images.device
    order = torch.zeros(steps_per_epoch, spec["batch_size"], dtype=torch.int64, device=device)
    state = to_device(steps.init_state(spec), device)
    data = {"images": images, "labels": labels, "order": order}
    return state, data, optim.hyper_tensors(spec, steps_per_epoch, device)


def compile_ahead(spec: Spec) -> None:
    """Have the step of a spec compiled for a CPU while the data is still being read."""
    images, labels = torch.empty(50_000, 3072, dtype=torch.uint8), torch.empty(50_000, dtype=torch.int64)
    examples = len(labels) - 10 * loader.VALIDATION_PER_CLASS
    fused.compile_ahead(spec, *step_inputs(spec, images, labels, examples // spec["batch_size"]))


class Training:
    """A run in progress.

    Args:
        run: where its files go; its lock is held.
        name, spec: the experiment and its resolved spec.
        data: CIFAR-10 on `device`.
        compiled: fuse the step with torch.compile, or run it eager.
        every: epochs between resume points.
        listen: called with an event and its details: resumed, damaged, eager, first_step, step, epoch.
        should_stop: asked between steps.
        loosely: go on from a resume point even where the bits will differ, and say so in the record.
        clock_start: time.perf_counter() when the process started.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        spec: Spec,
        data: Cifar10,
        device: torch.device,
        *,
        compiled: bool = True,
        every: int = 1,
        listen: Listener = lambda *_: None,
        should_stop: Callable[[], bool] = lambda: False,
        loosely: bool = False,
        clock_start: float | None = None,
    ) -> None:
        self.run, self.name, self.spec, self.device, self.every = run, name, spec, device, every
        self.listen, self.should_stop, self.loosely = listen, should_stop, loosely
        self.clock_start = time.perf_counter() if clock_start is None else clock_start
        self.environment = environment(device, compiled)
        self.train_examples, validation = loader.split(data.train_labels.cpu())
        self.steps_per_epoch = len(self.train_examples) // spec["batch_size"]
        train_split = data.train_images, data.train_labels
        self.splits = {
            "train": (*train_split, self.train_examples.to(device)),
            "validation": (*train_split, validation.to(device)),
            "test": (data.test_images, data.test_labels, None),
        }
        self.state, self.data, self.hyper = step_inputs(spec, *train_split, self.steps_per_epoch)
        self.history: resume.History = []
        self.progress: dict[str, Any] = {"seconds": 0.0, "timed": 0, "first_step_seconds": 0.0, "bitwise": True}

    def __call__(self) -> dict[str, Any]:
        """Train to the end; returns the record, which is then on disk.

        Raises:
            Diverged, Interrupted, ResumeError, core.runs.store.StoreError.
        """
        step = self._resume()
        total = self.spec["epochs"] * self.steps_per_epoch
        size = sum(t.nbytes for t in _flat(self.state).values())
        reserve(self.run.resume_point(total), size, max(1, KEEP + 1 - len(self.run.resume_points())))
        advance: fused.Advance | None = None
        while step < total:
            self._start_epoch(step)
            end = (step // self.steps_per_epoch + 1) * self.steps_per_epoch
            if advance is None:
                advance = self._first_step(resumed=step > 0)
                step += 1
            since = time.perf_counter()
            while step < end and not self.should_stop():
                advance()
                step += 1
                self.progress["timed"] += 1
                if step % 16 == 0:
                    self.listen("step", {"step": step})
            bad = int(self.state["metrics"]["bad_step"].item())  # the one wait for the device of an epoch
            self.progress["seconds"] += time.perf_counter() - since
            if bad != steps.NEVER:
                raise Diverged(
                    f"the loss or a gradient is NaN or infinite since step {bad + 1} (epoch {self._epoch(bad)})"
                )
            if step == end:
                self._end_epoch(step)
            finished = step // self.steps_per_epoch
            stop = self.should_stop()
            if step < end or step == total or finished % self.every == 0 or stop:
                self._save(step)
            if step < total and (stop or step < end):
                raise Interrupted(f"stopped after step {step} of {total}, which is saved")
        return self._finish()

    def _first_step(self, resumed: bool) -> fused.Advance:
        """The first step of this process, which compiles; where that fails, the same step eager."""
        try:
            advance = fused.fuse(self.spec, self.state, self.data, self.hyper, self.environment["mode"] == "compiled")
            advance()
        except fused.CompileError as error:
            self.environment["mode"] = "eager"
            reason = f"torch.compile failed: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
            if resumed and not self.loosely:
                raise ResumeError(f"{reason}; {resume.REMEDY}") from None
            self.progress["bitwise"] = self.progress["bitwise"] and not resumed
            self.listen("eager", {"reason": reason})
            advance = fused.fuse(self.spec, self.state, self.data, self.hyper, compiled=False)
            advance()
        synchronize(self.device)
        seconds = round(time.perf_counter() - self.clock_start, 3)
        self.progress["first_step_seconds"] = self.progress["first_step_seconds"] or seconds
        self.listen("first_step", {"seconds": seconds, "total": self.spec["epochs"] * self.steps_per_epoch})
        return advance

    def _epoch(self, step: int) -> int:
        """The epoch, counted from 1, that a step of index `step` falls in."""
        return step // self.steps_per_epoch + 1

    def _start_epoch(self, step: int) -> None:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = loader.epoch_order(self.train_examples, self.spec["batch_size"], self.spec["seed"], epoch)
        self.data["order"].copy_(order)
        if position == 0:
            for name, value in self.state["metrics"].items():
                value.fill_(steps.NEVER if name == "bad_step" else 0)

    def _end_epoch(self, step: int) -> None:
        examples = self.steps_per_epoch * self.spec["batch_size"]
        validation = self._evaluate("validation")
        seconds, timed = self.progress["seconds"], self.progress["timed"]
        entry = {
            "epoch": step // self.steps_per_epoch,
            "train_loss": self.state["metrics"]["loss"].item() / examples,
            "train_accuracy": self.state["metrics"]["correct"].item() / examples,
            "val_loss": validation["loss"],
            "val_accuracy": validation["accuracy"],
            "seconds": round(seconds, 3),
            "samples_per_second": round(timed * self.spec["batch_size"] / seconds) if timed else 0,
        }
        self._check_finite(step, {"validation loss": torch.tensor(entry["val_loss"])})
        self.history.append(entry)
        self.progress |= {"seconds": 0.0, "timed": 0}
        self.listen("epoch", entry)

    def _evaluate(self, split: str) -> dict[str, Any]:
        images, labels, examples = self.splits[split]
        return steps.evaluate(self.state["params"], self.state["stats"], images, labels, self.spec, examples)

    def _meta(self) -> dict[str, Any]:
        return meta(self.name, self.spec, self.environment)

    def _check_finite(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """What the flag of the step does not see: moments that overflow, running statistics, other splits."""
        for name, t in tensors.items():
            if t.is_floating_point() and not t.isfinite().all():
                raise Diverged(f"{name} is NaN or infinite after step {step} (epoch {self._epoch(step - 1)})")

    def _save(self, step: int) -> None:
        state = _flat(self.state)
        self._check_finite(step, state)
        resume.save(self.run, state, self.history, {**self._meta(), "progress": self.progress})

    def _resume(self) -> int:
        """Go to the newest good resume point; returns its step, 0 without one."""
        state = _flat(self.state)
        meta = {**self._meta(), "progress": self.progress}
        point = resume.newest(self.run, meta, state, self.steps_per_epoch, self.loosely, self.listen)
        if point is None:
            return 0
        for name, value in state.items():
            value.copy_(point.state[name])
        self.history, self.progress = point.history, point.progress
        self.environment["mode"] = point.mode
        self.progress["bitwise"] = self.progress["bitwise"] and not point.different
        self.listen("resumed", {"step": point.step, "epoch": self._epoch(point.step), "different": point.different})
        return point.step

    def _finish(self) -> dict[str, Any]:
        """Evaluate on train, validation and test, write weights and record, drop the resume points."""
        weights = {**self.state["params"], **self.state["stats"]}
        # All in evaluation mode, unlike the running sums of the history. This is where the test split is read.
        metrics = {split: self._evaluate(split) for split in self.splits}
        losses = {f"{split} loss": torch.tensor(m["loss"]) for split, m in metrics.items()}
        self._check_finite(int(self.state["step"]), losses)
        digest = checkpoint.digest(weights)
        record = {
            **self._meta(),
            "status": "finished",
            "parameters": sum(p.numel() for p in self.state["params"].values()),
            "history": self.history,
            "first_step_seconds": self.progress["first_step_seconds"],
            "metrics": metrics,
            "digest": digest,
            "bitwise": self.progress["bitwise"],
        }
        checkpoint.save(self.run.weights, weights, {**self._meta(), "digest": digest, "test": metrics["test"]})
        write_json(self.run.record, record)
        delete(*self.run.resume_points())
        return record
