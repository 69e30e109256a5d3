"""Spaces to search: specs in which a value is a range or a list of choices.

uv run main.py search search-default        60 trials, and then a comparison on fresh seeds: hours (docs/search.md)
uv run main.py search search-local-minute   the same for local layers, each trial with the arithmetic of `minute`

`base` is the experiment that a space varies: a key that the space leaves out has the value of the base. A range is
{"low": 1, "high": 8}, with "log": True where the order of magnitude counts; {"choices": [...]} lists the values.
"""

from typing import Any

SEARCHES: dict[str, dict[str, Any]] = {
    "search-default": {
        "base": "lr-1e-3",
        "epochs": 20,
        "precision": "bfloat16",
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "dropout": {"low": 0.0, "high": 0.5},
        "weight_decay": {"choices": [0.0, 1e-5, 1e-4, 1e-3]},
        "schedule": {"choices": ["constant", "linear", "cosine", "one-cycle"]},
        "warmup_epochs": {"choices": [0.0, 1.0, 2.0]},
        "batch_size": {"choices": [128, 256, 512]},
        "widths": {"choices": [[512, 256], [1024, 512, 256], [1024, 1024, 512], [2048, 1024, 512]]},
    },
    # On all images, 16 epochs of each of these widths are 0.026 to 0.027 petaFLOP, as is `minute`.
    "search-local-minute": {
        "base": "minute-full",
        "widths": {"choices": [[1024, 1024, 512], [1280, 512, 512], [896, 896, 896, 512], [768, 1024, 1024, 512]]},
        "locality": {"choices": [[3.0], [2.0, 5.0], [2.0, 5.0, 10.0], [1.5, 3.0, 6.0], [2.0, 4.0, 8.0, 16.0]]},
        "lr": {"low": 1e-3, "high": 6e-3, "log": True},
        "schedule": {"choices": ["constant", "cosine"]},
        "dropout": {"low": 0.0, "high": 0.2},
        "weight_decay": {"choices": [0.03, 0.1, 0.3]},
        "shift": {"low": 1, "high": 4},
        "shift_fill": {"choices": ["zeros", "reflect"]},
    },
}
