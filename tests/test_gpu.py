"""What is promised of the CPU holds on CUDA too. Each check is a function of the device: it runs on the CPU everywhere,
and on CUDA where there is one (`pytest -m gpu tests benchmarks`).
"""

import pytest
import torch

from core import run_experiment
from core.compile import fused
from core.compile.device import to_device
from core.events import Stopped
from core.functional import step as steps
from core.functional.tree import flatten
from core.runs.run import Run
from core.spec import static

ON = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
NO_COMPILER = fused.compiler_problem(torch.device("cpu"))


@pytest.fixture(params=ON)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here: NOT RUN")
    return torch.device(request.param)


@pytest.fixture
def inputs(default_inputs, device):
    """Spec, state, data and hyper-parameters of the default network, new buffers on the device."""

    def make(**changes):
        spec, *trees = default_inputs(**changes)
        return spec, *(to_device(tree, device) for tree in trees)

    return make


@pytest.fixture
def compiled(inputs):
    """A function from a number of steps to the flat state after them, on the CPU, and the call that advances it."""
    if NO_COMPILER:
        pytest.skip(NO_COMPILER)

    def train(count, **changes):
        spec, state, data, hyper = inputs(**changes)
        advance = fused.fuse(spec, state, data, hyper).advance
        for _ in range(count):
            advance()
        return {name: t.cpu().clone() for name, t in flatten(state).items()}, advance

    return train


@pytest.mark.slow
def test_a_compiled_step_is_near_the_eager_one_on_a_cpu(compiled, default_inputs):
    """The gradients, as the first moments hold them, the statistics and the loss, within 1e-4. Parameters say less:
    Adam's first step is as long where a gradient is mere rounding error."""
    found, _ = compiled(1)
    spec, *trees = default_inputs()
    expected = flatten(steps.make_train_step(static(spec))(*trees))
    for name, value in expected.items():
        if name.startswith(("opt/exp_avg/", "stats/", "metrics/loss")):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_same_bits_twice(compiled):
    first, again = compiled(3)[0], compiled(3)[0]
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.slow
def test_the_host_does_no_work_in_a_step(compiled, inputs, device):
    """One replay of a graph on CUDA; on a CPU one call of a library, whose products need buffers and views."""
    _, advance = compiled(1)
    found = operations(advance)
    assert found <= (set() if device.type == "cuda" else {"aten::empty", "aten::resolve_conj"})
    spec, state, data, hyper = inputs()
    assert "aten::mm" in operations(fused.fuse(spec, state, data, hyper, compiled=False).advance), (
        "the negative control"
    )


def operations(advance):
    """Names of the operations that the host dispatches in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        advance()
    return {event.name for event in profile.events() if event.name.startswith("aten::")}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_losses_of_fewer_bits_are_near_those_of_float32(inputs, device, precision):
    """Over ten steps; compiled on CUDA, and eager on a CPU, where compiling takes half a minute."""

    def losses(precision):
        spec, state, data, hyper = inputs(precision=precision)
        advance = fused.fuse(spec, state, data, hyper, compiled=device.type == "cuda").advance
        sums = [0.0]
        for _ in range(10):
            advance()
            sums.append(state["metrics"]["loss"].item())
        return torch.tensor(sums).diff() / spec["batch_size"]

    torch.testing.assert_close(losses(precision), losses("float32"), rtol=0.02, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(device, invented, small_spec, tmp_path):
    """Stopped in the middle of the second of three epochs; compiled on CUDA, eager on a CPU."""
    spec = small_spec(epochs=3)

    def train(out, stop_after=10**9):
        left = iter(range(stop_after))
        return run_experiment(
            "x",
            spec,
            tmp_path / out,
            invented,
            device,
            should_stop=lambda: next(left, None) is None,
            compiled=device.type == "cuda",
        )

    expected = train("uninterrupted")
    assert isinstance(train("cut", 20), Stopped)
    assert Run("x", spec, tmp_path / "cut").resume_points()
    again = train("cut")
    assert again.digest == expected.digest
    assert again.environment.device == device.type
    assert again.environment.mode == ("compiled" if device.type == "cuda" else "eager")
