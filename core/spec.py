"""Experiment specs: each key with its default, range and meaning; the resolved spec and its id. Knows no tensor."""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from core.errors import UserError

Spec = dict[str, Any]
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"


class SpecError(UserError, ValueError):
    """A spec that cannot be run."""


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a network must know of a data set. The defaults are those of CIFAR-10.

    Attributes:
        classes: The names of the classes, in the order of their labels.
        shape: Channels, height and width of an image.
        mean, std: Of each channel of the training images, in 0..1.
        held_out: How many training images of each class are for validation.
    """

    classes: tuple[str, ...] = tuple(CIFAR10_CLASSES.split())
    shape: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    held_out: int = 500

    def __post_init__(self) -> None:
        """Raise ValueError where no data set can be like this: it may come from a damaged file."""
        names = self.classes
        if not 2 <= len(names) == len(set(names)) <= 1_000:
            raise ValueError(f"{len(names):,} classes, expected from 2 to 1,000 with different names")
        if not all(name.isprintable() and 0 < len(name) <= 100 for name in names):
            raise ValueError("a name of a class has no letter, more than 100, or one that cannot be printed")
        if len(self.shape) != 3 or not all(1 <= size <= 256 for size in self.shape) or self.held_out < 1:
            raise ValueError(f"images of the shape {self.shape}, of which {self.held_out} are held out")
        if not len(self.mean) == len(self.std) == self.shape[0] or not all(
            0 <= mean <= 1 and 0 < std <= 1 for mean, std in zip(self.mean, self.std, strict=True)
        ):
            raise ValueError(f"mean {self.mean} and standard deviation {self.std} of {self.shape[0]} channels")

    @property
    def inputs(self) -> int:
        """The number of values of an image."""
        return math.prod(self.shape)


CIFAR10 = DataInfo()


def plain(value: Any, depth: int = 2) -> Any:
    """Numbers and arrays of NumPy, tuples and ranges as the plain numbers and lists that they stand for.

    Args:
        depth: how many lists may be in each other: a grid of widths is a list of lists.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if depth and isinstance(value, list | tuple | range):
        return [plain(each, depth - 1) for each in value]
    return value


# What the values of a key may be. `accepts` tells whether a value is one of them; `parse` gives the value that a text
# stands for, or the text itself if it stands for none.


class Integer(NamedTuple):
    """The integers from `low` to `high`."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def parse(self, text: str) -> Any:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else text


class Number(NamedTuple):
    """The numbers from `low` to below `high`; without `low` itself where it is `open`."""

    low: float
    high: float
    open: bool = False

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a finite number {'above' if self.open else 'of at least'} {self.low:g}"
        return f"a number {'above' if self.open else 'of at least'} {self.low:g} and below {self.high:g}"

    def accepts(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        above = self.low < value if self.open else self.low <= value
        return above and value < min(self.high, sys.float_info.max)  # a larger integer cannot become a float

    def parse(self, text: str) -> Any:
        return float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) else text


class Choice(NamedTuple):
    """One of some words."""

    options: tuple[str, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(self.options)

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.options

    def parse(self, text: str) -> Any:
        return text


class Word(NamedTuple):
    """A word whose letters `pattern` describes."""

    pattern: str
    meaning: str

    def __str__(self) -> str:
        return self.meaning

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None

    def parse(self, text: str) -> Any:
        return text


class List(NamedTuple):
    """Lists of at most `length` numbers."""

    length: int
    each: "Integer | Number"

    def __str__(self) -> str:
        return f"a list of at most {self.length} values, each {self.each}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list) and len(value) <= self.length and all(map(self.each.accepts, value))

    def parse(self, text: str) -> Any:
        """ "512,256" is [512, 256], "none" is []."""
        return [] if text in ("", "none") else [self.each.parse(each) for each in text.split(",")]


class Field(NamedTuple):
    """A key of a spec.

    Attributes:
        default: The value where a spec leaves the key out. It never changes: ids are built on it (see `spec_id`).
        values: The values that the key may have.
        meaning: What the key does, in a sentence or two.
        dynamic: How the value reaches the compiled step as a tensor, so that one compilation serves all values: the
            dtype of a 0-d tensor, or "derived" where other tensors are computed from it (core.functional.step,
            `hyper_tensors`). Empty for a constant of the compiled step.
        switch: Whether a value above 0, or a list that is not empty, adds operations to the step.
    """

    default: Any
    values: Integer | Number | Choice | Word | List
    meaning: str
    dynamic: str = ""
    switch: bool = False


FIELDS: dict[str, Field] = {
    # The network
    "widths": Field([1024, 512, 256], List(16, Integer(1, 65536)), "Number of units of each hidden layer."),
    "expansion": Field(
        0,
        Integer(0, 16),
        "0: plain layers. Above 0: each width is a residual block, and its hidden layer is this many times as wide.",
    ),
    "norm": Field("batch", Choice(("batch", "layer", "none")), "Normalization in each hidden layer."),
    "activation": Field(
        "leaky_relu", Choice(("leaky_relu", "relu", "gelu", "tanh")), "Activation function of the hidden layers."
    ),
    "locality": Field(
        [],
        List(16, Number(0.1, math.inf)),
        "Reach of the units of the first, second, ... hidden layer in the image: the sigma of a Gaussian, in pixels. "
        "The layers after the last value are dense.",
        dynamic="derived",
        switch=True,
    ),
    "dropout": Field(
        0.2, Number(0, 1), "Probability that dropout sets a hidden unit to zero.", dynamic="float32", switch=True
    ),
    # The data
    "dataset": Field(
        "cifar10",
        Word("[a-z][a-z0-9-]{0,39}", "the name of a data set"),
        "Data set: cifar10, cifar100, synthetic, or the name that --data-folder gives to a folder of your own images.",
    ),
    "train_on": Field(
        "train",
        Choice(("train", "all")),
        "train: some images (5,000 of CIFAR-10) are held out for validation. all: the run trains on them, too.",
    ),
    "whiten": Field(
        0,
        Integer(0, 3072),
        "Number of principal components that the images are projected on. With `locality`, they become an image "
        "again (ZCA). 0: no projection.",
    ),
    "whiten_eps": Field(
        0.01, Number(0, math.inf, open=True), "Added to the variance of each principal component before the division."
    ),
    "augment": Field(
        "none",
        Choice(("none", "flip", "flip+shift")),
        "flip: half of the images are mirrored. flip+shift: all images are also moved at random.",
    ),
    "shift": Field(2, Integer(1, 8), "Largest move of flip+shift, in pixels."),
    "shift_fill": Field(
        "zeros", Choice(("zeros", "reflect")), "What fills the pixels that a move, a rotation or a zoom leaves empty."
    ),
    "rotate": Field(0.0, Number(0, 180), "Largest random rotation, in degrees.", dynamic="float32", switch=True),
    "zoom": Field(
        0.0,
        Number(0, 1),
        "Largest random change of scale: the factor is from 1 - zoom to 1 + zoom.",
        dynamic="float32",
        switch=True,
    ),
    "cutout": Field(
        0,
        Integer(0, 32),
        "Side of a square of pixels that is set to zero at a random place.",
        dynamic="float32",
        switch=True,
    ),
    "mixup": Field(
        0.0,
        Number(0, 10),
        "Each image is mixed with another one; the shares come from Beta(mixup, mixup). 0: no mixing.",
        dynamic="derived",
        switch=True,
    ),
    "batch_size": Field(256, Integer(2, 45_000), "Number of images in a step."),
    "epochs": Field(20, Integer(1, 100_000), "Number of passes over the training images.", dynamic="derived"),
    # The optimization
    "optimizer": Field("adam", Choice(("adam", "adamw", "sgd", "nesterov", "muon")), "Rule that updates the weights."),
    "lr": Field(1e-3, Number(0, math.inf, open=True), "Learning rate, the largest of the schedule.", dynamic="float64"),
    "schedule": Field(
        "constant",
        Choice(("constant", "linear", "cosine", "one-cycle")),
        "How the learning rate changes after the warm-up.",
    ),
    "warmup_epochs": Field(
        0.0, Number(0, 100_000), "Number of epochs in which the learning rate rises linearly.", dynamic="derived"
    ),
    "weight_decay": Field(
        0.0, Number(0, math.inf), "Weight decay. It is decoupled with adamw and muon.", dynamic="float64"
    ),
    "clip": Field(
        0.0,
        Number(0, math.inf),
        "Largest norm of all gradients together. 0: no limit.",
        dynamic="float64",
        switch=True,
    ),
    "label_smoothing": Field(
        0.0, Number(0, 1), "Share of each label that is spread evenly over the classes.", dynamic="float32"
    ),
    "ema": Field(
        0.0,
        Number(0, 1),
        "Decay of the moving average of the weights, which is evaluated and saved. 0: no average.",
        dynamic="float64",
        switch=True,
    ),
    # The run
    "precision": Field(
        "float32",
        Choice(("float32", "tf32", "bfloat16")),
        "Precision of matrix products. Weights, optimizer state and losses stay float32.",
    ),
    "seed": Field(
        0,
        Integer(0, 2**31 - 1),
        "Seed of the first weights, the order of the images, dropout and augmentation.",
        dynamic="int32",
    ),
}


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean NEAREST?' for a name that is close to a known one, otherwise the list of all known names."""
    # A key such as learning_rate is far from lr letter by letter, so its initials count too.
    initials = "".join(word[0] for word in re.split(r"[^A-Za-z0-9]+", name) if word)
    close = [initials] if initials in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"


def resolve(spec: Mapping[str, Any]) -> Spec:
    """The spec with every default filled in.

    Raises:
        SpecError: A key is unknown, or its value has the wrong type or is out of range.
    """
    if not isinstance(spec, Mapping):
        raise SpecError(f"a spec is a dict, found {type(spec).__name__}")
    for key in spec:
        if key not in FIELDS:
            raise SpecError(f"unknown key {key!r}{nearest(str(key), list(FIELDS))}")
    resolved: Spec = {}
    for key, field in FIELDS.items():
        value = plain(spec.get(key, field.default))
        if not field.values.accepts(value):
            raise SpecError(f"{key} = {value!r}, expected {field.values}")
        resolved[key] = as_floats(value, field.values)
    if resolved["warmup_epochs"] > resolved["epochs"]:
        raise SpecError(
            f"warmup_epochs = {resolved['warmup_epochs']:g}, expected at most epochs = {resolved['epochs']}"
        )
    if resolved["schedule"] == "one-cycle" and resolved["warmup_epochs"] > 0:
        raise SpecError(
            f"warmup_epochs = {resolved['warmup_epochs']:g}, expected 0 with schedule = 'one-cycle', which has a "
            "warm-up of its own: 30% of the steps"
        )
    local = resolved["locality"]
    if len(local) > len(resolved["widths"]):
        raise SpecError(f"locality = {local}, expected at most a value for each of {len(resolved['widths'])} widths")
    if local and resolved["expansion"]:
        raise SpecError(
            f"locality = {local} with expansion = {resolved['expansion']}, expected expansion = 0: local layers are "
            "plain layers"
        )
    return resolved


def as_floats(value: Any, kind: Any) -> Any:
    """A valid value, or list of values, as a resolved spec has it: as floats if they may have a fraction."""
    if isinstance(kind, List):
        return [as_floats(each, kind.each) for each in value]
    return float(value) + 0.0 if isinstance(kind, Number) else value  # -0.0 becomes 0.0, so both have one id


def reads_bfloat16(resolved: Spec) -> bool:
    """Whether a step multiplies matrices in bfloat16: all of them, or those inside Muon."""
    return resolved["precision"] == "bfloat16" or resolved["optimizer"] == "muon"


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def changed(resolved: Spec) -> Spec:
    """The part of a resolved spec that differs from the defaults."""
    return {key: value for key, value in resolved.items() if value != FIELDS[key].default}


def spec_id(resolved: Spec) -> str:
    """Twelve hexadecimal digits that name a resolved spec.

    Only keys that differ from their default count. Adding a key keeps the ids of old runs.
    """
    return hashlib.sha256(canonical(changed(resolved)).encode()).hexdigest()[:12]


def static(resolved: Spec) -> Spec:
    """The part of a resolved spec that is constant in the compiled step, without dynamic values. A switch is a boolean,
    `locality` is the number of local layers. One compilation serves all specs that agree on this part."""
    switches = {key: _switched(resolved[key]) for key, field in FIELDS.items() if field.switch}
    return {key: resolved[key] for key, field in FIELDS.items() if not field.dynamic} | switches


def _switched(value: Any) -> bool | int:
    return len(value) if isinstance(value, list) else value > 0


def static_key(resolved: Spec) -> str:
    """`static` as text."""
    return canonical(static(resolved))
