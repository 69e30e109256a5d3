"""Experiments as plain dicts, grouped in suites; a key that is left out takes its default (core/spec.py).

`uv run main.py` runs the suite DEFAULT. To add an experiment, add a dict under a new name to one of the modules, or a
new module with a SUITE to the list below, then `uv run main.py run NAME`.
"""

from typing import Any

from experiments import learning_rate, recipes

DEFAULT = "learning-rate"
SUITES: dict[str, dict[str, dict[str, Any]]] = {DEFAULT: learning_rate.SUITE, **recipes.SUITES}
EXPERIMENTS: dict[str, dict[str, Any]] = {name: spec for suite in SUITES.values() for name, spec in suite.items()}
