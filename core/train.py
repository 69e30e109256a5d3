"""One run from its spec to its record: epochs, the clock, validation, resume points. Draws nothing, prints nothing."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from core import checkpoint, jit, loader, optim
from core import step as steps
from core.checkpoint import CheckpointError
from core.dataset import DIRECTORY_HASH, Cifar10
from core.provenance import difference, environment
from core.spec import Spec, canonical, spec_id
from core.store import Run, write_json

KEEP = 2  # resume points
Listener = Callable[[str, dict[str, Any]], None]


class Diverged(Exception):
    """The loss or a gradient was not finite; the message names the first bad step."""


class Interrupted(Exception):
    """Asked to stop; everything is saved."""


class ResumeError(Exception):
    """A resume point cannot be gone on from bit by bit; the message says why."""


def _flat(state: steps.State) -> dict[str, torch.Tensor]:
    """The nested state as {"opt/exp_avg/1.weight": tensor, ...}."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        flat |= {f"{key}/{name}": t for name, t in _flat(value).items()} if isinstance(value, dict) else {key: value}
    return flat


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
        loosely: go on from a resume point made on other hardware or software, and say so in the record.
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
        self.state = jit.to_device(steps.init_state(spec), device)
        self.hyper = optim.hyper_tensors(spec, self.steps_per_epoch, device)
        self.data = {
            "images": data.train_images,
            "labels": data.train_labels,
            "order": torch.zeros(self.steps_per_epoch, spec["batch_size"], dtype=torch.int64, device=device),
        }
        # What a resume point carries beside the state for a whole record. `seconds` and `timed` (steps)
        # belong to the epoch under way.
        self.progress: dict[str, Any] = {
            "history": [],
            "seconds": 0.0,
            "timed": 0,
            "first_step_seconds": None,
            "bitwise": True,
        }

    def __call__(self) -> dict[str, Any]:
        """Train to the end; returns the record, which is then on disk.

        Raises:
            Diverged, Interrupted, ResumeError, core.store.StoreError.
        """
        step = self._resume()
        total = self.spec["epochs"] * self.steps_per_epoch
        advance: jit.Advance | None = None
        while step < total:
            self._start_epoch(step)
            end = (step // self.steps_per_epoch + 1) * self.steps_per_epoch
            if advance is None:
                advance = self._first_step()
                step += 1
            since = time.perf_counter()
            while step < end and not self.should_stop():
                advance()
                step += 1
                self.progress["timed"] += 1
                if step % 16 == 0:
                    self.listen("step", {"step": step})
            bad = self._first_bad_step()  # the one wait for the device of an epoch
            self.progress["seconds"] += time.perf_counter() - since
            if bad is not None:
                raise Diverged(
                    f"the loss or a gradient is NaN or infinite since step {bad + 1} (epoch {self._epoch(bad)}); "
                    f"the last good resume point is kept"
                )
            if step == end:
                self._end_epoch(step)
            finished = step // self.steps_per_epoch
            if step < end or step == total or finished % self.every == 0 or self.should_stop():
                self._save(step)
            if step < total and self.should_stop():
                raise Interrupted(f"stopped after step {step} of {total}, which is saved")
        return self._finish()

    def _first_step(self) -> jit.Advance:
        """The first step of this process, which compiles; where that fails, the same step eager."""
        try:
            advance = jit.fuse(self.spec, self.state, self.data, self.hyper, self.environment["mode"] == "compiled")
            advance()
        except jit.compile_errors() as error:
            self.environment["mode"] = "eager"
            self.listen("eager", {"reason": f"torch.compile failed: {str(error).strip().splitlines()[0][:200]}"})
            advance = jit.fuse(self.spec, self.state, self.data, self.hyper, compiled=False)
            advance()
        jit.synchronize(self.device)
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

    def _first_bad_step(self) -> int | None:
        bad = int(self.state["metrics"]["bad_step"].item())
        return None if bad == steps.NEVER else bad

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
            "seconds": round(seconds, 3),  # of the steps alone, without the one that compiles
            "samples_per_second": round(timed * self.spec["batch_size"] / seconds) if timed else None,
        }
        self.progress["history"].append(entry)
        self.progress |= {"seconds": 0.0, "timed": 0}
        self.listen("epoch", entry)

    def _evaluate(self, split: str) -> dict[str, Any]:
        images, labels, examples = self.splits[split]
        return steps.evaluate(self.state["params"], self.state["stats"], images, labels, self.spec, examples)

    def _meta(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "spec": self.spec,
            "spec_id": spec_id(self.spec),
            "seed": self.spec["seed"],
            "data": DIRECTORY_HASH,
            "environment": self.environment,
        }

    def failure(self, reason: str) -> dict[str, Any]:
        """The record of a run that failed: it claims no number."""
        return {**self._meta(), "status": "failed", "error": reason}

    def _save(self, step: int) -> None:
        checkpoint.save(self.run.resume_point(step), _flat(self.state), {**self._meta(), "progress": self.progress})
        for path in self.run.resume_points()[KEEP:]:
            path.unlink(missing_ok=True)

    def _resume(self) -> int:
        """Load the newest good resume point; returns its step, 0 without one."""
        points = self.run.resume_points()
        shapes = checkpoint.shapes_of(_flat(self.state))
        for path in points:
            try:
                tensors, meta = checkpoint.load(path, lambda _: shapes)
            except CheckpointError as error:
                self.listen("damaged", {"reason": str(error)})
                continue
            different = difference(meta["environment"], self.environment)
            if canonical(meta["spec"]) != canonical(self.spec) or meta["data"] != DIRECTORY_HASH:
                raise ResumeError(f"{path} is of another spec or other data; delete it, or use --force to start anew")
            if different and not self.loosely:
                raise ResumeError(
                    f"{path} was made with {different}: the rest would not be the same bits; go on all the same with "
                    f"--resume-anyway, or start anew with --force"
                )
            for name, value in _flat(self.state).items():
                value.copy_(tensors[name])
            self.progress = meta["progress"]
            self.progress["bitwise"] = self.progress["bitwise"] and not different
            step = int(tensors["step"])
            self.listen("resumed", {"step": step, "epoch": self._epoch(step), "different": different})
            return step
        if points:
            raise ResumeError(f"every resume point of {self.name} is damaged; start anew with --force")
        return 0

    def _finish(self) -> dict[str, Any]:
        """Evaluate on train, validation and test, write weights and record, drop the resume points."""
        weights = {**self.state["params"], **self.state["stats"]}
        # All in evaluation mode, unlike the running sums of the history. This is where the test split is read.
        metrics = {split: self._evaluate(split) for split in self.splits}
        if not math.isfinite(sum(m["loss"] for m in metrics.values())):
            raise Diverged("the network's loss is NaN or infinite after the last step")
        digest = checkpoint.digest(weights)
        record = {
            **self._meta(),
            "status": "finished",
            "parameters": sum(p.numel() for p in self.state["params"].values()),
            "history": self.progress["history"],
            "first_step_seconds": self.progress["first_step_seconds"],
            "metrics": metrics,
            "digest": digest,
            "bitwise": self.progress["bitwise"],
        }
        checkpoint.save(self.run.weights, weights, {**self._meta(), "digest": digest, "test": metrics["test"]})
        write_json(self.run.record, record)
        for path in self.run.resume_points():
            path.unlink(missing_ok=True)
        return record
