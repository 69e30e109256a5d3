"""The losses of the first 15 steps on fixed images: a refactoring must not move them.

uv run python tests/test_golden.py      regenerates tests/golden.json, for this torch and this kind of CPU
"""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.functional import optim, step  # noqa: E402
from core.spec import resolve  # noqa: E402
from tests.conftest import lacking  # noqa: E402

GOLDEN = Path(__file__).with_name("golden.json")
KEY = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def losses(data):
    """The summed loss of each of 15 steps of the default network, at batch 128, on the first 1,920 images."""
    spec = resolve({"batch_size": 128})
    state = step.init_state(spec)
    order = torch.arange(15 * 128).view(15, 128)
    inputs = {"images": data.train_images, "labels": data.train_labels, "order": order}
    hyper = optim.hyper_tensors(spec, 15, torch.device("cpu"))
    train_step = step.make_train_step(spec)
    found, before = [], 0.0
    for _ in range(15):
        state = train_step(state, inputs, hyper)
        found.append(state["metrics"]["loss"].item() - before)
        before += found[-1]
    return found


@pytest.mark.slow
def test_the_losses_are_the_golden_ones(cifar10):
    golden = json.loads(GOLDEN.read_text())
    if KEY not in golden:
        lacking(f"no golden losses for {KEY}: `uv run python tests/test_golden.py` adds them")
    # Two CPUs of one kind may round apart; any change of meaning is far larger.
    assert losses(cifar10) == pytest.approx(golden[KEY], rel=1e-4)


if __name__ == "__main__":
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    known[KEY] = losses(cifar10.load(ROOT / "data"))
    GOLDEN.write_text(json.dumps(known, indent=1) + "\n")
