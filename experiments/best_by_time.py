"""Recipes for the best accuracy in a given time of training, with bfloat16.

The times are those of two CPU cores with AVX512_BF16 or AMX, and for `gpu` of a GPU.

uv run main.py run minute                           about a minute of training
uv run main.py run ten-minutes                      ten minutes
uv run main.py run hour                             an hour
uv run main.py run two-hours                        two hours
uv run main.py run gpu                              six minutes on an NVIDIA H200; more than a day on two CPU cores
uv run main.py run minute-ablation --seeds 3        what each ingredient of `minute` is worth: an hour or more

All but `gpu` have local layers. `two-hours` is no better than `hour`. `gpu` is dense, and less accurate than
`ten-minutes`. The recipes train on all images, and so have no validation accuracy. The suite `minute-ablation` trains
`minute` and its variants with the validation split held out; docs/accuracy.md has the search. These are guesses: the
widths, dropout, epochs and EMA of `hour`; the dropout, epochs and EMA of `two-hours`; the widths (but not the fourth
layer), dropout, mixup, epochs and EMA of `gpu`.
"""

from typing import Any

SHARED: dict[str, Any] = {
    "activation": "gelu",
    "augment": "flip+shift",
    "whiten": 400,
    "optimizer": "adamw",
    "warmup_epochs": 2.0,
    "weight_decay": 0.1,
    "label_smoothing": 0.1,
    "precision": "bfloat16",
}

MINUTE: dict[str, Any] = {
    **SHARED,
    "widths": [1024, 1024, 512],
    "locality": [2.0, 5.0],
    "dropout": 0.0,
    "batch_size": 512,
    "epochs": 16,
    "lr": 5e-3,
    "ema": 0.998,
}

TEN_MINUTES: dict[str, Any] = {
    **SHARED,
    "widths": [1536, 2048, 1536, 1024],
    "locality": [1.5, 3.0, 6.0],
    "dropout": 0.05,
    "shift": 4,
    "shift_fill": "reflect",
    "batch_size": 512,
    "epochs": 53,
    "lr": 4e-3,
    "ema": 0.999,
}

HOUR: dict[str, Any] = {
    **SHARED,
    "widths": [2048, 2560, 2048, 1024],
    "locality": [1.5, 3.0, 6.0],
    "dropout": 0.15,
    "shift": 4,
    "shift_fill": "reflect",
    "cutout": 8,
    "batch_size": 512,
    "epochs": 180,
    "lr": 5e-3,
    "schedule": "cosine",
    "ema": 0.9995,
}

TWO_HOURS: dict[str, Any] = {**HOUR, "widths": [3072, 2560, 1536, 1024], "dropout": 0.2, "epochs": 285}

GPU: dict[str, Any] = {
    **SHARED,
    "widths": [8192, 4096, 4096, 4096],
    "dropout": 0.5,
    "shift": 4,
    "shift_fill": "reflect",
    "cutout": 8,
    "mixup": 0.1,
    "batch_size": 1024,
    "epochs": 4540,
    "lr": 3e-3,
    "schedule": "cosine",
    "ema": 0.9998,
}

# Keys with the same value in all runs of `minute-ablation`. The other keys of MINUTE are its ingredients.
FRAME = ("widths", "batch_size", "epochs", "optimizer", "lr", "warmup_epochs")

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "best-by-time": {
        "minute": {**MINUTE, "train_on": "all"},
        "ten-minutes": {**TEN_MINUTES, "train_on": "all"},
        "hour": {**HOUR, "train_on": "all"},
        "two-hours": {**TWO_HOURS, "train_on": "all"},
        "gpu": {**GPU, "train_on": "all"},
    },
    # The recipe, the default network in its widths, and the recipe with one key at its default.
    "minute-ablation": {
        "minute-plain": {key: MINUTE[key] for key in FRAME},
        "minute-gelu": {**MINUTE, "activation": "leaky_relu"},
        "minute+dropout": {**MINUTE, "dropout": 0.2},
        "minute-augment": {**MINUTE, "augment": "none"},
        "minute-locality": {**MINUTE, "locality": []},
        "minute-whiten": {**MINUTE, "whiten": 0},
        "minute-weight_decay": {**MINUTE, "weight_decay": 0.0},
        "minute-label_smoothing": {**MINUTE, "label_smoothing": 0.0},
        "minute-ema": {**MINUTE, "ema": 0.0},
        "minute-bfloat16": {**MINUTE, "precision": "float32"},
        "minute-full": MINUTE,
    },
}
ABLATIONS = {"minute-ablation": {"plain": "minute-plain", "full": "minute-full"}}
