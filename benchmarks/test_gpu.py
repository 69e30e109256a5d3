"""CUDA: the epoch against the peers in three precisions, and how much of a step's time its kernels take."""

import pytest
import torch

from benchmarks import harness
from benchmarks.conftest import BATCHES, DEVICES
from benchmarks.test_epoch import report


@pytest.mark.gpu
@pytest.mark.benchmark(group="epoch on CUDA", timer=harness.replay)
@pytest.mark.parametrize("name", harness.contestants("cuda"))
@pytest.mark.parametrize("batch", BATCHES)
def test_epoch(batch, name, epochs, benchmark):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here: NOT RUN")
    if reason := harness.missing(harness.contestants("cuda")[name].kind, "cuda"):
        pytest.skip(reason)
    report(epochs(batch, "cuda"), name, benchmark)


def busy_seconds(play, device):
    """The seconds for which kernels run while `play` does; on a CPU, ATen's operations."""
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * (device == "cuda")]) as profile:
        play()
    outermost = [event for event in profile.events() if event.device_type == kind and event.cpu_parent is None]
    return sum(event.time_range.elapsed_us() for event in outermost) / 1e6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_share_of_kernels(device, precision, data_on, board):
    """Of the time of a step, how much its kernels take: the rest waits for the host. On a CPU there is no such waiting,
    and the eager peer shows that the measurement works."""
    kind = harness.OURS if device == "cuda" else "eager"
    contestant = harness.build(harness.Entry(kind, precision), data_on(device), 256)
    steps = 200 if device == "cuda" else 5
    contestant.run(3)
    wall = min(harness.timed(lambda: contestant.run(steps))() for _ in range(3))  # the profiler slows the host down
    share = busy_seconds(lambda: contestant.run(steps), device) / wall
    if device == "cuda":
        board.lines.append(f"Kernels take {share:.0%} of a step of batch 256 in {precision} on CUDA")
    assert 0.5 < share < (1.05 if device == "cuda" else 2)
