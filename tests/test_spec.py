"""Specs: what is accepted, what is refused and in which words, and the id."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.spec import FIELDS, SpecError, canonical, nearest, resolve, spec_id, static_key

VALID = {
    "widths": st.lists(st.integers(1, 65536), max_size=16) | st.tuples(st.integers(1, 65536)),
    "norm": st.sampled_from(["batch", "none"]),
    "activation": st.sampled_from(["leaky_relu", "relu", "gelu", "tanh"]),
    "dropout": st.floats(0, 1, exclude_max=True) | st.just(0),
    "augment": st.sampled_from(["none", "flip", "flip+shift"]),
    "batch_size": st.integers(2, 45_000),
    "epochs": st.integers(1, 100_000),
    "optimizer": st.sampled_from(["adam", "adamw", "sgd"]),
    "lr": st.floats(0, 1e300, exclude_min=True) | st.integers(1, 1000),
    "schedule": st.sampled_from(["constant", "linear", "cosine"]),
    "warmup_epochs": st.floats(0, 1) | st.integers(0, 1),
    "weight_decay": st.floats(0, 1e300) | st.integers(0, 10),
    "label_smoothing": st.floats(0, 1, exclude_max=True),
    "precision": st.sampled_from(["float32", "tf32", "bfloat16"]),
    "seed": st.integers(0, 2**31 - 1),
}
SPECS = st.fixed_dictionaries({}, optional=VALID)
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
    "norm": lambda v: v in ("batch", "none"),
    "activation": lambda v: v in ("leaky_relu", "relu", "gelu", "tanh"),
    "dropout": lambda v: number(v) and 0 <= v < 1,
    "augment": lambda v: v in ("none", "flip", "flip+shift"),
    "batch_size": lambda v: type(v) is int and 1 < v <= 45_000,
    "epochs": lambda v: type(v) is int and 0 < v <= 100_000,
    "optimizer": lambda v: v in ("adam", "adamw", "sgd"),
    "lr": lambda v: number(v) and v > 0,
    "schedule": lambda v: v in ("constant", "linear", "cosine"),
    "warmup_epochs": lambda v: number(v) and 0 <= v <= 20,  # the epochs of the default
    "weight_decay": lambda v: number(v) and v >= 0,
    "label_smoothing": lambda v: number(v) and 0 <= v < 1,
    "precision": lambda v: v in ("float32", "tf32", "bfloat16"),
    "seed": lambda v: type(v) is int and 0 <= v < 2**31,
}


def test_the_tables_here_are_complete():
    assert VALID.keys() == MAY_BE.keys() == FIELDS.keys()


def test_defaults_are_those_of_the_documentation():
    spec = resolve({})
    assert (spec["widths"], spec["norm"], spec["activation"]) == ([1024, 512, 256], "batch", "leaky_relu")
    assert (spec["dropout"], spec["batch_size"], spec["epochs"]) == (0.2, 256, 20)
    assert (spec["optimizer"], spec["schedule"], spec["seed"]) == ("adam", "constant", 0)


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


def test_id_of_the_default_is_pinned():
    """Finished runs are found by their id: a change here abandons every one of them, so it has to be meant."""
    described = '{"activation":"leaky_relu","augment":"none","batch_size":256,"dropout":0.2,"epochs":20,'
    described += '"label_smoothing":0.0,"lr":0.001,"norm":"batch","optimizer":"adam","precision":"float32",'
    described += '"schedule":"constant","seed":0,"warmup_epochs":0.0,"weight_decay":0.0,"widths":[1024,512,256]}'
    assert canonical(resolve({})) == described
    assert spec_id(resolve({})) == "58fc3a9013e7"


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
        ("widths", [0]),
        ("widths", [8] * 17),
        ("widths", [True]),
        ("widths", 512),
        ("widths", "512"),
        ("norm", "layer"),
        ("norm", ["batch"]),
        ("seed", -1),
        ("seed", 2**31),
        ("seed", None),
        ("warmup_epochs", 21),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_types_and_ranges_are_refused(key, value):
    with pytest.raises(SpecError, match=rf"^{key} = [^\n]*, expected [^\n]*$"):
        resolve({key: value})


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


def test_one_compilation_serves_what_reaches_the_step_as_a_tensor():
    key = static_key(resolve({}))
    same = {"lr": 0.5, "seed": 9, "epochs": 3, "dropout": 0.5, "weight_decay": 0.1, "label_smoothing": 0.1}
    assert all(static_key(resolve({name: value})) == key for name, value in same.items())
    other = {"widths": [8], "norm": "none", "batch_size": 8, "optimizer": "sgd", "dropout": 0.0, "schedule": "linear"}
    keys = [static_key(resolve({name: value})) for name, value in other.items()]
    assert len({key, *keys}) == 1 + len(keys)
