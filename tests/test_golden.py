"""The losses of the first 15 steps on fixed images, eager and compiled: a refactoring must not move them.

uv run python tests/test_golden.py      regenerates tests/golden.json, for this torch and this kind of CPU
"""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.compile import fused  # noqa: E402
from core.data import cifar10 as dataset  # noqa: E402
from core.functional import step  # noqa: E402
from core.functional.tree import leaves, tree_map  # noqa: E402
from tests.conftest import inputs_of_default, lacking  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.json")
KEY = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
STEPS = 15


def eager(data):
    """The summed loss of each step."""
    spec, state, *others = inputs_of_default(data)
    train_step = step.make_train_step(spec)
    found, before = [], 0.0
    for _ in range(STEPS):
        state = train_step(state, *others)
        found.append(state["metrics"]["loss"].item() - before)
        before += found[-1]
    return found


def compiled(data):
    """The same of the compiled step. It takes two steps from each second state of the eager run: in 15 steps, rounding
    grows to a thousandth of the loss (Adam divides by the gradient's size, however small that is)."""
    spec, state, *others = inputs_of_default(data)
    buffers, train_step, found = tree_map(torch.clone, state), step.make_train_step(spec), []
    advance = fused.fuse(spec, buffers, *others)
    for n in range(STEPS):
        if n % 2 == 0:
            for buffer, value in zip(leaves(buffers), leaves(state), strict=True):
                buffer.copy_(value)
        before = buffers["metrics"]["loss"].item()
        advance()
        found.append(buffers["metrics"]["loss"].item() - before)
        state = train_step(state, *others)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [eager, compiled])
def test_the_losses_are_the_golden_ones(cifar10, how):
    golden = json.loads(GOLDEN.read_text())
    if KEY not in golden:
        lacking(f"no golden losses for {KEY}: `uv run python tests/test_golden.py` adds them")
    # Two CPUs of one kind may round apart; any change of meaning is far larger.
    assert how(cifar10) == pytest.approx(golden[KEY], rel=1e-4)


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known[KEY] = eager(dataset.load(ROOT / "data"))
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
