"""Experiment specs: the defaults, what each key may be, the resolved spec and its id. Knows no tensor."""

import difflib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from core.errors import UserError

Spec = dict[str, Any]
LARGEST = sys.float_info.max


class SpecError(UserError, ValueError):
    """A spec that cannot be run."""


class Field(NamedTuple):
    """A key of a spec.

    Attributes:
        default: the value of a spec that leaves the key out. It never changes: ids are built on it (see `spec_id`).
        expected: what a value may be, in words.
        valid: whether a value may be used.
    """

    default: Any
    expected: str
    valid: Callable[[Any], bool]


def _integer(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float, above: bool = False) -> tuple[str, Callable[[Any], bool]]:
    """A number in [low, high), or in (low, high) when `above`."""
    words = f"a number {'above' if above else 'of at least'} {low:g} and below {high:g}"
    # The largest float bounds integers, which else could be too large to be made one.
    return words, lambda v: type(v) in (int, float) and (low < v if above else low <= v) and v < min(high, LARGEST)


def _choice(*options: str) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(options), lambda v: isinstance(v, str) and v in options


def _widths(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= 16
        and all(type(width) is int and 1 <= width <= 65536 for width in value)
    )


FIELDS: dict[str, Field] = {
    # The network
    "widths": Field([1024, 512, 256], "a list of at most 16 integers from 1 to 65536", _widths),
    "expansion": Field(0, *_integer(0, 16)),  # 0: plain layers; else residual blocks that widen so many times
    "norm": Field("batch", *_choice("batch", "layer", "none")),
    "activation": Field("leaky_relu", *_choice("leaky_relu", "relu", "gelu", "tanh")),
    "dropout": Field(0.2, *_number(0, 1)),
    # The data
    "train_on": Field("train", *_choice("train", "all")),
    "whiten": Field(0, *_integer(0, 3072)),
    "whiten_eps": Field(0.01, *_number(0, float("inf"), above=True)),
    "augment": Field("none", *_choice("none", "flip", "flip+shift")),
    "shift": Field(2, *_integer(1, 8)),
    "shift_fill": Field("zeros", *_choice("zeros", "reflect")),
    "rotate": Field(0.0, *_number(0, 180)),
    "zoom": Field(0.0, *_number(0, 1)),
    "cutout": Field(0, *_integer(0, 32)),
    "mixup": Field(0.0, *_number(0, 10)),
    "batch_size": Field(256, *_integer(2, 45_000)),
    "epochs": Field(20, *_integer(1, 100_000)),
    # The optimization
    "optimizer": Field("adam", *_choice("adam", "adamw", "sgd", "nesterov", "muon")),
    "lr": Field(1e-3, *_number(0, float("inf"), above=True)),
    "schedule": Field("constant", *_choice("constant", "linear", "cosine", "one-cycle")),
    "warmup_epochs": Field(0.0, *_number(0, 100_000)),
    "weight_decay": Field(0.0, *_number(0, float("inf"))),
    "clip": Field(0.0, *_number(0, float("inf"))),  # the largest norm of all gradients together; 0 is no limit
    "label_smoothing": Field(0.0, *_number(0, 1)),
    "ema": Field(0.0, *_number(0, 1)),
    # The run
    "precision": Field("float32", *_choice("float32", "tf32", "bfloat16")),
    "seed": Field(0, *_integer(0, 2**31 - 1)),
}

# The keys that reach the compiled step as tensors, so that one compilation serves all their values. Every other key is
# part of the compilation's identity: a key that is forgotten here compiles once more, and never uses the wrong step.
SWITCHES = frozenset({"clip", "cutout", "dropout", "ema", "mixup", "rotate", "zoom"})  # above 0 they add to the step
TENSORS = SWITCHES | {"epochs", "label_smoothing", "lr", "seed", "warmup_epochs", "weight_decay"}


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean NEAREST?' for a name that is close to a known one, otherwise the list of all of them."""
    # A key such as learning_rate is far from lr letter by letter, so its initials count too.
    initials = "".join(word[0] for word in re.split(r"[^A-Za-z0-9]+", name) if word)
    close = [initials] if initials in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"


def resolve(spec: Mapping[str, Any]) -> Spec:
    """The spec with every default filled in.

    Raises:
        SpecError: a key is unknown, or its value has the wrong type or is out of range.
    """
    if not isinstance(spec, Mapping):
        raise SpecError(f"a spec is a dict, found {type(spec).__name__}")
    for key in spec:
        if key not in FIELDS:
            raise SpecError(f"unknown key {key!r}{nearest(str(key), list(FIELDS))}")
    resolved: Spec = {}
    for key, field in FIELDS.items():
        value = spec.get(key, field.default)
        if not field.valid(value):
            raise SpecError(f"{key} = {value!r}, expected {field.expected}")
        if isinstance(field.default, float):
            value = float(value) + 0.0  # -0.0 is 0.0, and has its id
        resolved[key] = list(value) if isinstance(field.default, list) else value
    if resolved["warmup_epochs"] > resolved["epochs"]:
        raise SpecError(
            f"warmup_epochs = {resolved['warmup_epochs']:g}, expected at most epochs = {resolved['epochs']}"
        )
    if resolved["schedule"] == "one-cycle" and resolved["warmup_epochs"] > 0:
        raise SpecError(
            f"warmup_epochs = {resolved['warmup_epochs']:g}, expected 0 with schedule = 'one-cycle', which has a "
            "warm-up of its own: 30% of the steps"
        )
    return resolved


def reads_bfloat16(resolved: Spec) -> bool:
    """Whether a step multiplies matrices in bfloat16: all of them, or those inside Muon."""
    return resolved["precision"] == "bfloat16" or resolved["optimizer"] == "muon"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def spec_id(resolved: Spec) -> str:
    """Twelve hexadecimal digits that name a resolved spec.

    Only keys that differ from their default count, so a key that is added later leaves every id as it is.
    """
    changed = {key: value for key, value in resolved.items() if value != FIELDS[key].default}
    return hashlib.sha256(canonical(changed).encode()).hexdigest()[:12]


def static_key(resolved: Spec) -> str:
    """Equal for two specs that one compilation serves: those that agree on all but TENSORS, and on which SWITCHES are
    on."""
    static = {key: value for key, value in resolved.items() if key not in TENSORS}
    return canonical(static | {key: resolved[key] > 0 for key in SWITCHES})
