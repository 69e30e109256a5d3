"""The losses of the first 15 steps on fixed images, eager and compiled: a refactoring must not move them.

uv run python tests/test_golden.py      regenerates tests/golden.json
"""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.compile import fused  # noqa: E402
from core.data import cifar10 as dataset  # noqa: E402
from core.functional import augment, model, step  # noqa: E402
from core.functional.tree import leaves, tree_map  # noqa: E402
from core.spec import static  # noqa: E402
from tests.conftest import inputs_of_default  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 15


def in_float64(data):
    """The state before each step and the summed loss of it, all arithmetic in float64.

    In float32, rounding grows to a thousandth of the loss in 15 steps (Adam divides by the gradient's size, however
    small that is), and each kind of CPU rounds in its own way. In float64 all of them agree.
    """
    spec, state, *others = inputs_of_default(data)
    state = tree_map(lambda t: t.double() if t.is_floating_point() else t, state)
    normalise = augment.normalise
    states, losses = [], []
    with mock.patch.object(augment, "normalise", lambda images: normalise(images).double()):
        train_step = step.make_train_step(static(spec))
        for _ in range(STEPS):
            states.append(state)
            state = train_step(state, *others)
            losses.append((state["metrics"]["loss"] - states[-1]["metrics"]["loss"]).item())
    return states, losses


@pytest.fixture(scope="module")
def exact(cifar10):
    return in_float64(cifar10)


@pytest.mark.slow
def test_the_losses_are_the_golden_ones(exact):
    assert exact[1] == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-8)


# Any change of meaning is far larger than these bounds.
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_each_step_gives_the_golden_loss(cifar10, exact, precision, tolerance, compiled):
    """Two steps from each second state of the run in float64; the second one shows the update of the first."""
    spec, buffers, *others = inputs_of_default(cifar10, precision=precision)
    advance = fused.fuse(spec, buffers, *others, compiled).advance
    states, golden = exact
    found = []
    for n in range(STEPS):
        if n % 2 == 0:
            start = {**states[n], "effective": model.effective(states[n]["params"], spec)}
            for buffer, value in zip(leaves(buffers), leaves(start), strict=True):
                buffer.copy_(value)
        before = buffers["metrics"]["loss"].item()
        advance()
        found.append(buffers["metrics"]["loss"].item() - before)
    assert found == pytest.approx(golden, rel=tolerance)
    if precision == "bfloat16":  # the negative control: it is bfloat16 that was used
        assert found != pytest.approx(golden, rel=1e-5)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(in_float64(dataset.load(ROOT / "data"))[1], indent=1) + "\n")
