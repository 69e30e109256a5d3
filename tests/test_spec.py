"""Specs: what is accepted, what is refused and in which words, and the id."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.compile import fused
from core.functional import optim
from core.spec import FIELDS, SWITCHES, TENSORS, Field, SpecError, canonical, nearest, resolve, spec_id, static_key
from tests.conftest import EXPERIMENTS

VALID = {
    "widths": st.lists(st.integers(1, 65536), max_size=16) | st.tuples(st.integers(1, 65536)),
    "expansion": st.integers(0, 16),
    "norm": st.sampled_from(["batch", "layer", "none"]),
    "activation": st.sampled_from(["leaky_relu", "relu", "gelu", "tanh"]),
    "dropout": st.floats(0, 1, exclude_max=True) | st.just(0),
    "train_on": st.sampled_from(["train", "all"]),
    "whiten": st.integers(0, 3072),
    "whiten_eps": st.floats(0, 1e300, exclude_min=True) | st.just(1),
    "augment": st.sampled_from(["none", "flip", "flip+shift"]),
    "shift": st.integers(1, 8),
    "shift_fill": st.sampled_from(["zeros", "reflect"]),
    "rotate": st.floats(0, 180, exclude_max=True) | st.integers(0, 179),
    "zoom": st.floats(0, 1, exclude_max=True),
    "cutout": st.integers(0, 32),
    "mixup": st.floats(0, 10, exclude_max=True),
    "batch_size": st.integers(2, 45_000),
    "epochs": st.integers(1, 100_000),
    "optimizer": st.sampled_from(["adam", "adamw", "sgd", "nesterov", "muon"]),
    "lr": st.floats(0, 1e300, exclude_min=True) | st.integers(1, 1000),
    "schedule": st.sampled_from(["constant", "linear", "cosine", "one-cycle"]),
    "warmup_epochs": st.floats(0, 1) | st.integers(0, 1),
    "weight_decay": st.floats(0, 1e300) | st.integers(0, 10),
    "clip": st.floats(0, 1e300) | st.integers(0, 10),
    "label_smoothing": st.floats(0, 1, exclude_max=True),
    "ema": st.floats(0, 1, exclude_max=True),
    "precision": st.sampled_from(["float32", "tf32", "bfloat16"]),
    "seed": st.integers(0, 2**31 - 1),
}
SPECS = st.fixed_dictionaries({}, optional=VALID).filter(
    lambda spec: spec.get("schedule") != "one-cycle" or not spec.get("warmup_epochs")
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def number(v):
    return type(v) in (int, float) and abs(v) < 1e308


# What a key may be, said a second time and in other words than core.spec says it.
MAY_BE = {
    "widths": lambda v: type(v) is list and len(v) < 17 and all(type(w) is int and 0 < w < 65537 for w in v),
    "expansion": lambda v: type(v) is int and 0 <= v < 17,
    "norm": lambda v: v in ("batch", "layer", "none"),
    "activation": lambda v: v in ("leaky_relu", "relu", "gelu", "tanh"),
    "dropout": lambda v: number(v) and 0 <= v < 1,
    "train_on": lambda v: v in ("train", "all"),
    "whiten": lambda v: type(v) is int and 0 <= v <= 3072,
    "whiten_eps": lambda v: number(v) and v > 0,
    "augment": lambda v: v in ("none", "flip", "flip+shift"),
    "shift": lambda v: type(v) is int and 0 < v < 9,
    "shift_fill": lambda v: v in ("zeros", "reflect"),
    "rotate": lambda v: number(v) and 0 <= v < 180,
    "zoom": lambda v: number(v) and 0 <= v < 1,
    "cutout": lambda v: type(v) is int and 0 <= v <= 32,
    "mixup": lambda v: number(v) and 0 <= v < 10,
    "batch_size": lambda v: type(v) is int and 1 < v <= 45_000,
    "epochs": lambda v: type(v) is int and 0 < v <= 100_000,
    "optimizer": lambda v: v in ("adam", "adamw", "sgd", "nesterov", "muon"),
    "lr": lambda v: number(v) and v > 0,
    "schedule": lambda v: v in ("constant", "linear", "cosine", "one-cycle"),
    "warmup_epochs": lambda v: number(v) and 0 <= v <= 20,  # the epochs of the default
    "weight_decay": lambda v: number(v) and v >= 0,
    "clip": lambda v: number(v) and v >= 0,
    "label_smoothing": lambda v: number(v) and 0 <= v < 1,
    "ema": lambda v: number(v) and 0 <= v < 1,
    "precision": lambda v: v in ("float32", "tf32", "bfloat16"),
    "seed": lambda v: type(v) is int and 0 <= v < 2**31,
}

DEFAULTS = {
    "widths": [1024, 512, 256],
    "expansion": 0,
    "norm": "batch",
    "activation": "leaky_relu",
    "dropout": 0.2,
    "train_on": "train",
    "whiten": 0,
    "whiten_eps": 0.01,
    "augment": "none",
    "shift": 2,
    "shift_fill": "zeros",
    "rotate": 0.0,
    "zoom": 0.0,
    "cutout": 0,
    "mixup": 0.0,
    "batch_size": 256,
    "epochs": 20,
    "optimizer": "adam",
    "lr": 0.001,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "weight_decay": 0.0,
    "clip": 0.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "precision": "float32",
    "seed": 0,
}
# Another value than the default, for each key.
ANOTHER = {
    "widths": [1024, 512],
    "expansion": 4,
    "norm": "none",
    "activation": "relu",
    "dropout": 0.5,
    "train_on": "all",
    "whiten": 400,
    "whiten_eps": 0.1,
    "augment": "flip",
    "shift": 4,
    "shift_fill": "reflect",
    "rotate": 10.0,
    "zoom": 0.1,
    "cutout": 8,
    "mixup": 0.2,
    "batch_size": 128,
    "epochs": 21,
    "optimizer": "sgd",
    "lr": 0.002,
    "schedule": "cosine",
    "warmup_epochs": 1.0,
    "weight_decay": 0.1,
    "clip": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.998,
    "precision": "bfloat16",
    "seed": 1,
}


def test_the_tables_here_are_complete():
    assert VALID.keys() == MAY_BE.keys() == ANOTHER.keys() == FIELDS.keys(), "say what the new key may be here too"
    assert FIELDS.keys() >= TENSORS


def test_the_defaults_are_frozen():
    """An id leaves out what has its default. With another default, the ids of finished runs would be those of runs that
    nobody has made: give what you want a key of its own, whose default keeps the old meaning."""
    assert {key: field.default for key, field in FIELDS.items()} == DEFAULTS
    assert canonical(resolve({})) == canonical(DEFAULTS)  # 0 is not 0.0 here


@given(SPECS)
def test_resolve_is_idempotent_and_complete(spec):
    once = resolve(spec)
    assert once.keys() == FIELDS.keys()
    assert resolve(once) == once
    assert canonical(resolve(once)) == canonical(once)
    assert {key: once[key] for key in spec} == {k: list(v) if k == "widths" else v for k, v in spec.items()}


@given(SPECS, st.randoms(use_true_random=False))
def test_id_does_not_depend_on_the_order_of_the_keys(spec, random):
    keys = list(spec)
    random.shuffle(keys)
    assert spec_id(resolve({key: spec[key] for key in keys})) == spec_id(resolve(spec))


@given(SPECS)
def test_id_survives_json(spec):
    resolved = resolve(spec)
    assert spec_id(resolve(json.loads(canonical(resolved)))) == spec_id(resolved)


@pytest.mark.parametrize(("key", "one", "other"), [("lr", 1, 1.0), ("weight_decay", 0, -0.0), ("dropout", 0, 0.0)])
def test_id_is_of_the_value_not_of_its_python_type(key, one, other):
    assert spec_id(resolve({key: one})) == spec_id(resolve({key: other}))


def test_id_takes_a_tuple_for_a_list():
    assert spec_id(resolve({"widths": (8, 4)})) == spec_id(resolve({"widths": [8, 4]}))


@given(SPECS, SPECS)
def test_different_specs_have_different_ids(one, other):
    one, other = resolve(one), resolve(other)
    assert (spec_id(one) == spec_id(other)) == (one == other)


def test_the_id_is_of_the_keys_that_differ_from_their_defaults():
    assert all(spec_id(resolve({key: DEFAULTS[key]})) == spec_id(resolve({})) for key in FIELDS)
    assert len({spec_id(resolve({key: ANOTHER[key]})) for key in FIELDS}) == len(FIELDS)


def test_a_new_key_keeps_every_id_and_never_reuses_a_compiled_step(monkeypatch, step_inputs, small_spec):
    def name():
        """Of the compiled step on disk."""
        return fused._recipe(small_spec(), step_inputs(small_spec())).name

    ids, key, before = [spec_id(resolve(spec)) for spec in EXPERIMENTS.values()], static_key(resolve({})), name()
    assert name() == before
    monkeypatch.setitem(FIELDS, "blur", Field(0.0, "a number", lambda v: isinstance(v, float)))
    assert [spec_id(resolve(spec)) for spec in EXPERIMENTS.values()] == ids, "finished runs are not found any more"
    used = resolve({"blur": 0.5})
    assert spec_id(used) not in ids
    assert len({static_key(used), static_key(resolve({})), key}) == 3, "a step that knows nothing of blur is reused"
    assert name() != before


def test_resolve_neither_keeps_nor_changes_what_it_was_given():
    mine = {"widths": [8, 4]}
    resolved = resolve(mine)
    resolved["widths"].append(2)
    resolve({})["widths"].append(2)
    assert mine == {"widths": [8, 4]}
    assert resolve({})["widths"] == [1024, 512, 256]


@given(st.sampled_from(sorted(FIELDS)), ANYTHING)
def test_whatever_the_value_it_is_resolved_or_refused_in_one_line(key, value):
    if MAY_BE[key](value):
        assert resolve({key: value})[key] == value
    else:
        with pytest.raises(SpecError, match=rf"^{key} = [^\n]*, expected [^\n]*$"):
            resolve({key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.0),
        ("epochs", True),
        ("epochs", "20"),
        ("batch_size", 1),
        ("batch_size", 45_001),
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", math.inf),
        ("lr", math.nan),
        ("lr", "1e-3"),
        ("lr", True),
        ("lr", 10**400),
        ("dropout", 1),
        ("dropout", -0.1),
        ("clip", -0.1),
        ("clip", math.inf),
        ("widths", [0]),
        ("widths", [8] * 17),
        ("widths", [True]),
        ("widths", 512),
        ("widths", "512"),
        ("expansion", -1),
        ("expansion", 17),
        ("expansion", 4.0),
        ("norm", "group"),
        ("norm", ["batch"]),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", None),
        ("warmup_epochs", 21),
        ("shift", 0),
        ("shift", 9),
        ("shift_fill", "edge"),
        ("rotate", 180),
        ("rotate", -1),
        ("zoom", 1),
        ("cutout", 33),
        ("cutout", 8.0),
        ("mixup", -0.1),
        ("mixup", 10),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_types_and_ranges_are_refused(key, value):
    with pytest.raises(SpecError, match=rf"^{key} = [^\n]*, expected [^\n]*$"):
        resolve({key: value})


def test_one_cycle_has_a_warm_up_of_its_own():
    assert resolve({"schedule": "one-cycle", "warmup_epochs": 0})["warmup_epochs"] == 0
    with pytest.raises(SpecError) as refused:
        resolve({"schedule": "one-cycle", "warmup_epochs": 0.5})
    assert str(refused.value) == (
        "warmup_epochs = 0.5, expected 0 with schedule = 'one-cycle', which has a warm-up of its own: 30% of the steps"
    )


@given(st.text(max_size=20).filter(lambda key: key not in FIELDS))
def test_unknown_keys_are_refused_in_one_line(key):
    with pytest.raises(SpecError) as refused:
        resolve({key: 1})
    assert str(refused.value).startswith(f"unknown key {key!r}; ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "lr"),
        ("width", "widths"),
        ("batchsize", "batch_size"),
        ("epoch", "epochs"),
        ("weight-decay", "weight_decay"),
        ("drop_out", "dropout"),
        ("optimiser", "optimizer"),
    ],
)
def test_unknown_keys_get_the_nearest_name(key, meant):
    with pytest.raises(SpecError) as refused:
        resolve({key: 1})
    assert str(refused.value) == f"unknown key '{key}'; did you mean '{meant}'?"


def test_a_name_near_to_none_gets_the_list():
    assert nearest("zzzzzz", ["lr", "seed"]) == "; known are lr, seed"


@pytest.mark.parametrize("spec", [[], "lr", None, 3])
def test_a_spec_is_a_dict(spec):
    with pytest.raises(SpecError, match=f"^a spec is a dict, found {type(spec).__name__}$"):
        resolve(spec)


@pytest.mark.parametrize("key", FIELDS)
def test_a_key_reaches_the_step_as_a_tensor_or_is_part_of_the_compilation(key):
    """Never neither: such a key would do nothing, or reuse a step that was compiled for another value."""
    one, other = resolve({}), resolve({key: ANOTHER[key]})
    switched = key in SWITCHES and not FIELDS[key].default
    one, other = (spec | {key: spec[key] or 0.5} if switched else spec for spec in (one, other))
    same_step = static_key(one) == static_key(other)
    one, other = (optim.hyper_tensors(spec, 10, torch.device("cpu")) for spec in (one, other))
    same_tensors = all(torch.equal(one[name], other[name]) for name in one)
    assert (same_step, same_tensors) == ((True, False) if key in TENSORS else (False, True))


@pytest.mark.parametrize("key", sorted(SWITCHES))
def test_a_step_without_dropout_or_another_switch_is_compiled_by_itself(key):
    assert static_key(resolve({key: 0})) != static_key(resolve({key: ANOTHER[key]}))
