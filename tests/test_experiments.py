"""The experiments: plain data, all of them valid, and the suites that the README promises."""

import json
import re

import pytest

from core import space
from core.functional import model
from core.report import published
from core.spec import resolve, spec_id
from experiments import ABLATIONS, DEFAULT, FORMER_NAMES, SEARCHES, SUITES
from tests.conftest import EXPERIMENTS

# Experiments with records in the repository.
OFFICIAL = {
    "lr-1e-3": "44136fa355b3",
    "lr-5e-4": "1bb560989863",
    "lr-1e-4": "833789983205",
    "baseline": "d3d8b29e540c",
    "minute": "54e1caaf1cac",
    "ten-minutes": "43903cb45c3a",
    "hour": "a8280929edd2",
    "two-hours": "ac095a89bf43",
    "gpu": "eb56bcef5f81",
}


def test_the_ids_of_the_official_experiments_are_pinned():
    """Finished runs are found by their id. A change here orphans them, so it must be intended."""
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


def test_the_ablation_changes_one_thing_at_a_time():
    """Added to the baseline, or taken from the full network; the two ends are the official runs themselves."""
    specs = {name: resolve(spec) for name, spec in SUITES["ablation"].items()}
    baseline, full = (specs.pop(ABLATIONS["ablation"][end]) for end in ("plain", "full"))
    assert [spec_id(baseline), spec_id(full)] == [OFFICIAL["baseline"], OFFICIAL["lr-1e-3"]]
    keys = {"depth": "widths", "norm": "norm", "dropout": "dropout", "leaky_relu": "activation"}
    assert {key for key in full if full[key] != baseline[key]} == set(keys.values())
    assert specs.keys() == {end + change for end in ("baseline+", "full-") for change in keys}
    for change, key in keys.items():
        assert specs[f"baseline+{change}"] == {**baseline, key: full[key]}
        assert specs[f"full-{change}"] == {**full, key: baseline[key]}


def test_the_recipes_train_on_all_images_and_their_ablation_does_not():
    for name, spec in SUITES["best-by-time"].items():
        assert resolve(spec)["train_on"] == "all", name
    for name, spec in SUITES["minute-ablation"].items():
        assert resolve(spec)["train_on"] == "train", name
    assert SUITES["best-by-time"]["minute"] == {**SUITES["minute-ablation"]["minute-full"], "train_on": "all"}


def test_the_ablation_of_the_minute_takes_one_ingredient_away_at_a_time():
    """All of those that the recipe has: between the plain network and the full recipe nothing else differs."""
    specs = {name: resolve(spec) for name, spec in SUITES["minute-ablation"].items()}
    ends = ABLATIONS["minute-ablation"]
    full, plain = specs[ends["full"]], specs[ends["plain"]]
    ingredients = {key for key in full if full[key] != plain[key]}
    changed = {"minute-gelu": "activation", "minute-bfloat16": "precision", "minute+dropout": "dropout"}
    changed |= {f"minute-{key}": key for key in ingredients - set(changed.values())}
    assert set(specs) - set(ends.values()) == set(changed)
    for name, key in changed.items():
        assert specs[name] == {**full, key: resolve({})[key]}
        without = full if name.startswith("minute+") else specs[name]
        assert without[key] in (0, "none", []) or name == f"minute-{full[key]}"


def test_the_local_networks_of_the_search_cost_as_much_as_the_minute():
    def petaflop(spec):
        return published.petaflop(model.parameter_count(spec), 50_000 * spec["epochs"], published.whitened(spec))

    minute = petaflop(resolve(EXPERIMENTS["minute"]))
    assert minute == pytest.approx(0.0266, rel=0.01)  # as in results.md
    parsed = space.parse("search-local-minute", SEARCHES, EXPERIMENTS)
    for widths in parsed.axes["widths"]:
        assert petaflop({**parsed.spec, "widths": widths}) == pytest.approx(minute, rel=0.03), widths


def test_a_former_name_has_one_new_name_and_is_no_longer_used():
    assert FORMER_NAMES.keys() == {"minute-activation", "minute-dropout", "minute-precision", "records"}
    assert set(FORMER_NAMES.values()) <= {*EXPERIMENTS, *SUITES}
    assert not FORMER_NAMES.keys() & {*EXPERIMENTS, *SUITES}


def test_names_are_fit_for_folders():
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.+=-]*", name) for name in [*EXPERIMENTS, *SUITES])


def test_no_two_experiments_are_the_same_run():
    ids = [spec_id(resolve(spec)) for spec in EXPERIMENTS.values()]
    assert len(set(ids)) == len(ids)
