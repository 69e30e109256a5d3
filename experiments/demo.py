"""A run that shows that everything works, on data that is made from a seed: no download, no compiler, seconds.

uv run main.py run demo
"""

SUITE = {
    "demo": {
        "dataset": "synthetic",
        "widths": [64, 32],
        "dropout": 0.0,
        "lr": 2e-3,
        "epochs": 5,
        "batch_size": 200,
    },
}
