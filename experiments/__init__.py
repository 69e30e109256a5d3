"""Experiments as plain dicts, grouped in suites; a key that is left out takes its default (core/spec.py).

`uv run main.py` runs the suite DEFAULT. To add an experiment, add a dict under a new name to one of the modules, or a
new module with a SUITE to the list below, then `uv run main.py run NAME`. A list in the place of a value is a grid:
"wide": {"lr": [1e-3, 5e-4], "dropout": [0, 0.2]} stands for four experiments, wide-lr=0.001-dropout=0 and so on.

The name of a variant has a minus before what is left out and a plus before what is added: `full-dropout` has no
dropout, `minute+dropout` has dropout. FORMER_NAMES has the old names of experiments and suites. They still work on the
command line, and runs under an old name are found.

A suite is an ablation if ABLATIONS names it, with its plain and its full experiment. results.md then compares the other
experiments of the suite with these two, and says for each that differs in one key what that change is worth.

SEARCHES has the spaces of `uv run main.py search NAME`.
"""

from typing import Any

from experiments import ablation, baseline, best_by_time, demo, learning_rate, searches

DEFAULT = "learning-rate"
SUITES: dict[str, dict[str, dict[str, Any]]] = {
    DEFAULT: learning_rate.SUITE,
    **baseline.SUITES,
    "ablation": ablation.SUITE,
    **best_by_time.SUITES,
    "demo": demo.SUITE,
}
SEARCHES: dict[str, dict[str, Any]] = searches.SEARCHES
ABLATIONS: dict[str, dict[str, str]] = {"ablation": ablation.ENDS, **best_by_time.ABLATIONS}
FORMER_NAMES = {
    "minute-activation": "minute-gelu",
    "minute-dropout": "minute+dropout",
    "minute-precision": "minute-bfloat16",
    "records": "best-by-time",
}
