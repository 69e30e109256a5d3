"""Writes runs for TensorBoard (https://docs.pytorch.org/docs/stable/tensorboard.html)."""

from pathlib import Path
from typing import Any

from core.errors import UserError
from core.events import Ended, EpochDone, Event, Stopped
from core.runs.record import Epoch, Finished, Record
from core.runs.run import Run


class TensorBoard:
    """A listener. It writes the losses, accuracies and learning rate of each epoch. At the end it writes the
    hyper-parameters with the validation accuracy. Each run has a folder, out/tensorboard/NAME/ID.

    Raises:
        core.errors.UserError: TensorBoard is not installed.
    """

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError:
            raise UserError("TensorBoard is not installed: `uv run --group tensorboard main.py ...` has it") from None
        self.torch, self.folder = tensorboard, out / "tensorboard"
        self.writers: dict[Run, Any] = {}

    def __call__(self, run: Run, event: Event) -> None:
        match event:
            case EpochDone():
                self._write(run, event)
                self.writers[run].add_scalar("learning rate", event.lr, event.epoch)
            case Ended(record):
                self._end(run, record)
            case Stopped():
                self._close(run)

    def _write(self, run: Run, epoch: EpochDone | Epoch) -> None:
        if run not in self.writers:
            # TensorBoard then ignores what earlier calls wrote for this epoch and later ones.
            folder = str(self.folder / run.name / run.id)
            self.writers[run] = self.torch.SummaryWriter(folder, purge_step=epoch.epoch)
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            if (value := getattr(epoch, name)) is not None:
                split, what = name.split("_")
                self.writers[run].add_scalar(f"{what}/{'validation' if split == 'val' else split}", value, epoch.epoch)

    def _end(self, run: Run, record: Record) -> None:
        if isinstance(record, Finished):
            if run not in self.writers:  # another process or machine has trained it
                for epoch in record.history:
                    self._write(run, epoch)
            validation = record.metrics.validation
            results = {"accuracy/validation": validation.accuracy} if validation else {}
            keys = {key: str(value) if isinstance(value, list) else value for key, value in run.spec.items()}
            for summary in self.torch.summary.hparams(keys, results):
                self.writers[run].file_writer.add_summary(summary)
            for name, value in results.items():
                self.writers[run].add_scalar(name, value, len(record.history))
        self._close(run)

    def _close(self, run: Run) -> None:
        if run in self.writers:
            self.writers.pop(run).close()
