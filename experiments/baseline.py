"""What the network is compared with, and a run that only shows that everything works.

uv run main.py run baseline     about 1 minute on two CPU cores
uv run main.py run smoke        seconds
"""

SUITES = {
    "baseline": {
        "baseline": {"widths": [512], "norm": "none", "activation": "relu", "dropout": 0.0, "lr": 1e-3},
    },
    "smoke": {
        "smoke": {"widths": [64, 32], "epochs": 2, "batch_size": 500},
    },
}
