"""A checkpoint written and read: the state of the default network with its optimizer."""

import pytest

from core.functional import step as steps
from core.runs import checkpoint
from core.spec import resolve


@pytest.fixture(scope="module")
def tensors():
    state = steps.init_state(resolve({}))
    parts = (state["params"], state["stats"], *state["opt"].values())
    return {f"{i}/{name}": t for i, part in enumerate(parts) for name, t in part.items()}


def speed(benchmark, tensors):
    """Put megabytes a second into the benchmark's extra_info."""
    if benchmark.stats:
        size = sum(t.nbytes for t in tensors.values())
        benchmark.extra_info["megabytes_per_second"] = round(size / 1e6 / benchmark.stats.stats.median)


@pytest.mark.benchmark(group="files")
def test_write(tensors, tmp_path, benchmark):
    path = tmp_path / "state.safetensors"
    benchmark.pedantic(checkpoint.save, args=(path, tensors, {}), rounds=10, warmup_rounds=2)
    speed(benchmark, tensors)


@pytest.mark.benchmark(group="files")
def test_refuse(tensors, tmp_path, benchmark, board):
    """One bit of the last tensor flipped: the whole file must be hashed before that is known."""
    path, shapes = tmp_path / "state.safetensors", checkpoint.shapes_of(tensors)
    checkpoint.save(path, tensors, {})
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def refuse():
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(path, dict, lambda _: shapes)

    benchmark.pedantic(refuse, rounds=10, warmup_rounds=2)
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        board.lines.append(f"A checkpoint of {len(data) / 1e6:.0f} MB with a flipped bit is refused in {seconds:.3f} s")


@pytest.mark.benchmark(group="files")
def test_read(tensors, tmp_path, benchmark):
    path, shapes = tmp_path / "state.safetensors", checkpoint.shapes_of(tensors)
    checkpoint.save(path, tensors, {})
    benchmark.pedantic(checkpoint.load, args=(path, dict, lambda _: shapes), rounds=10, warmup_rounds=2)
    speed(benchmark, tensors)
