"""Specs: what is accepted, what is refused and in which words, and the id."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.compile import fused
from core.functional import step
from core.functional.tree import flatten
from core.spec import (
    FIELDS,
    Choice,
    Field,
    Integer,
    List,
    Number,
    SpecError,
    Word,
    canonical,
    nearest,
    resolve,
    spec_id,
    static,
    static_key,
)
from tests.conftest import EXPERIMENTS, ROOT


def strategy(values):
    """The values that a key may have, from what its field says."""
    if isinstance(values, Integer):
        return st.integers(values.low, values.high)
    if isinstance(values, Number):
        high = min(values.high, 1e300)
        return st.floats(values.low, high, exclude_min=values.open, exclude_max=True) | st.integers(
            int(values.low) + values.open, max(int(values.low) + values.open, min(int(high) - 1, 1000))
        ).filter(values.accepts)
    if isinstance(values, Choice):
        return st.sampled_from(values.options)
    if isinstance(values, Word):
        return st.from_regex(values.pattern, fullmatch=True)
    return st.lists(strategy(values.each), max_size=values.length) | st.tuples(strategy(values.each))


VALID = {key: strategy(field.values) for key, field in FIELDS.items()} | {"warmup_epochs": st.floats(0, 1)}
SPECS = st.fixed_dictionaries({}, optional=VALID).filter(
    lambda spec: (
        (spec.get("schedule") != "one-cycle" or not spec.get("warmup_epochs"))
        and len(spec.get("locality", [])) <= len(spec.get("widths", [1, 1, 1]))
        and not (spec.get("locality") and spec.get("expansion"))
    )
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def another(field):
    """A value other than the default."""
    values, default = field.values, field.default
    if isinstance(values, List):
        return default[:-1] or [2.0]
    if isinstance(values, Word):
        return f"{default}0"
    if isinstance(values, Choice):
        return next(option for option in values.options if option != default)
    return default + 1 if values.accepts(default + 1) else (default + min(values.high, default + 1)) / 2


ANOTHER = {key: another(field) for key, field in FIELDS.items()}
DYNAMIC = sorted(key for key, field in FIELDS.items() if field.dynamic)
SWITCHES = sorted(key for key, field in FIELDS.items() if field.switch)


def test_a_field_is_complete():
    for key, field in FIELDS.items():
        assert field.values.accepts(field.default), key
        assert field.values.accepts(ANOTHER[key]), key
        assert re.fullmatch(r"(\S.*)?[a-z].*\.", field.meaning), key
        assert not field.switch or (field.dynamic and (field.default == [] or field.values.low == 0)), key


def test_the_defaults_are_frozen():
    """An id leaves out default values, so another default would give the ids of finished runs to other runs. Add a new
    key instead, whose default keeps the old meaning."""
    records = [json.loads(path.read_bytes()) for path in sorted((ROOT / "checkpoints").glob("*/*.json"))]
    assert set().union(*(record["spec"] for record in records)) <= FIELDS.keys()
    for record in records:
        assert spec_id(resolve(record["spec"])) == record["spec_id"], record["name"]


@given(SPECS)
def test_resolve_is_idempotent_and_complete(spec):
    once = resolve(spec)
    assert once.keys() == FIELDS.keys()
    assert resolve(once) == once
    assert canonical(resolve(once)) == canonical(once)
    assert {key: once[key] for key in spec} == {k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()}


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
    assert all(spec_id(resolve({key: FIELDS[key].default})) == spec_id(resolve({})) for key in FIELDS)
    assert len({spec_id(resolve({key: ANOTHER[key]})) for key in FIELDS}) == len(FIELDS)


def test_a_new_key_keeps_every_id_and_never_reuses_a_compiled_step(monkeypatch, step_inputs, small_spec):
    def name():
        """Of the compiled step on disk."""
        return fused._recipe(small_spec(), step_inputs(small_spec())).name

    ids, key, before = [spec_id(resolve(spec)) for spec in EXPERIMENTS.values()], static_key(resolve({})), name()
    assert name() == before
    monkeypatch.setitem(FIELDS, "blur", Field(0.0, Number(0, 1), "Blur."))
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
    if FIELDS[key].values.accepts(value) and (key != "warmup_epochs" or value <= FIELDS["epochs"].default):
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
        ("locality", [0.05]),
        ("locality", [math.inf]),
        ("locality", [1, 2, 3, 4]),
        ("locality", 3.0),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_types_and_ranges_are_refused(key, value):
    with pytest.raises(SpecError, match=rf"^{key} = [^\n]*, expected [^\n]*$"):
        resolve({key: value})


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("lr", np.float64(1e-3), 1e-3),
        ("lr", np.array(0.01), 0.01),
        ("lr", np.float32(0.5), 0.5),
        ("epochs", np.int64(3), 3),
        ("dropout", np.int32(0), 0.0),
        ("widths", np.array([64, 32]), [64, 32]),
        ("widths", [np.int64(64), 32], [64, 32]),
        ("widths", range(3, 1, -1), [3, 2]),
        ("locality", [1, np.float32(2)], [1.0, 2.0]),
        ("activation", np.str_("relu"), "relu"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_numbers_of_numpy_are_the_plain_numbers(key, value, same):
    """Types too: the spec goes into JSON, and its id is that of the plain one."""
    found, plain = resolve({key: value}), resolve({key: same})
    assert repr(found) == repr(plain)
    assert spec_id(found) == spec_id(plain)


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", np.bool_(True)), ("epochs", np.float64(3)), ("lr", np.array([1e-3])), ("lr", np.nan)]
)
def test_an_invalid_number_of_numpy_is_refused(key, value):
    with pytest.raises(SpecError, match=rf"^{key} = [^\n]*, expected [^\n]*$"):
        resolve({key: value})


def test_local_layers_are_plain_layers():
    with pytest.raises(SpecError, match=r"^locality = \[2.0\] with expansion = 2, expected expansion = 0: [^\n]*$"):
        resolve({"locality": [2], "expansion": 2})


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


def test_a_name_unlike_all_keys_gets_the_list():
    assert nearest("zzzzzz", ["lr", "seed"]) == "; known are lr, seed"


@pytest.mark.parametrize("spec", [[], "lr", None, 3])
def test_a_spec_is_a_dict(spec):
    with pytest.raises(SpecError, match=f"^a spec is a dict, found {type(spec).__name__}$"):
        resolve(spec)


@pytest.mark.parametrize("key", FIELDS)
def test_a_key_reaches_the_step_as_a_tensor_or_is_part_of_the_compilation(key):
    """Never neither: such a key would do nothing, or reuse a step that was compiled for another value."""
    one, other = resolve({}), resolve({key: ANOTHER[key]})
    if key in SWITCHES:  # on in both
        one = one | {key: [1.0] if key == "locality" else ANOTHER[key] / 2}
    same_step = static_key(one) == static_key(other)
    one, other = (step.hyper_tensors(spec, 10) for spec in (one, other))
    one, other = flatten(one), flatten(other)
    same_tensors = all(torch.equal(one[name], other[name]) for name in one)
    assert (same_step, same_tensors) == ((True, False) if key in DYNAMIC else (False, True))


@pytest.mark.parametrize("key", SWITCHES)
def test_a_step_without_dropout_or_another_switch_is_compiled_by_itself(key):
    assert static_key(resolve({key: [] if key == "locality" else 0})) != static_key(resolve({key: ANOTHER[key]}))


@given(SPECS)
def test_the_static_part_of_a_spec_has_no_dynamic_value(spec):
    spec = resolve(spec)
    found = static(spec)
    assert found.keys() == {key for key in FIELDS if key in SWITCHES or key not in DYNAMIC}
    assert all(found[key] is (spec[key] > 0) for key in SWITCHES if key != "locality")
    assert found["locality"] == len(spec["locality"]), "runs with other local layers are compiled apart"
    with pytest.raises(KeyError):
        found["lr"]
