"""Which change pays: the baseline with one change at a time, and the full network without one at a time.

uv run main.py run ablation --seeds 3       about 30 minutes on two CPU cores

The first and the last are the same runs as in the suites baseline and learning-rate, and are not trained twice.
"""

from typing import Any

from experiments import baseline
from experiments.learning_rate import SUITE as LEARNING_RATES

BASELINE = baseline.SUITES["baseline"]["baseline"]
FULL = LEARNING_RATES["lr-1e-3"]

SUITE: dict[str, dict[str, Any]] = {
    "baseline": BASELINE,
    "baseline+depth": {**BASELINE, "widths": [1024, 512, 256]},
    "baseline+norm": {**BASELINE, "norm": "batch"},
    "baseline+dropout": {**BASELINE, "dropout": 0.2},
    "baseline+leaky_relu": {**BASELINE, "activation": "leaky_relu"},
    "full-depth": {**FULL, "widths": [512]},
    "full-norm": {**FULL, "norm": "none"},
    "full-dropout": {**FULL, "dropout": 0.0},
    "full-leaky_relu": {**FULL, "activation": "relu"},
    "lr-1e-3": FULL,
}
ENDS = {"plain": "baseline", "full": "lr-1e-3"}
