"""Experiments as plain dicts, grouped in suites; a key that is left out takes its default (core/spec.py).

`uv run main.py` runs the suite DEFAULT. To add an experiment, add a dict under a new name to one of the modules, or a
new module with a SUITE to the list below, then `uv run main.py run NAME`. A list in the place of a value is a grid:
"wide": {"lr": [1e-3, 5e-4], "dropout": [0, 0.2]} stands for four experiments, wide-lr=0.001-dropout=0 and so on.

A suite is an ablation if ABLATIONS names it, with its plain and its full experiment. results.md then compares the other
experiments of the suite with these two, and says for each that differs in one key what that change is worth.
"""

from typing import Any

from experiments import ablation, baseline, learning_rate, records

DEFAULT = "learning-rate"
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    DEFAULT: learning_rate.SUITE,
    **baseline.SUITES,
    "ablation": ablation.SUITE,
    **records.SUITES,
}
ABLATIONS: dict[str, dict[str, str]] = {"ablation": ablation.ENDS, **records.ABLATIONS}
