"""Spaces to search: specs in which a value is a range or a list of choices.

uv run main.py search search-default        about 20 minutes on two CPU cores, and then a comparison on fresh seeds

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
}
