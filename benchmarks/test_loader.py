"""The loader alone: a batch gathered and normalised, and the order of an epoch."""

import pytest
import torch

from benchmarks import peers
from core.compile.device import synchronize
from core.data import loader
from core.functional import augment


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize("batch", [128, 512])
def test_gather_and_normalise(batch, data, benchmark):
    """Compiled, as inside the step."""
    work = peers.Work(data, batch)
    gather = torch.compile(
        lambda images, examples: augment.normalise(images.index_select(0, examples)), fullgraph=True, dynamic=False
    )
    rows = iter(work.order.repeat(2, 1))

    def run() -> None:
        gather(work.images, next(rows))
        synchronize(work.device)

    benchmark.pedantic(run, rounds=80, warmup_rounds=10)
    if benchmark.stats:
        benchmark.extra_info["samples_per_second"] = round(batch / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="loader")
def test_epoch_order(data, benchmark):
    examples = loader.split(data.train_labels.cpu())[0]
    benchmark.pedantic(loader.epoch_order, args=(examples, 128, 0, 0), rounds=50, warmup_rounds=5)
