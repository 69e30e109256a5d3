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


def profiled(play, device):
    """The seconds that `play` takes under the profiler, and for how many of them kernels run (on a CPU, ATen's
    operations)."""
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * (device == "cuda")]) as profile:
        seconds = harness.timed(play)()
    outermost = [event for event in profile.events() if event.device_type == kind and event.cpu_parent is None]
    return seconds, sum(event.time_range.elapsed_us() for event in outermost) / 1e6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_share_of_kernels(device, precision, data_on, board):
    """Of the time of a step, how much its kernels take: the rest waits for the host. On a CPU there is no such waiting,
    and the eager peer shows that the measurement works."""
    cuda = device == "cuda"
    contestant = harness.build(harness.Entry(harness.OURS if cuda else "eager", precision), data_on(device), 256)

    def play():
        contestant.run(200 if cuda else 5)

    play()
    seconds, busy = profiled(play, device)
    if cuda:  # where the profiler slows the host down, but not the kernels
        seconds = min(harness.timed(play)() for _ in range(3))
        board.lines.append(f"Kernels take {busy / seconds:.0%} of a step of batch 256 in {precision} on CUDA")
    assert 0.5 < busy / seconds < 1.05
