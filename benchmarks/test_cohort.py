"""Cohorts of 1 to 64 members: model-samples a second (images times members), against the same runs one by one."""

import pytest

from benchmarks import harness
from benchmarks.conftest import DEVICES
from core.compile import fused
from core.compile.device import synchronize
from core.data.loader import epoch_order
from core.spec import resolve
from core.train import Training, stack

NETWORKS = {"narrow": {"widths": [64, 32], "batch_size": 256}, "default": {"batch_size": 256}}
SIZES = {"narrow": (1, 4, 16, 64), "default": (1, 4)}  # 64 of the default network need 3 GB and a quarter of a minute


def member(data, changes, seed):
    training = Training(resolve({**changes, "seed": seed}), data, data.train_images.device)
    training.data["order"].copy_(epoch_order(training.examples, training.spec["batch_size"], seed, 0))
    return training


@pytest.mark.benchmark(group="cohort", timer=harness.replay)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_cohort(network, device, data_on, benchmark, board, choose):
    data, changes = data_on(device), NETWORKS[network]
    steps, images = 8, changes["batch_size"]

    def advance(size):
        members = [member(data, changes, seed) for seed in range(size)]
        trees = stack(members) if size > 1 else (members[0].state, members[0].data, members[0].hyper)
        step = fused.fuse(members[0].spec, *trees).advance

        def run():
            for _ in range(steps):
                step()
            synchronize(data.train_images.device)

        return harness.timed(run)

    seconds = harness.interleave({str(size): advance(size) for size in SIZES[network]}, choose(9, 5))
    found = {size: harness.Result(seconds[str(size)], steps * images * size, None) for size in SIZES[network]}
    for size, result in found.items():
        # One by one, as many members would take that many times as long as one.
        ratio = size * result.ratio(found[1])
        benchmark.extra_info[f"model_samples_per_second_{size}"] = round(result.samples_per_second)
        board.lines.append(
            f"Cohort of {size} ({network}, {device}): {result.samples_per_second:,.0f} model-samples/s, "
            f"{ratio:.2f} times one by one"
        )
    harness.replay.report(benchmark, seconds["1"])
