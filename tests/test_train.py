"""The loop: what it measures."""

import pytest
import torch

from core import train
from core.events import EpochDone
from core.mode import Mode
from core.spec import resolve
from core.train import Stopwatch, Training, fit

SPEC = resolve({"widths": [8], "epochs": 2, "batch_size": 100, "seed": 1})  # ten steps an epoch of the invented data


class Clock:
    """Replaces `time` in core.train: a clock that only moves when a test moves it."""

    def __init__(self):
        self.wall = self.cpu = 100.0

    def perf_counter(self):
        return self.wall

    def process_time(self):
        return self.cpu

    def go(self, wall, cpu):
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(train, "time", clock)
    return clock


def epochs(data, clock, pause_before, members=1):
    """The numbers of the epochs of a run, or of a cohort: its steps take 10 ms, and before one is a pause of 40 s."""
    device = torch.device("cpu")
    trainings = [Training({**SPEC, "seed": seed}, data, device, Mode("eager")) for seed in range(members)]

    def between_steps():
        clock.go(40.0 if trainings[0].step == pause_before else 0.0, 0.0)
        clock.go(0.01, 0.02)  # two threads
        return False

    return [event for _, event in fit(trainings, between_steps) if isinstance(event, EpochDone)]


@pytest.mark.parametrize("pause_before", [5, 15])
def test_a_pause_is_not_training(invented, clock, pause_before):
    """Ctrl-Z for 40 s, in the first or the second epoch. The first step, which compiles, and the step with the pause
    are not timed."""
    paused = epochs(invented, clock, pause_before)
    assert [entry.samples_per_second for entry in paused] == [10_000, 10_000]
    assert [entry.seconds for entry in paused] == ([0.08, 0.1] if pause_before == 5 else [0.09, 0.09])


def test_without_a_pause_every_step_counts(invented, clock):
    measured = epochs(invented, clock, None)
    assert [entry.seconds for entry in measured] == [0.09, 0.1]
    assert [entry.samples_per_second for entry in measured] == [10_000, 10_000]


def test_a_pause_of_a_cohort_is_not_training(invented, clock):
    found = epochs(invented, clock, 5, members=2)
    assert [entry.seconds for entry in found] == [0.04, 0.04, 0.05, 0.05]
    assert {entry.samples_per_second for entry in found} == {20_000}


@pytest.mark.parametrize(
    ("wall", "cpu", "usual", "counts"),
    [
        (40.0, 0.02, 0.0, False),  # a pause
        (40.0, 39.0, 0.0, True),  # a step of a large network on one thread
        (40.0, 6.0, 0.0, True),  # the same beside many other processes
        (0.9, 0.0, 0.0, True),  # too short to tell
        (5.0, 0.0, 1.0, True),  # a wait for a device that needs no CPU meanwhile
        (40.0, 0.0, 1.0, False),  # a pause in such a wait
        (40.0, 0.0, float("inf"), True),  # nobody knows yet
    ],
)
def test_what_is_a_pause(clock, wall, cpu, usual, counts):
    watch = Stopwatch()
    clock.go(wall, cpu)
    assert watch.lap(usual) == watch.seconds == (pytest.approx(wall) if counts else 0.0)
    clock.go(0.5, 0.5)
    assert watch.lap() == pytest.approx(0.5)
