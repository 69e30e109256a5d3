"""The experiments: plain data, all of them valid, and the suites that the README promises."""

import json
import re

import pytest

from core.spec import resolve, spec_id
from experiments import DEFAULT, EXPERIMENTS, SUITES

# The experiments whose records are in the repository.
OFFICIAL = {
    "lr-1e-3": "44136fa355b3",
    "lr-5e-4": "1bb560989863",
    "lr-1e-4": "833789983205",
    "baseline": "d3d8b29e540c",
}


def test_the_ids_of_the_official_experiments_are_pinned():
    """Finished runs are found by their id: a change here abandons them, so it has to be meant."""
    assert {name: spec_id(resolve(EXPERIMENTS[name])) for name in OFFICIAL} == OFFICIAL


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_is_a_plain_dict_that_resolves(name):
    spec = EXPERIMENTS[name]
    assert type(spec) is dict
    assert json.loads(json.dumps(spec)) == spec
    resolve(spec)


def test_the_default_suite_is_three_learning_rates_and_nothing_else():
    suite = SUITES[DEFAULT]
    assert {name: spec["lr"] for name, spec in suite.items()} == {"lr-1e-3": 1e-3, "lr-5e-4": 5e-4, "lr-1e-4": 1e-4}
    others = [{key: value for key, value in resolve(spec).items() if key != "lr"} for spec in suite.values()]
    assert all(other == others[0] for other in others)
    assert others[0] == {key: value for key, value in resolve({}).items() if key != "lr"}


def test_the_baseline_lacks_what_the_others_have():
    baseline, other = resolve(EXPERIMENTS["baseline"]), resolve({})
    assert len(baseline["widths"]) < len(other["widths"])
    assert (baseline["activation"], baseline["norm"], baseline["dropout"]) == ("relu", "none", 0.0)
    trained_alike = ("epochs", "batch_size", "optimizer", "schedule", "seed", "augment", "weight_decay")
    assert all(baseline[key] == other[key] for key in trained_alike)


def test_names_are_unique_over_the_suites():
    """EXPERIMENTS is a dict: a name used twice would hide an experiment."""
    assert len(EXPERIMENTS) == sum(len(suite) for suite in SUITES.values())
    assert all(EXPERIMENTS[name] is spec for suite in SUITES.values() for name, spec in suite.items())


def test_a_name_of_both_an_experiment_and_a_suite_means_the_same():
    for name in EXPERIMENTS.keys() & SUITES.keys():
        assert list(SUITES[name]) == [name]


def test_names_are_fit_for_folders():
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) for name in [*EXPERIMENTS, *SUITES])


def test_no_two_experiments_are_the_same_run():
    ids = [spec_id(resolve(spec)) for spec in EXPERIMENTS.values()]
    assert len(set(ids)) == len(ids)
