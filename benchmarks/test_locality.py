"""What locality costs: steps with it and without it, in turn."""

import pytest

from benchmarks import harness, peers

RECIPE = {
    "activation": "gelu",
    "dropout": 0.0,
    "augment": "flip+shift",
    "shift": 4,
    "shift_fill": "reflect",
    "batch_size": 512,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "label_smoothing": 0.1,
    "ema": 0.998,
    "precision": "bfloat16",
}
NETWORKS = {
    "small": {"widths": [1024, 1024, 512], "locality": [2.0, 5.0]},
    "large": {"widths": [2048, 2048, 2048, 1024], "locality": [1.5, 3.0, 6.0]},
}


@pytest.mark.benchmark(group="locality", timer=harness.replay)
@pytest.mark.parametrize("network", NETWORKS)
def test_locality(network, data, benchmark, board, choose):
    if network == "large" and not choose(1, 0):
        pytest.skip("only with --long")
    local = {**RECIPE, **NETWORKS[network]}
    contestants = {"local": peers.Runs(data, local), "dense": peers.Runs(data, {**local, "locality": []})}
    steps = 4
    plays = {name: harness.timed(lambda c=contestant: c.run(steps)) for name, contestant in contestants.items()}
    seconds = harness.interleave(plays, choose(60, 25))
    found = {name: harness.Result(seconds[name], steps * local["batch_size"], None) for name in plays}
    times = found["dense"].ratio(found["local"])
    benchmark.extra_info |= {"samples_per_second": round(found["local"].samples_per_second), "times_dense": times}
    widths = "-".join(map(str, local["widths"]))
    board.lines.append(f"A step of {widths} with locality {local['locality']}: {times:.3f} times that of dense layers")
    harness.replay.report(benchmark, seconds["local"])
