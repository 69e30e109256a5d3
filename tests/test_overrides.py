"""Words of a command line that change keys of a spec."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import main
from core import cli, plan
from core.commands import options
from core.errors import UserError
from core.spec import FIELDS, SpecError, resolve
from tests.test_spec import VALID


def chosen(*words):
    args = cli.parse(["run", *words], main.PROJECT)
    return options.chosen(args, main.PROJECT, options.source(args))


def test_an_override_changes_the_spec_and_not_the_name():
    [run] = chosen("lr-1e-3", "lr=3e-4", "widths=512,256", "dropout=0.1", "epochs=3")
    assert run.name == "lr-1e-3"
    assert run.spec == resolve({"lr": 3e-4, "widths": [512, 256], "dropout": 0.1, "epochs": 3})


def test_several_values_make_a_grid():
    found = chosen("baseline", "lr=1e-3,5e-4", "widths=512,256/1024/none", "activation=relu,gelu")
    assert len(found) == 12
    assert found[0].name == "baseline-lr=0.001-widths=512x256-activation=relu"
    assert {tuple(run.spec["widths"]) for run in found} == {(512, 256), (1024,), ()}
    assert {run.spec["norm"] for run in found} == {"none"}  # what baseline says stays


def test_names_and_keys_may_follow_options():
    found = chosen("baseline", "--epochs", "3", "lr-1e-3", "dropout=0.1")
    assert [run.name for run in found] == ["baseline", "lr-1e-3"]
    assert {run.spec["dropout"] for run in found} == {0.1}
    with pytest.raises(UserError, match="unrecognized arguments: --lr-rate; see"):
        chosen("baseline", "--epochs", "3", "lr-1e-3", "--lr-rate")


def test_without_a_name_the_default_suite_is_changed():
    assert [run.name for run in chosen("seed=3")] == [run.name for run in chosen()]
    assert {run.seed for run in chosen("seed=3")} == {3}


def test_a_name_with_an_equals_sign_is_a_name():
    assert plan.split_words(["x-lr=1", "lr=1"], {"x-lr=1"}) == (["x-lr=1"], {"lr": 1.0}, {})
    assert plan.split_words(["lr=1"], {"lr=1"}).names == ["lr=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["drop_out=0.1"], "unknown key 'drop_out' in 'drop_out=0.1'; did you mean 'dropout'?"),
        (["lr=1", "lr=2"], "lr is given twice"),
        (["lr=1", "--lr", "2"], "lr is given twice, once as an option"),
        (["seed=1", "--seeds", "2"], "seed is given twice, once as --seeds"),
        (["seed=1,2"], "experiment lr-1e-3: seed = [1, 2], expected one seed; --seeds trains several"),
        (["dropout=x"], "experiment lr-1e-3: dropout = 'x', expected a number of at least 0 and below 1"),
        (["epochs=1.5"], "experiment lr-1e-3: epochs = '1.5', expected an integer from 1 to 100000"),
        (["lr="], "experiment lr-1e-3: lr = '', expected a finite number above 0"),
        (["lr=nan"], "experiment lr-1e-3: lr = 'nan', expected a finite number above 0"),
        (["widths=512,x"], "experiment lr-1e-3: widths = [512, 'x'], expected a list of at most 16 values, each an"),
    ],
)
def test_a_wrong_override_is_refused_in_one_sentence(words, message):
    with pytest.raises(UserError, match=rf"^{re.escape(message)}[^\n]*$"):
        chosen("lr-1e-3", *words)


def text(value):
    return ",".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


@given(st.data(), st.sampled_from(sorted(FIELDS)))
def test_every_value_of_every_key_can_be_written(data, key):
    value = data.draw(VALID[key].filter(lambda value: key != "locality" or len(value) <= 3))
    [found] = plan.parse_values(key, text(value))
    assert resolve({key: found})[key] == resolve({key: value})[key]


@given(st.sampled_from(sorted(FIELDS)), st.text(max_size=12))
def test_any_text_is_a_value_or_refused_in_one_line(key, written):
    for value in plan.parse_values(key, written):
        try:
            assert resolve({key: value})[key] == value
        except SpecError as error:
            refused = str(error)
            assert re.fullmatch(rf"{key} = [^\n]*, expected [^\n]*", refused)
